//! Chunks that somebody waits for.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::image::digest::Digest;
use crate::image::record::ImageRecord;

/// How long a reader sleeps until it looks whether its export is closed.
const LOOK_UP: Duration = Duration::from_millis(500);

/// A chunk of an image that somebody waits for.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The image.
    pub record: Arc<ImageRecord>,
    /// The chunk in it.
    pub index: u32,
}

/// A chunk that somebody waits for, for people to see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// The chunk.
    pub digest: Digest,
    /// For how long.
    pub since: Duration,
    /// Why it does not come, once that is known.
    pub problem: Option<String>,
}

#[derive(Debug)]
pub(super) struct Wants {
    wanted: Mutex<HashMap<Digest, Want>>,
    changed: Condvar,
    asked: UnboundedSender<Asked>,
    /// Until somebody takes it.
    asking: Mutex<Option<UnboundedReceiver<Asked>>>,
}

#[derive(Debug)]
struct Want {
    waiters: usize,
    since: Instant,
    problem: Option<String>,
    /// It has come.
    bytes: Option<Bytes>,
}

impl Wants {
    pub(super) fn new() -> Self {
        let (asked, asking) = unbounded_channel();
        Self {
            wanted: Mutex::default(),
            changed: Condvar::new(),
            asked,
            asking: Mutex::new(Some(asking)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Digest, Want>> {
        // Every change is one of an entry that is whole in any case.
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is asked for, in order, for whoever fetches; once.
    pub(super) fn asking(&self) -> Option<UnboundedReceiver<Asked>> {
        let mut asking = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        asking.take()
    }

    /// Waits for a chunk; `here` looks, while nothing can come unseen, whether it is here after all. `None`: `over` says that
    /// nobody wants it any more.
    pub(super) fn wait(
        &self,
        asked: &Asked,
        here: impl FnOnce() -> bool,
        over: &dyn Fn() -> bool,
    ) -> Option<Come> {
        let digest = asked.record.chunks[asked.index as usize];
        let mut wanted = self.lock();
        if here() {
            return Some(Come::Look);
        }
        let want = wanted.entry(digest).or_insert_with(|| {
            // Nobody fetches where there is no service.
            let _ = self.asked.send(asked.clone());
            Want {
                waiters: 0,
                since: Instant::now(),
                problem: None,
                bytes: None,
            }
        });
        want.waiters += 1;
        loop {
            let come = wanted.get(&digest).and_then(|want| want.bytes.clone());
            if come.is_some() || over() {
                if let Some(want) = wanted.get_mut(&digest) {
                    want.waiters -= 1;
                    if want.waiters == 0 {
                        wanted.remove(&digest);
                    }
                }
                return come.map(Come::Bytes);
            }
            wanted = self
                .changed
                .wait_timeout(wanted, LOOK_UP)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// A verified chunk has come; `store` is done before anybody can begin to wait for it.
    pub(super) fn come<T>(&self, digest: &Digest, bytes: &Bytes, store: impl FnOnce() -> T) -> T {
        let mut wanted = self.lock();
        if let Some(want) = wanted.get_mut(digest) {
            want.bytes = Some(bytes.clone());
            self.changed.notify_all();
        }
        store()
    }

    /// Has those look up whose export may be closed.
    pub(super) fn nudge(&self) {
        let _wanted = self.lock();
        self.changed.notify_all();
    }

    /// Whether somebody waits for the chunk still.
    pub(super) fn is_wanted(&self, digest: &Digest) -> bool {
        let wanted = self.lock();
        wanted.get(digest).is_some_and(|want| want.bytes.is_none())
    }

    /// Says why a chunk does not come.
    pub(super) fn explain(&self, digest: &Digest, problem: String) {
        if let Some(want) = self.lock().get_mut(digest) {
            want.problem = Some(problem);
        }
    }

    /// What is waited for, of these chunks.
    pub(super) fn waiting(&self, among: impl Fn(&Digest) -> bool) -> Vec<Waiting> {
        let wanted = self.lock();
        let waiting = wanted
            .iter()
            .filter(|(digest, want)| want.bytes.is_none() && among(digest));
        waiting
            .map(|(digest, want)| Waiting {
                digest: *digest,
                since: want.since.elapsed(),
                problem: want.problem.clone(),
            })
            .collect()
    }
}

/// How a wait ended.
#[derive(Debug)]
pub(super) enum Come {
    /// With the chunk.
    Bytes(Bytes),
    /// It is here: look again.
    Look,
}
