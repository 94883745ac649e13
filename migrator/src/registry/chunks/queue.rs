//! What is wanted of a registry, and who waits for it: each chunk is asked for once, however many want it.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::ranges::{Range, Wanted};
use super::remote::ChunkError;
use crate::image::Digest;

/// What becomes of a chunk.
pub(super) type Answer = Result<Bytes, Arc<ChunkError>>;

/// Chunks that are wanted.
#[derive(Debug, Default)]
pub(super) struct Queue {
    /// Those that no request was made for, in order.
    queued: Vec<Queued>,
    /// Who waits for which, requested or not.
    waiting: HashMap<Digest, Vec<oneshot::Sender<Answer>>>,
}

#[derive(Debug)]
struct Queued {
    wanted: Wanted,
    urgent: bool,
}

impl Queue {
    /// Adds a chunk. True: a further request is to be made. It is new, or whoever wanted it has given up before a request was made, and the one that
    /// was to be may have gone with them.
    pub(super) fn add(
        &mut self,
        wanted: Wanted,
        urgent: bool,
    ) -> (oneshot::Receiver<Answer>, bool) {
        let (answer, answered) = oneshot::channel();
        let digest = wanted.place.digest;
        let waiting = self.waiting.entry(digest).or_default();
        let new = waiting.is_empty();
        let given_up = waiting.iter().all(oneshot::Sender::is_closed);
        waiting.push(answer);
        if new {
            self.queued.push(Queued { wanted, urgent });
            return (answered, true);
        }
        let queued = self.queued.iter_mut();
        let mut found = queued.filter(|queued| queued.wanted.place.digest == digest);
        let queued = found.next();
        let again = given_up && queued.is_some();
        if let Some(queued) = queued {
            queued.urgent |= urgent;
        }
        (answered, again)
    }

    /// Puts a chunk before all that is not urgent. False: it is not in the queue, or was urgent.
    pub(super) fn hurry(&mut self, digest: &Digest) -> bool {
        let queued = self.queued.iter_mut();
        let mut found = queued.filter(|queued| queued.wanted.place.digest == *digest);
        found
            .next()
            .is_some_and(|queued| !std::mem::replace(&mut queued.urgent, true))
    }

    /// The next request: for what waits longest, the urgent first, with its neighbours.
    pub(super) fn next(&mut self) -> Option<Range> {
        let waiting = &mut self.waiting;
        self.queued.retain(|queued| {
            let digest = queued.wanted.place.digest;
            let wanted = waiting
                .get(&digest)
                .is_some_and(|waiting| waiting.iter().any(|answer| !answer.is_closed()));
            if !wanted {
                waiting.remove(&digest);
            }
            wanted
        });
        let first = self.queued.iter().find(|queued| queued.urgent);
        let first = first.or(self.queued.first())?.wanted.place.digest;
        let ranges = Range::of(self.queued.iter().map(|queued| queued.wanted).collect());
        let range = ranges.into_iter().find(|range| range.has(&first))?;
        self.queued
            .retain(|queued| !range.has(&queued.wanted.place.digest));
        Some(range)
    }

    /// Answers everybody who waits for a chunk.
    pub(super) fn answer(&mut self, digest: &Digest, answer: &Answer) {
        for waiting in self.waiting.remove(digest).into_iter().flatten() {
            // Whoever asked may have gone.
            let _ = waiting.send(answer.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::index::Place;
    use super::*;

    fn wanted(index: u32, offset: u64) -> Wanted {
        let place = Place {
            digest: Digest([index as u8; 32]),
            pack: 0,
            offset,
            length: 10,
            plain: 10,
        };
        Wanted { index, place }
    }

    fn indices(range: Option<Range>) -> Vec<u32> {
        let chunks = range.into_iter().flat_map(|range| range.chunks);
        chunks.map(|chunk| chunk.index).collect()
    }

    /// Too far from each other for one request.
    const FAR: u64 = 1 << 20;

    #[test]
    fn a_chunk_is_asked_for_once_and_everybody_gets_it() {
        let mut queue = Queue::default();
        let (mut one, first) = queue.add(wanted(1, 0), false);
        let (mut other, second) = queue.add(wanted(1, 0), false);
        assert!(first && !second);
        assert_eq!(indices(queue.next()), [1]);
        // It is under way.
        let (mut late, third) = queue.add(wanted(1, 0), true);
        assert!(!third);
        assert_eq!(indices(queue.next()), [0u32; 0]);
        let bytes = Bytes::from_static(b"chunk");
        queue.answer(&Digest([1; 32]), &Ok(bytes.clone()));
        for answered in [&mut one, &mut other, &mut late] {
            assert_eq!(answered.try_recv().unwrap().unwrap(), bytes);
        }
        assert!(queue.add(wanted(1, 0), false).1);
    }

    #[test]
    fn what_somebody_waits_for_goes_before_the_background_and_takes_its_neighbours_along() {
        let mut queue = Queue::default();
        let far = (0..4).map(|n| wanted(n, u64::from(n) * FAR));
        let _waiting: Vec<_> = far.map(|wanted| queue.add(wanted, false)).collect();
        let _beside = queue.add(wanted(9, 2 * FAR + 10), false);
        let _urgent = queue.add(wanted(3, 3 * FAR), true);
        assert!(queue.hurry(&Digest([2; 32])));
        assert!(!queue.hurry(&Digest([2; 32])));
        assert_eq!(indices(queue.next()), [2, 9]);
        assert_eq!(indices(queue.next()), [3]);
        assert_eq!(indices(queue.next()), [0]);
        assert_eq!(indices(queue.next()), [1]);
        assert!(!queue.hurry(&Digest([0; 32])));
    }

    #[test]
    fn what_nobody_waits_for_any_more_is_not_asked_for() {
        let mut queue = Queue::default();
        drop(queue.add(wanted(1, 0), false));
        let _waits = queue.add(wanted(2, FAR), false);
        assert_eq!(indices(queue.next()), [2]);
        assert!(queue.add(wanted(1, 0), false).1);
    }

    #[test]
    fn whoever_wants_what_others_gave_up_does_not_wait_for_their_request() {
        let mut queue = Queue::default();
        drop(queue.add(wanted(1, 0), false));
        let (_answered, again) = queue.add(wanted(1, 0), true);
        assert!(again);
        assert!(!queue.add(wanted(1, 0), false).1);
        assert_eq!(indices(queue.next()), [1]);
        assert_eq!(indices(queue.next()), [0u32; 0]);
        // One that is under way is waited for.
        drop(queue.add(wanted(2, 0), false));
        let _late = queue.add(wanted(3, FAR), false);
        let (answered, _) = queue.add(wanted(2, 0), false);
        assert_eq!(indices(queue.next()), [2]);
        drop(answered);
        assert!(!queue.add(wanted(2, 0), false).1);
    }
}
