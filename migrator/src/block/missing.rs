//! Granules that are not here yet: who needs one waits, and has it asked for.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc;

use super::DiskError;
use super::granule::{Extent, GRANULE, extents, place, words};

/// The set of missing granules.
#[derive(Debug)]
pub(super) struct Missing {
    /// How many, for the common case of none: changed under the lock.
    count: AtomicU64,
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct State {
    bits: Vec<u64>,
    /// Those that were asked for.
    asked: Vec<u64>,
    wanted: Option<mpsc::UnboundedSender<Extent>>,
    closed: bool,
}

impl State {
    fn has(&self, granule: u64) -> bool {
        let (word, bit) = place(granule);
        self.bits.get(word).is_some_and(|word| word & bit != 0)
    }

    /// True if it was missing.
    fn clear(&mut self, granule: u64) -> bool {
        let (word, bit) = place(granule);
        let Some(word) = self.bits.get_mut(word) else {
            return false;
        };
        let was = *word & bit != 0;
        *word &= !bit;
        was
    }

    fn ask(&mut self, granule: u64) {
        let (word, bit) = place(granule);
        let Some(word) = self.asked.get_mut(word) else {
            return;
        };
        if *word & bit == 0 {
            *word |= bit;
            if let Some(wanted) = &self.wanted {
                // A mover that is gone leaves whoever waits waiting, until the disk is closed or expected anew.
                let _ = wanted.send(Extent {
                    offset: granule * GRANULE,
                    len: GRANULE,
                });
            }
        }
    }
}

impl Missing {
    pub(super) fn none() -> Self {
        Self {
            count: AtomicU64::new(0),
            state: Mutex::default(),
            arrived: Condvar::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    pub(super) fn bytes(&self) -> u64 {
        self.count.load(Ordering::Acquire) * GRANULE
    }

    /// What is missing, in order.
    pub(super) fn extents(&self) -> Vec<Extent> {
        extents(self.lock().bits.iter().copied())
    }

    /// Replaces the set. Whoever waits already has his granules asked for anew.
    pub(super) fn expect(&self, size: u64, missing: &[Extent]) -> mpsc::UnboundedReceiver<Extent> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut state = self.lock();
        let mut bits = vec![0_u64; words(size)];
        for granule in missing.iter().flat_map(|extent| extent.touched()) {
            let (word, bit) = place(granule);
            if let Some(word) = bits.get_mut(word) {
                *word |= bit;
            }
        }
        let count = bits.iter().map(|word| u64::from(word.count_ones())).sum();
        state.asked = vec![0; bits.len()];
        state.bits = bits;
        state.wanted = Some(sender);
        self.count.store(count, Ordering::Release);
        drop(state);
        self.arrived.notify_all();
        receiver
    }

    /// Waits until everything that the range touches is here.
    pub(super) fn need(&self, extent: Extent) -> Result<(), DiskError> {
        match self.is_empty() {
            true => Ok(()),
            false => self.wait(extent, |_| true).map(drop),
        }
    }

    /// Runs `write`, which overwrites the range; granules that it covers by half are waited for, those that it covers whole are present
    /// afterwards. Nothing is supplied meanwhile.
    pub(super) fn overwrite<T>(
        &self,
        extent: Extent,
        write: impl FnOnce() -> Result<T, DiskError>,
    ) -> Result<T, DiskError> {
        if self.is_empty() {
            return write();
        }
        let covered = extent.covered();
        let mut state = self.wait(extent, |granule| !covered.contains(&granule))?;
        let done = write()?;
        let cleared = extent.covered().filter(|g| state.clear(*g)).count() as u64;
        self.count.fetch_sub(cleared, Ordering::Release);
        drop(state);
        self.arrived.notify_all();
        Ok(done)
    }

    /// Runs `place` for the granule if it is still missing. False if it was not.
    pub(super) fn supply(
        &self,
        granule: u64,
        place: impl FnOnce() -> Result<(), DiskError>,
    ) -> Result<bool, DiskError> {
        let mut state = self.lock();
        if !state.has(granule) {
            return Ok(false);
        }
        place()?;
        state.clear(granule);
        self.count.fetch_sub(1, Ordering::Release);
        drop(state);
        self.arrived.notify_all();
        Ok(true)
    }

    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.arrived.notify_all();
    }

    fn wait(
        &self,
        extent: Extent,
        needed: impl Fn(u64) -> bool,
    ) -> Result<MutexGuard<'_, State>, DiskError> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return Err(DiskError::Closed);
            }
            let mut complete = true;
            for granule in extent.touched().filter(|g| needed(*g)) {
                if state.has(granule) {
                    state.ask(granule);
                    complete = false;
                }
            }
            if complete {
                return Ok(state);
            }
            state = self
                .arrived
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A bit is cleared after its data is there: a panic in between leaves it missing, which is right.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
