//! A set of pages, one bit each. Pure.

use vm_runtime::units::PageRange;

/// Pages that are still to be sent.
#[derive(Clone, Debug, Default)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
    count: u64,
}

impl PageSet {
    /// An empty set for RAM of `pages` pages.
    pub fn new(pages: u64) -> Self {
        Self {
            words: vec![0; pages.div_ceil(64) as usize],
            pages,
            count: 0,
        }
    }

    /// Adds the pages of `range` that lie within RAM.
    pub fn insert(&mut self, range: PageRange) {
        for page in range.start.0..range.end.0.min(self.pages) {
            let bit = 1 << (page % 64);
            let word = &mut self.words[(page / 64) as usize];
            self.count += u64::from(*word & bit == 0);
            *word |= bit;
        }
    }

    /// How many pages it holds.
    pub fn len(&self) -> u64 {
        self.count
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The pages of `ranges` that it holds, in the order of `ranges`.
    pub fn intersection(&self, ranges: &[PageRange]) -> Vec<PageRange> {
        let mut out: Vec<PageRange> = Vec::new();
        for range in ranges {
            for page in range.start.0..range.end.0.min(self.pages) {
                if self.words[(page / 64) as usize] >> (page % 64) & 1 == 0 {
                    continue;
                }
                match out.last_mut() {
                    Some(last) if last.end.0 == page => last.end.0 += 1,
                    Some(_) | None => out.push(PageRange::new(page, page + 1)),
                }
            }
        }
        out
    }

    /// The pages that it holds and `other` does not, as ranges in order that do not touch. Both are sets of the same RAM.
    pub fn minus(&self, other: &Self) -> Vec<PageRange> {
        let mut left = self.clone();
        for (word, other) in left.words.iter_mut().zip(&other.words) {
            *word &= !other;
        }
        left.take()
    }

    /// Its words of 64 pages, lowest bit first.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Takes everything out, as ranges in order that do not touch.
    pub fn take(&mut self) -> Vec<PageRange> {
        let mut out: Vec<PageRange> = Vec::new();
        for (index, word) in self.words.iter_mut().enumerate() {
            let mut bits = std::mem::take(word);
            while bits != 0 {
                let page = index as u64 * 64 + u64::from(bits.trailing_zeros());
                bits &= bits - 1;
                match out.last_mut() {
                    Some(last) if last.end.0 == page => last.end.0 += 1,
                    Some(_) | None => out.push(PageRange::new(page, page + 1)),
                }
            }
        }
        self.count = 0;
        out
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_goes_in_comes_out_once_and_in_order(ranges in prop::collection::vec((0u64..500, 0u64..90), 0..30)) {
            let mut set = PageSet::new(512);
            let mut model = BTreeSet::new();
            for (start, len) in ranges {
                set.insert(PageRange::new(start, start + len));
                model.extend((start..start + len).filter(|page| *page < 512));
            }
            prop_assert_eq!(set.len(), model.len() as u64);
            let half = [PageRange::new(0, 100), PageRange::new(200, 300)];
            let within: Vec<u64> = set.intersection(&half).iter().flat_map(|r| r.start.0..r.end.0).collect();
            let expected: Vec<u64> = model.iter().copied().filter(|p| *p < 100 || (200..300).contains(p)).collect();
            prop_assert_eq!(&within, &expected);
            let mut other = PageSet::new(512);
            half.iter().for_each(|range| other.insert(*range));
            let without: Vec<u64> = set.minus(&other).iter().flat_map(|r| r.start.0..r.end.0).collect();
            let rest: Vec<u64> = model.iter().copied().filter(|p| !expected.contains(p)).collect();
            prop_assert_eq!(without, rest);
            let bits: u32 = set.words().iter().map(|word| word.count_ones()).sum();
            prop_assert_eq!(u64::from(bits), set.len());
            let out = set.take();
            prop_assert!(out.windows(2).all(|pair| pair[0].end.0 < pair[1].start.0));
            let pages: Vec<u64> = out.iter().flat_map(|r| r.start.0..r.end.0).collect();
            prop_assert_eq!(pages, model.into_iter().collect::<Vec<_>>());
            prop_assert!(set.is_empty() && set.take().is_empty());
        }
    }
}
