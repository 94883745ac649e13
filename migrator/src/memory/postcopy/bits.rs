//! A set of pages that threads change without a lock, one bit each. Compiled twice: for use, and for the tests in `model.rs`.

use vm_runtime::units::{PageIndex, PageRange};

use super::sync::{AtomicU64, Ordering};

/// Pages 0 to a fixed number.
#[derive(Debug)]
pub(super) struct Bits {
    words: Vec<AtomicU64>,
    pages: u64,
}

impl Bits {
    /// An empty set of pages below `pages`.
    pub(super) fn new(pages: u64) -> Self {
        Self {
            words: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            pages,
        }
    }

    /// Puts pages in that are below the limit; how many were not.
    pub(super) fn insert(&self, range: PageRange) -> u64 {
        let mut new = 0;
        self.each_word(range, |word, mask| {
            let before = word.fetch_or(mask, Ordering::SeqCst);
            new += u64::from((mask & !before).count_ones());
        });
        new
    }

    /// Takes pages out; how many were in. `after` gets each word as it was left, in order.
    pub(super) fn remove(&self, range: PageRange, mut after: impl FnMut(u64)) -> u64 {
        let mut removed = 0;
        self.each_word(range, |word, mask| {
            let before = word.fetch_and(!mask, Ordering::SeqCst);
            removed += u64::from((before & mask).count_ones());
            after(before & !mask);
        });
        removed
    }

    /// Whether it holds a page.
    pub(super) fn contains(&self, page: PageIndex) -> bool {
        let word = self.words.get((page.0 / 64) as usize);
        word.is_some_and(|word| word.load(Ordering::SeqCst) >> (page.0 % 64) & 1 == 1)
    }

    /// Takes everything out.
    pub(super) fn clear(&self) {
        for word in &self.words {
            word.store(0, Ordering::SeqCst);
        }
    }

    /// Its words, lowest bit first.
    pub(super) fn words(&self) -> Vec<u64> {
        self.words
            .iter()
            .map(|word| word.load(Ordering::SeqCst))
            .collect()
    }

    /// Makes its words these; how many pages they hold.
    pub(super) fn set_words(&self, words: impl Iterator<Item = u64>) -> u64 {
        let mut count = 0;
        for (slot, word) in self.words.iter().zip(words) {
            slot.store(word, Ordering::SeqCst);
            count += u64::from(word.count_ones());
        }
        count
    }

    fn each_word(&self, range: PageRange, mut part: impl FnMut(&AtomicU64, u64)) {
        let end = range.end.0.min(self.pages);
        let mut at = range.start.0;
        while at < end {
            let word_end = (at / 64 + 1) * 64;
            let len = end.min(word_end) - at;
            let mask = (u64::MAX >> (64 - len)) << (at % 64);
            part(&self.words[(at / 64) as usize], mask);
            at += len;
        }
    }
}
