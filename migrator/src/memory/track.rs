//! What the source still has to send: the dirty tracker and the pending pages, behind one lock.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use std::time::Instant;

use vm_runtime::memory::{DirtyError, DirtyTracker};
use vm_runtime::units::PageRange;
use vm_runtime::vm::Vm;

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
    pending: PageSet,
    /// The pages that a scan found, by scan, the latest last.
    written: Vec<Vec<PageRange>>,
    scanned_at: Option<Instant>,
}

/// Scans whose pages count as hot.
const HOT_SCANS: usize = 8;

impl Tracking {
    /// Nothing is tracked and nothing pending yet.
    pub fn new(pages: u64) -> Self {
        Self {
            inner: Arc::new(Mutex::new(Inner {
                tracker: None,
                pending: PageSet::new(pages),
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
        for range in memory.data_ranges()? {
            inner.pending.insert(range);
        }
        Ok(())
    }

    /// Adds what was written since the last scan. Returns the pages that this scan found, and those
    /// pending in all.
    ///
    /// # Errors
    /// See [`TrackError`].
    pub fn scan(&self) -> Result<(u64, u64), TrackError> {
        let (found, pending) = self.scan_ranges()?;
        Ok((super::shard::count(&found), pending))
    }

    /// As [`Self::scan`]; returns the pages themselves.
    ///
    /// # Errors
    /// See [`TrackError`].
    pub fn scan_ranges(&self) -> Result<(Vec<PageRange>, u64), TrackError> {
        let mut inner = self.lock();
        inner.scanned_at = Some(Instant::now());
        let tracker = inner.tracker.as_mut().ok_or(TrackError::NotTracked)?;
        let found = tracker.scan()?;
        for range in &found {
            inner.pending.insert(*range);
        }
        if inner.written.len() == HOT_SCANS {
            inner.written.remove(0);
        }
        inner.written.push(found.clone());
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
