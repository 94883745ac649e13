//! How much may be dirty: writes beyond it wait for the mover.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::DiskError;

/// The limit, and who waits for it.
#[derive(Debug)]
pub(super) struct Limit {
    /// `u64::MAX` without a limit: for the common case.
    bytes: AtomicU64,
    closed: Mutex<bool>,
    changed: Condvar,
}

impl Limit {
    pub(super) fn none() -> Self {
        Self {
            bytes: AtomicU64::new(u64::MAX),
            closed: Mutex::new(false),
            changed: Condvar::new(),
        }
    }

    pub(super) fn set(&self, bytes: Option<u64>) {
        let closed = self.lock();
        self.bytes
            .store(bytes.unwrap_or(u64::MAX), Ordering::SeqCst);
        drop(closed);
        self.changed.notify_all();
    }

    /// Waits while there are more dirty bytes than the limit allows.
    pub(super) fn wait(&self, dirty: impl Fn() -> u64) -> Result<(), DiskError> {
        let over = || {
            let limit = self.bytes.load(Ordering::SeqCst);
            limit != u64::MAX && dirty() > limit
        };
        if !over() {
            return Ok(());
        }
        let mut closed = self.lock();
        while !*closed && over() {
            closed = self
                .changed
                .wait(closed)
                .unwrap_or_else(PoisonError::into_inner);
        }
        match *closed {
            true => Err(DiskError::Closed),
            false => Ok(()),
        }
    }

    /// There are fewer dirty bytes.
    pub(super) fn taken(&self) {
        // With the lock: whoever has looked, and not begun to wait, would miss it otherwise.
        drop(self.lock());
        self.changed.notify_all();
    }

    pub(super) fn close(&self) {
        *self.lock() = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.closed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
