//! What keeps an image from being cleared away: who is about to use it, and leases.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::digest::Digest;

/// Images by their bytes, each with the number of those who are about to use it. It ends with the process, as they do.
#[derive(Debug, Default)]
pub(super) struct Holds(Mutex<BTreeMap<Digest, usize>>);

/// Keeps images from being cleared away until it is dropped: between finding an image and the pod's being
/// registered, nothing else says that it is needed.
#[derive(Debug)]
pub struct ImageHold {
    holds: Arc<Holds>,
    digests: Vec<Digest>,
}

impl Holds {
    pub(super) fn hold(self: &Arc<Self>, digests: Vec<Digest>) -> ImageHold {
        let mut counts = self.counts();
        for digest in &digests {
            *counts.entry(*digest).or_default() += 1;
        }
        drop(counts);
        ImageHold {
            holds: Arc::clone(self),
            digests,
        }
    }

    pub(super) fn has(&self, digest: &Digest) -> bool {
        self.counts().contains_key(digest)
    }

    fn counts(&self) -> MutexGuard<'_, BTreeMap<Digest, usize>> {
        // Counters, each changed at once: a panic leaves them whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ImageHold {
    fn drop(&mut self) {
        let mut counts = self.holds.counts();
        for digest in &self.digests {
            if let Some(count) = counts.get_mut(digest) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(digest);
                }
            }
        }
    }
}
