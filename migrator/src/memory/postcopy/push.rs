//! In which order the source sends what nobody has asked for yet.
//!
//! Each page leaves the queue once, be it pushed or served to somebody who waits. First what lies around the pages that were
//! asked for: a guest that reads one page goes on to the next. Then the hottest: what was written last will be wanted first.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_runtime::units::{PageIndex, PageRange};

/// Pages of one piece: small, because a page that somebody waits for may have to wait for a piece.
const PIECE_PAGES: u64 = 32;
/// Pages that follow one that was asked for at once, on the same connection.
const AHEAD: u64 = 7;
/// Pages around one that was asked for which go before all others: half of a piece before it, and two behind.
const WINDOW: (u64, u64) = (PIECE_PAGES / 2, PIECE_PAGES * 2);
/// Windows that are remembered: of more, the latest count.
const WINDOWS: usize = 64;

/// What is still to be sent, in order. Shared by the connections.
#[derive(Debug)]
pub struct PushQueue {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    left: Vec<u64>,
    count: u64,
    pages: u64,
    /// Ranges whose pages go first, the latest first.
    windows: VecDeque<PageRange>,
    /// The others, the next one last.
    order: Vec<PageRange>,
}

impl PushQueue {
    /// A queue for a guest of `pages` pages: `classes` of ranges, hottest first, and in each as given. A page counts in the first
    /// class that has it.
    pub fn new(pages: u64, classes: &[Vec<PageRange>]) -> Self {
        let mut left = vec![0u64; pages.div_ceil(64) as usize];
        let mut count = 0;
        let mut order = Vec::new();
        for range in classes.iter().flatten() {
            let range = PageRange::new(range.start.0, range.end.0.min(pages));
            for page in range.start.0..range.end.0 {
                let (word, mask) = (&mut left[(page / 64) as usize], 1 << (page % 64));
                count += u64::from(*word & mask == 0);
                *word |= mask;
            }
            order.push(range);
        }
        order.reverse();
        let inner = Inner {
            left,
            count,
            pages,
            windows: VecDeque::new(),
            order,
        };
        Self {
            inner: Mutex::new(inner),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Between its changes nothing can panic that would leave the set and the count apart.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next consecutive pages to send, [`PIECE_PAGES`] at most; `None` when nothing is left.
    pub fn next(&self) -> Option<PageRange> {
        let mut inner = self.lock();
        while let Some(window) = inner.windows.pop_front() {
            if let Some((piece, rest)) = inner.take(window) {
                inner.windows.push_front(rest);
                return Some(piece);
            }
        }
        while let Some(range) = inner.order.pop() {
            if let Some((piece, rest)) = inner.take(range) {
                inner.order.push(rest);
                return Some(piece);
            }
        }
        None
    }

    /// Somebody waits for a page, which is sent now. Returns what to send right behind it: up to [`AHEAD`] pages that follow it. What
    /// else lies around it is pushed next.
    pub fn wanted(&self, page: PageIndex) -> Option<PageRange> {
        let mut inner = self.lock();
        if page.0 >= inner.pages {
            return None;
        }
        let (word, mask) = ((page.0 / 64) as usize, 1 << (page.0 % 64));
        if inner.left[word] & mask != 0 {
            inner.left[word] &= !mask;
            inner.count -= 1;
        }
        let (before, behind) = WINDOW;
        let end = (page.0 + behind).min(inner.pages);
        // What follows comes first.
        inner
            .windows
            .push_front(PageRange::new(page.0.saturating_sub(before), page.0));
        inner.windows.push_front(PageRange::new(page.0, end));
        inner.windows.truncate(WINDOWS);
        let ahead = (page.0 + 1 + AHEAD).min(inner.pages);
        let following = PageRange::new(page.0 + 1, ahead);
        inner.take(following).map(|(piece, _)| piece)
    }

    /// Pages that are still to be sent.
    pub fn left(&self) -> u64 {
        self.lock().count
    }
}

impl Inner {
    /// Takes the first consecutive pages of `range` that are left; and what follows them in the range.
    fn take(&mut self, range: PageRange) -> Option<(PageRange, PageRange)> {
        let is_left = |left: &[u64], page: u64| left[(page / 64) as usize] >> (page % 64) & 1 == 1;
        let mut start = range.start.0;
        while start < range.end.0 && !is_left(&self.left, start) {
            // Whole words that are empty are passed over at once.
            let empty = start.is_multiple_of(64) && self.left[(start / 64) as usize] == 0;
            start += if empty { 64 } else { 1 };
        }
        if start >= range.end.0 {
            return None;
        }
        let mut end = start;
        while end < range.end.0 && end - start < PIECE_PAGES && is_left(&self.left, end) {
            self.left[(end / 64) as usize] &= !(1 << (end % 64));
            end += 1;
        }
        self.count -= end - start;
        Some((PageRange::new(start, end), PageRange::new(end, range.end.0)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_page_leaves_once_be_it_pushed_or_wanted(
            ranges in prop::collection::vec((0u64..500, 0u64..90), 0..20),
            wanted in prop::collection::vec((0usize..20, 0u64..600), 0..20),
        ) {
            let ranges: Vec<_> = ranges.into_iter().map(|(start, len)| PageRange::new(start, start + len)).collect();
            let (hot, cold) = ranges.split_at(ranges.len() / 2);
            let queue = PushQueue::new(512, &[hot.to_vec(), cold.to_vec()]);
            let mut expected: Vec<u64> = ranges.iter().flat_map(|r| r.start.0..r.end.0).filter(|p| *p < 512).collect();
            expected.sort_unstable();
            expected.dedup();
            prop_assert_eq!(queue.left(), expected.len() as u64);
            let mut left = Vec::new();
            let mut turn = 0;
            loop {
                for (_, page) in wanted.iter().filter(|(at, _)| *at == turn) {
                    let before = queue.left();
                    let ahead = queue.wanted(PageIndex(*page)).map_or(0..0, |r| r.start.0..r.end.0);
                    if queue.left() + (ahead.end - ahead.start) < before {
                        left.push(*page);
                    }
                    left.extend(ahead);
                }
                turn += 1;
                match queue.next() {
                    Some(piece) => {
                        prop_assert!(!piece.is_empty() && piece.len() <= PIECE_PAGES);
                        left.extend(piece.start.0..piece.end.0);
                    }
                    None if turn > 20 => break,
                    None => {}
                }
            }
            left.sort_unstable();
            prop_assert_eq!(left, expected);
            prop_assert_eq!(queue.left(), 0);
        }
    }

    #[test]
    fn the_hottest_go_first_and_what_lies_behind_a_wanted_page_before_them() {
        let classes = [vec![PageRange::new(400, 410)], vec![PageRange::new(0, 400)]];
        let queue = PushQueue::new(512, &classes);
        assert_eq!(queue.wanted(PageIndex(100)), Some(PageRange::new(101, 108)));
        assert_eq!(queue.next(), Some(PageRange::new(108, 140)));
        assert_eq!(queue.next(), Some(PageRange::new(140, 164)));
        assert_eq!(queue.next(), Some(PageRange::new(84, 100)));
        assert_eq!(queue.next(), Some(PageRange::new(400, 410)));
        assert_eq!(queue.next(), Some(PageRange::new(0, 32)));
    }
}
