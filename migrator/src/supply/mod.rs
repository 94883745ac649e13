//! Chunks of images from elsewhere: what a VM waits for at once, the rest in the background.
//!
//! ```text
//!   a VM reads a chunk that is not here ──▶ demand ──┐                      ┌──▶ peers (a session of the shape *chunks* each)
//!   images that are not all here ──────────▶ fill ───┴──▶ fetch: one source ┤
//!                                                        after the other    └──▶ what was added: registries
//!                                                              │
//!                                        length and digest checked, then kept
//! ```
//!
//! A source that sends something else than what was asked for is left alone for a while, as is one that does not answer; nothing wrong is ever kept or
//! served. While nobody has a chunk that a VM waits for, the VM waits, and `inspect` says why.
//!
//! Filling is of the lowest priority: it stands still while pods arrive and while the disk is nearly full, and gives way to VMs that read; while a
//! pod starts, only what pods read before is filled. A VM that reads one chunk after the other has the next ones fetched ahead.

mod ahead;
mod demand;
mod fetch;
mod fill;
mod flight;
mod peers;
mod serve;
mod source;
mod standing;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::image::{Digest, ImageRecord, ImageStore};
use ahead::Ahead;
use flight::Flights;
use standing::Standing;

pub use fetch::Lacking;
pub use fill::ROOM_LEFT;
pub use peers::PeerSource;
pub use serve::serve;
pub use source::{ChunkSource, SourceError, Wanted};

/// Gets what images of this node lack. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Supply {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    images: Arc<ImageStore>,
    state: Mutex<State>,
    /// How many pods arrive.
    arriving: watch::Sender<usize>,
    /// How many pods start.
    starting: watch::Sender<usize>,
    /// How many chunks are under way that a VM waits for.
    demanded: watch::Sender<usize>,
    shutdown: CancellationToken,
    tasks: TaskTracker,
}

#[derive(Debug, Default)]
struct State {
    sources: Vec<Arc<dyn ChunkSource>>,
    standing: Standing,
    flights: Flights,
    /// By the image's bytes: its readers.
    ahead: BTreeMap<Digest, Ahead>,
    /// By the image's bytes: what has come of it from elsewhere, in bytes.
    fetched: BTreeMap<Digest, u64>,
    /// Images that are being filled, each with what holds that up.
    fills: BTreeMap<Digest, Option<String>>,
    /// When a chunk came last that somebody waited for.
    demanded_at: Option<Instant>,
}

/// One more of what a counter counts, until it is dropped.
#[derive(Debug)]
pub struct Counted(watch::Sender<usize>);

impl Counted {
    fn new(counter: &watch::Sender<usize>) -> Self {
        counter.send_modify(|count| *count += 1);
        Self(counter.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

impl Supply {
    /// For the images of a store. Nothing happens before [`Supply::start`].
    pub fn new(images: Arc<ImageStore>, shutdown: CancellationToken, tasks: TaskTracker) -> Self {
        Self {
            inner: Arc::new(Inner {
                images,
                state: Mutex::default(),
                arriving: watch::Sender::new(0),
                starting: watch::Sender::new(0),
                demanded: watch::Sender::new(0),
                shutdown,
                tasks,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Lists and maps, each changed by one call.
        self.inner
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a source: it is asked after those that were added before.
    pub fn add(&self, source: Arc<dyn ChunkSource>) {
        self.lock().sources.push(source);
    }

    /// Begins to fetch what is waited for, and to fill the images that lack chunks. Call it once, within the runtime.
    pub fn start(&self) {
        self.inner.tasks.spawn(demand::serve(self.clone()));
        self.inner.tasks.spawn(fill::mend(self.clone()));
        let supply = self.clone();
        self.inner.tasks.spawn(async move {
            let images = Arc::clone(&supply.inner.images);
            let lacking = move || {
                let mut records = images.records();
                records.retain(|record| !images.chunks().missing(record).is_empty());
                records
            };
            for record in tokio::task::spawn_blocking(lacking)
                .await
                .unwrap_or_default()
            {
                supply.fill(&record);
            }
        });
    }

    /// Fetches all that an image of the store lacks, in the background and in the order of its use.
    pub fn fill(&self, record: &Arc<ImageRecord>) {
        let new = {
            let mut state = self.lock();
            let fills = &mut state.fills;
            fills.insert(record.erofs_digest, None).is_none()
        };
        if new {
            let fill = fill::fill(self.clone(), Arc::clone(record));
            self.inner.tasks.spawn(fill);
        }
    }

    /// Runs something until it is over or the service ends.
    fn spawn(&self, what: impl Future<Output = ()> + Send + 'static) {
        let shutdown = self.inner.shutdown.clone();
        self.inner.tasks.spawn(async move {
            tokio::select! {
                () = what => {}
                () = shutdown.cancelled() => {}
            }
        });
    }

    /// A pod arrives: filling waits until this is dropped.
    pub fn arriving(&self) -> Counted {
        Counted::new(&self.inner.arriving)
    }

    /// A pod starts: until this is dropped, only what pods read before is filled.
    pub fn starting(&self) -> Counted {
        Counted::new(&self.inner.starting)
    }

    /// Bytes of an image that have come from elsewhere since the service began.
    pub fn fetched(&self, image: &Digest) -> u64 {
        self.lock().fetched.get(image).copied().unwrap_or_default()
    }

    /// What holds up the filling of an image, if it is being filled and something does.
    pub fn problem(&self, image: &Digest) -> Option<String> {
        self.lock().fills.get(image).cloned().flatten()
    }
}
