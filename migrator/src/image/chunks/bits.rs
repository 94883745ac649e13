//! A set of chunk indices that many threads add to.

use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Debug)]
pub(super) struct Bits(Vec<AtomicU64>);

impl Bits {
    pub(super) fn new(len: usize) -> Self {
        Self((0..len.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    /// Adds an index; whether it is new. One past the end never is.
    pub(super) fn insert(&self, index: u32) -> bool {
        let bit = 1 << (index % 64);
        let Some(word) = self.0.get(index as usize / 64) else {
            return false;
        };
        // Read first: nearly every read of a chunk finds it marked, and writes nothing.
        word.load(Ordering::Relaxed) & bit == 0 && word.fetch_or(bit, Ordering::Relaxed) & bit == 0
    }
}
