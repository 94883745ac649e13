//! Which granules were written since the mover asked last.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use super::granule::{Extent, GRANULE, extents, place, words};

/// One period of tracking: a mover that was replaced by another cannot take what is the other's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generation(u64);

/// Somebody else tracks the disk by now: begin again, with all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the disk's writes are tracked anew since: what was written before that is not known")]
pub struct StaleGeneration;

/// The marks. They are always set: what a mark costs is less than asking whether anybody wants it.
#[derive(Debug)]
pub(super) struct Dirty {
    words: Box<[AtomicU64]>,
    /// Marks that are set; for a moment less, while somebody has set one and not counted it.
    count: AtomicI64,
    /// Of whoever takes; held while he does.
    generation: Mutex<u64>,
}

impl Dirty {
    pub(super) fn new(size: u64) -> Self {
        Self {
            words: (0..words(size)).map(|_| AtomicU64::new(0)).collect(),
            count: AtomicI64::new(0),
            generation: Mutex::new(0),
        }
    }

    /// Call it when the data is in the file, and before the write is answered.
    ///
    /// The set of a bit always writes, also if the bit is set already: only so does a taker that swaps it afterwards see the data too.
    pub(super) fn mark(&self, extent: Extent) {
        for granule in extent.touched() {
            let (word, bit) = place(granule);
            if let Some(word) = self.words.get(word) {
                let before = word.fetch_or(bit, Ordering::AcqRel);
                if before & bit == 0 {
                    self.count.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }

    pub(super) fn start(&self) -> Generation {
        let mut generation = self.lock();
        *generation += 1;
        for word in &self.words {
            self.swap(word);
        }
        Generation(*generation)
    }

    pub(super) fn take(&self, generation: Generation) -> Result<Vec<Extent>, StaleGeneration> {
        let current = self.lock();
        if *current != generation.0 {
            return Err(StaleGeneration);
        }
        Ok(extents(self.words.iter().map(|word| self.swap(word))))
    }

    /// Bytes that a take would give now.
    pub(super) fn bytes(&self) -> u64 {
        self.count.load(Ordering::Relaxed).max(0) as u64 * GRANULE
    }

    fn swap(&self, word: &AtomicU64) -> u64 {
        let taken = word.swap(0, Ordering::AcqRel);
        self.count
            .fetch_sub(i64::from(taken.count_ones()), Ordering::Relaxed);
        taken
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, u64> {
        // A number: whole in any case.
        self.generation
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
