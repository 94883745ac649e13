//! Who waits for which page, and since when. Compiled twice: for use, and for the tests in `model.rs`.
//!
//! A wait is noted by one thread and ended by another, and the page may come in between: so whoever notes a wait looks once more
//! whether the page is missing, and whoever places a page ends its waits once more after it has left the set.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use vm_runtime::units::{PageIndex, PageRange};

use super::sync::{Mutex, MutexGuard, PoisonError};

/// The waits that are not over.
#[derive(Debug, Default)]
pub(super) struct Waits {
    since: Mutex<HashMap<PageIndex, Instant>>,
}

impl Waits {
    fn lock(&self) -> MutexGuard<'_, HashMap<PageIndex, Instant>> {
        // Every change is one call on the map.
        self.since.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody waits for a page. Returns whether it is missing, and thus has to come; `over` gets the length of a wait that is
    /// over already.
    pub(super) fn begin(
        &self,
        page: PageIndex,
        is_missing: impl Fn() -> bool,
        over: impl FnMut(Duration),
    ) -> bool {
        if !is_missing() {
            return false;
        }
        self.lock().entry(page).or_insert_with(Instant::now);
        if is_missing() {
            return true;
        }
        self.end(PageRange::new(page.0, page.0 + 1), over);
        false
    }

    /// Pages are in place: `leave` takes them out of the missing ones. `over` gets the length of each wait that this ends.
    pub(super) fn placed<T>(
        &self,
        range: PageRange,
        leave: impl FnOnce() -> T,
        mut over: impl FnMut(Duration),
    ) -> T {
        self.end(range, &mut over);
        let left = leave();
        self.end(range, over);
        left
    }

    fn end(&self, range: PageRange, mut over: impl FnMut(Duration)) {
        let mut since = self.lock();
        if since.is_empty() {
            return;
        }
        for page in range.start.0..range.end.0 {
            if let Some(began) = since.remove(&PageIndex(page)) {
                over(began.elapsed());
            }
        }
    }

    /// Waits that are not over.
    #[cfg(test)]
    #[allow(dead_code, reason = "only the model asks")]
    pub(super) fn len(&self) -> usize {
        self.lock().len()
    }
}
