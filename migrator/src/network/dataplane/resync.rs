//! Buckets that wait for frames which have been lost: between the counter and the park's queue, or with a service that was killed. Without this
//! their flows would keep taking the slow way.
//!
//! ```text
//! counters = parked      every frame that they stand for ...
//! grace period           ... is in the queue now, or lost
//! the queue is empty     ... and now it has been read: what `done` lacks is lost
//! ```
//!
//! That holds for a bucket in which nothing else was parked meanwhile; one that was busy is looked at again.

use std::time::{Duration, Instant};

use super::super::grace;
use super::{Dataplane, Stage};

/// From one look at busy buckets to the next, at first; twice as long each time, up to the second.
const AGAIN: [Duration; 2] = [Duration::from_millis(2), Duration::from_millis(100)];

/// What is known of the buckets, and what is to be done about them.
#[derive(Debug)]
pub(super) struct Resync {
    /// Book what is missing as lost with a service that was killed; else a device has booked it.
    crashed: bool,
    /// `parked` of each bucket, once they were read.
    counters: Option<Box<[u64; 256]>>,
    due: Instant,
    pause: Duration,
}

impl Dataplane {
    /// Looks for missing frames as soon as the gate is open.
    pub(super) fn want_resync(&mut self, crashed: bool) {
        let before = self.resync.take().is_some_and(|resync| resync.crashed);
        self.resync = Some(Resync {
            crashed: crashed || before,
            counters: None,
            due: Instant::now(),
            pause: AGAIN[0],
        });
    }

    /// When [`go_on_resync`](Self::go_on_resync) has something to do by itself.
    pub(super) fn resync_due(&self) -> Option<Instant> {
        let resync = self.resync.as_ref()?;
        (self.stage == Stage::Local && resync.counters.is_none()).then_some(resync.due)
    }

    pub(super) fn go_on_resync(&mut self, now: Instant) {
        if self.stage != Stage::Local {
            return;
        }
        let Some(mut resync) = self.resync.take() else {
            return;
        };
        let gate = &self.setup.gate;
        match resync.counters.take() {
            None if now < resync.due => self.resync = Some(resync),
            None => {
                let mut counters = Box::new([0; 256]);
                for (bucket, counter) in (0..=u8::MAX).zip(counters.iter_mut()) {
                    *counter = gate.parked(bucket);
                }
                if let Err(error) = grace::grace_period() {
                    tracing::warn!(%error, "no grace period: flows behind a lost frame keep taking the slow way");
                    return;
                }
                self.park_empty = false;
                resync.counters = Some(counters);
                self.resync = Some(resync);
            }
            Some(counters) if !self.park_empty || !self.pending.is_empty() => {
                resync.counters = Some(counters);
                self.resync = Some(resync);
            }
            Some(counters) => {
                let mut busy = false;
                for (bucket, counter) in (0..=u8::MAX).zip(counters.iter()) {
                    let missing = gate.parked(bucket).wrapping_sub(gate.done(bucket)) as i64;
                    if missing <= 0 {
                        continue;
                    }
                    if gate.parked(bucket) != *counter {
                        busy = true;
                        continue;
                    }
                    gate.set_done(bucket, *counter);
                    if resync.crashed {
                        self.tally.crash += missing as u64;
                    }
                }
                if busy {
                    resync.due = now + resync.pause;
                    resync.pause = (resync.pause * 2).min(AGAIN[1]);
                    self.resync = Some(resync);
                }
            }
        }
    }
}
