//! What the source still has to send: the dirty tracker and the pending pages, behind one lock.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use std::time::Instant;

use vm_runtime::memory::{DirtyError, DirtyTracker, GuestMemory};
use vm_runtime::units::PageRange;
use vm_runtime::vm::Vm;

use super::holes::DataPages;
pub use super::holes::Holes;
use super::pageset::PageSet;

/// Why tracking failed.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The kernel refused.
    #[error("the guest's memory cannot be tracked")]
    Dirty(#[from] DirtyError),
    /// The RAM file could not be read.
    #[error("the guest's RAM file cannot be read")]
    Memory(#[from] std::io::Error),
    /// A scan before tracking began, or after it ended.
    #[error("the guest's memory is not tracked")]
    NotTracked,
}

/// Tracks one guest's memory. All calls block for milliseconds at most: call them from `spawn_blocking`.
#[derive(Clone, Debug)]
pub struct Tracking {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    tracker: Option<DirtyTracker>,
    memory: Option<Arc<GuestMemory>>,
    pending: PageSet,
    data: DataPages,
    /// The pages that a scan found, by scan, the latest last.
    written: Vec<Vec<PageRange>>,
    scanned_at: Option<Instant>,
}

/// Scans whose pages count as hot.
const HOT_SCANS: usize = 8;

impl Tracking {
    /// Nothing is tracked and nothing pending yet.
    pub fn new(pages: u64, holes: Holes) -> Self {
        Self {
            inner: Arc::new(Mutex::new(Inner {
                tracker: None,
                memory: None,
                pending: PageSet::new(pages),
                data: DataPages::new(pages, holes),
                written: Vec::new(),
                scanned_at: None,
            })),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Write-protects the guest's memory. From here on every page that is not a hole is pending.
    ///
    /// # Errors
    /// See [`TrackError`]; the guest runs untracked then.
    pub fn start(&self, vm: &Vm) -> Result<(), TrackError> {
        let mut inner = self.lock();
        let memory = vm.memory();
        inner.tracker = Some(DirtyTracker::start(vm.uffd(), vm.pid(), &memory)?);
        // After the protection: a page that is first written later shows in a scan.
        for range in inner.data.begin(&memory)? {
            inner.pending.insert(range);
        }
        inner.memory = Some(memory);
        Ok(())
    }

    /// Adds what was written since the last scan, and what has become a hole. Returns the pages that this scan
    /// found written, and those pending in all.
    ///
    /// # Errors
    /// See [`TrackError`].
    pub fn scan(&self) -> Result<(u64, u64), TrackError> {
        let mut inner = self.lock();
        let (written, _) = inner.scan()?;
        Ok((super::shard::count(&written), inner.pending.len()))
    }

    /// As [`Self::scan`]; returns all the pages that it found.
    ///
    /// # Errors
    /// See [`TrackError`].
    pub fn scan_ranges(&self) -> Result<(Vec<PageRange>, u64), TrackError> {
        let mut inner = self.lock();
        let (mut found, punched) = inner.scan()?;
        found.extend(punched);
        Ok((found, inner.pending.len()))
    }

    /// The pending pages, which stay pending.
    pub fn pending_ranges(&self) -> Vec<PageRange> {
        self.lock().pending.clone().take()
    }

    /// The pending pages, by how lately they were written, the latest first: for [`super::postcopy::PushQueue`]. A page
    /// may be in several classes.
    pub fn by_heat(&self) -> Vec<Vec<PageRange>> {
        let inner = self.lock();
        // What was written and sent since is not pending.
        let hot = inner
            .written
            .iter()
            .rev()
            .map(|ranges| inner.pending.intersection(ranges));
        let mut classes: Vec<_> = hot.collect();
        classes.push(inner.pending.clone().take());
        classes
    }

    /// When the last scan began.
    pub fn scanned_at(&self) -> Option<Instant> {
        self.lock().scanned_at
    }

    /// Takes the pending pages.
    pub fn take(&self) -> Vec<PageRange> {
        self.lock().pending.take()
    }

    /// Ends the tracking, if it was on: the guest's writes cost nothing extra from here on.
    pub fn stop(&self) {
        if let Some(tracker) = self.lock().tracker.take() {
            tracker.stop();
        }
    }

    /// Pages that are still to be sent, as last counted.
    pub fn pending(&self) -> u64 {
        // A scan holds the lock for a millisecond or two.
        self.lock().pending.len()
    }
}

impl Inner {
    /// The pages that were written since the last scan, and those that have become holes; all are pending now.
    fn scan(&mut self) -> Result<(Vec<PageRange>, Vec<PageRange>), TrackError> {
        self.scanned_at = Some(Instant::now());
        let (Some(tracker), Some(memory)) = (&mut self.tracker, &self.memory) else {
            return Err(TrackError::NotTracked);
        };
        let written = tracker.scan()?;
        let punched = self.data.scanned(memory, &written)?;
        for range in written.iter().chain(&punched) {
            self.pending.insert(*range);
        }
        if self.written.len() == HOT_SCANS {
            self.written.remove(0);
        }
        self.written.push(written.clone());
        Ok((written, punched))
    }
}
