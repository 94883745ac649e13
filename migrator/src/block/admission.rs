//! Which requests are under way, holding new ones up, and closing.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::DiskError;

/// Counts the requests of clients.
#[derive(Debug, Default)]
pub(super) struct Admission {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    under_way: u64,
    /// How many hold new requests up.
    holds: u64,
    closed: bool,
}

/// A request that is under way.
#[derive(Debug)]
pub struct Admitted<'a>(&'a Admission);

/// Nothing is under way, and nothing new begins, until this is dropped.
#[derive(Debug)]
pub struct Quiet(Arc<Admission>);

impl Admission {
    /// Begins a request; waits while they are held up.
    pub(super) fn admit(&self) -> Result<Admitted<'_>, DiskError> {
        let mut state = self.lock();
        while state.holds > 0 && !state.closed {
            state = self.wait(state);
        }
        if state.closed {
            return Err(DiskError::Closed);
        }
        state.under_way += 1;
        Ok(Admitted(self))
    }

    pub(super) fn quiesce(self: &Arc<Self>, within: Duration) -> Result<Quiet, DiskError> {
        let until = Instant::now() + within;
        let mut state = self.lock();
        state.holds += 1;
        let quiet = Quiet(Arc::clone(self));
        while state.under_way > 0 {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let under_way = state.under_way;
                // Its drop takes the lock.
                drop(state);
                return Err(DiskError::Busy { under_way });
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        drop(state);
        Ok(quiet)
    }

    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is one number: whole in any case.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Admitted<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.under_way -= 1;
        if state.under_way == 0 && state.holds > 0 {
            self.0.changed.notify_all();
        }
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        self.0.lock().holds -= 1;
        self.0.changed.notify_all();
    }
}
