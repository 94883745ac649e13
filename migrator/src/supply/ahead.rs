//! What a VM is about to read, from what it has read: chunks that follow each other are fetched before they are asked for. Pure.
//!
//! They follow each other in the order in which pods used the image before, as far as that is known, and then in the image's own.

use std::ops::Range;

/// Most chunks ahead of a reader: 8 MiB of 256 KiB each. A link of 1 Gbit/s brings them in 70 ms, which bridges the time that one request takes
/// with a registry far away.
const MOST: usize = 32;
/// Chunks that are asked for together, once a reader is that far: they share a request.
const BATCH: usize = 8;
/// Readers that are told apart.
const STREAMS: usize = 8;

/// What is known of the readers of one image.
#[derive(Debug)]
pub(super) struct Ahead {
    /// Chunks by index, in the order in which they follow each other.
    sequence: Vec<u32>,
    /// Of each chunk, its place in that.
    place: Vec<u32>,
    /// The last used one is the last.
    streams: Vec<Stream>,
}

/// A reader. It has read what is before `next`, or that was asked for.
#[derive(Clone, Copy, Debug)]
struct Stream {
    next: usize,
    window: usize,
}

impl Ahead {
    /// For an image of `count` chunks; `order` are those that were used before, each once.
    pub(super) fn new(order: &[u32], count: usize) -> Self {
        let mut place = vec![u32::MAX; count];
        let mut sequence = Vec::with_capacity(count);
        for index in order.iter().copied().chain(0..count as u32) {
            if let Some(free @ &mut u32::MAX) = place.get_mut(index as usize) {
                *free = sequence.len() as u32;
                sequence.push(index);
            }
        }
        Self {
            sequence,
            place,
            streams: Vec::new(),
        }
    }

    /// A chunk is read that is not here; what to fetch beside it.
    pub(super) fn read(&mut self, index: u32) -> &[u32] {
        let at = match self.place.get(index as usize) {
            Some(at) => *at as usize,
            None => return &[],
        };
        let reads = |stream: &Stream| at <= stream.next && at + stream.window >= stream.next;
        let found = self.streams.iter().position(reads);
        let mut stream = match found {
            Some(found) => self.streams.remove(found),
            None => {
                if self.streams.len() == STREAMS {
                    self.streams.remove(0);
                }
                Stream {
                    next: at + 1,
                    window: 1,
                }
            }
        };
        let wanted = match found {
            Some(_) => stream.advance(at, self.sequence.len()),
            None => 0..0,
        };
        self.streams.push(stream);
        &self.sequence[wanted]
    }
}

impl Stream {
    /// The reader is there: the window doubles, and moves on if that is worth a request.
    fn advance(&mut self, at: usize, end: usize) -> Range<usize> {
        self.window = (2 * self.window).min(MOST);
        let from = self.next.max(at + 1);
        let until = (at + 1 + self.window).min(end);
        let few = BATCH.min(self.window / 2);
        if until < from + few && until < end {
            self.next = from;
            return 0..0;
        }
        self.next = until.max(from);
        from..self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_reads_on_has_more_and_more_fetched_ahead_up_to_a_bound() {
        let mut ahead = Ahead::new(&[], 1000);
        assert!(ahead.read(10).is_empty());
        assert_eq!(ahead.read(11), [12, 13]);
        assert_eq!(ahead.read(12), [14, 15, 16]);
        let mut asked = 17;
        for index in 13..500 {
            for next in ahead.read(index) {
                assert_eq!(*next, asked);
                asked += 1;
            }
            assert!(asked <= index + 1 + MOST as u32);
        }
        assert!(asked as usize > 500 + MOST - BATCH);
    }

    #[test]
    fn a_reader_that_finds_everything_there_goes_on_behind_it() {
        let mut ahead = Ahead::new(&[], 1000);
        for index in 0..8 {
            ahead.read(index);
        }
        let next = ahead.streams[0].next as u32;
        assert!(next > 20);
        assert_eq!(ahead.read(next).first(), Some(&(next + 1)));
    }

    #[test]
    fn reads_here_and_there_fetch_nothing_else() {
        let mut ahead = Ahead::new(&[], 10_000);
        for index in (0..10_000).step_by(97) {
            assert!(ahead.read(index).is_empty());
        }
    }

    #[test]
    fn readers_of_two_files_are_told_apart_and_the_end_is_the_end() {
        let mut ahead = Ahead::new(&[], 100);
        assert!(ahead.read(0).is_empty());
        assert!(ahead.read(97).is_empty());
        assert_eq!(ahead.read(1), [2, 3]);
        assert_eq!(ahead.read(98), [99]);
        assert!(ahead.read(99).is_empty());
        assert!(ahead.read(100).is_empty());
        assert_eq!(ahead.read(2), [4, 5, 6]);
    }

    #[test]
    fn the_order_of_use_comes_before_the_images_own() {
        // One that the image does not have, and one twice, are left out.
        let mut ahead = Ahead::new(&[50, 7, 30, 7, 200, 9], 100);
        assert!(ahead.read(50).is_empty());
        assert_eq!(ahead.read(7), [30, 9]);
        assert_eq!(ahead.read(30), [0, 1, 2]);
        assert_eq!(ahead.sequence.len(), 100);
    }
}
