//! How much the disks of a pod may have dirty together: writes beyond it wait for the mover.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};

use super::DiskError;
use super::dirty::Dirty;

/// A limit, and who waits for it.
#[derive(Debug)]
pub(super) struct Shared {
    bytes: u64,
    of: Vec<Arc<Dirty>>,
    waiting: Mutex<()>,
    changed: Condvar,
}

impl Shared {
    pub(super) fn new(bytes: u64, of: Vec<Arc<Dirty>>) -> Self {
        Self {
            bytes,
            of,
            waiting: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn is_over(&self) -> bool {
        self.of.iter().map(|dirty| dirty.bytes()).sum::<u64>() > self.bytes
    }

    fn wake(&self) {
        // With the lock: whoever has looked, and not begun to wait, would miss it otherwise.
        drop(self.lock());
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The limit that a disk is under.
#[derive(Debug, Default)]
pub(super) struct Limit(RwLock<Option<Arc<Shared>>>);

impl Limit {
    pub(super) fn is_none(&self) -> bool {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .is_none()
    }

    /// Replaces it.
    pub(super) fn set(&self, limit: Option<Arc<Shared>>) {
        let mut current = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *current, limit);
        drop(current);
        if let Some(before) = before {
            before.wake();
        }
    }

    /// Waits while there are more dirty bytes than it allows.
    pub(super) fn wait(&self, is_closed: impl Fn() -> bool) -> Result<(), DiskError> {
        while let Some(limit) = self.current().filter(|limit| limit.is_over()) {
            let waiting = limit.lock();
            if is_closed() {
                return Err(DiskError::Closed);
            }
            let is_this = |current: Arc<Shared>| Arc::ptr_eq(&current, &limit);
            if limit.is_over() && self.current().is_some_and(is_this) {
                drop(
                    limit
                        .changed
                        .wait(waiting)
                        .unwrap_or_else(PoisonError::into_inner),
                );
            }
        }
        Ok(())
    }

    /// There are fewer dirty bytes, or the disk is closed.
    pub(super) fn changed(&self) {
        if let Some(limit) = self.current() {
            limit.wake();
        }
    }

    fn current(&self) -> Option<Arc<Shared>> {
        // One pointer, whole in any case.
        let current = self.0.read().unwrap_or_else(PoisonError::into_inner);
        current.clone()
    }
}
