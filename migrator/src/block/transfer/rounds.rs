//! When the disks have crossed well enough to begin with the memory. Pure.

/// So little left that a round costs its fixed part, in bytes.
const FEW: u64 = 1 << 20;
/// Rounds that are made at most, the first included.
const MOST_ROUNDS: u32 = 12;
/// Progress is a round that leaves less than this part of what the one before left.
const PROGRESS: f64 = 0.7;
/// Bytes that may always be left to the freeze, however slow the link has shown to be.
const LEAST_LEFT: u64 = 4 << 20;

/// One round, from its first read to the acknowledgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Bytes of the disks that it sent, holes included.
    pub bytes: u64,
    /// Its length in microseconds.
    pub duration_us: u64,
    /// Bytes that are to be sent again by now.
    pub left: u64,
}

/// The rounds before the memory's.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rounds {
    made: u32,
    left: Option<u64>,
    /// Bytes of disk a second.
    bandwidth: u64,
}

impl Rounds {
    /// Takes in a round; whether another one pays. What is left after the last goes beside the rounds of memory.
    pub fn another(&mut self, sample: Sample) -> bool {
        self.made += 1;
        if sample.bytes >= FEW {
            let per_us = sample.bytes as f64 / sample.duration_us.max(1) as f64;
            self.bandwidth = (per_us * 1e6) as u64;
        }
        let shrinks = self
            .left
            .is_none_or(|before| (sample.left as f64) < before as f64 * PROGRESS);
        self.left = Some(sample.left);
        sample.left > FEW && shrinks && self.made < MOST_ROUNDS
    }

    /// How much the guest may write beyond what has crossed, in bytes, from here to the freeze: what the link carries in half of
    /// `limit_us`, the part of the downtime that is for content. Writes beyond it wait for the next round: so a guest that writes to its
    /// disk faster than the link carries is slowed to the link's pace, and freezes all the same.
    pub fn most_left(&self, limit_us: u64) -> u64 {
        let carried = self.bandwidth as f64 * limit_us as f64 / 2e6;
        (carried as u64).max(LEAST_LEFT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(left: u64) -> Sample {
        Sample {
            bytes: 100 << 20,
            duration_us: 1_000_000,
            left,
        }
    }

    #[test]
    fn a_quiet_disk_takes_one_round() {
        assert!(!Rounds::default().another(sample(0)));
        assert!(!Rounds::default().another(sample(FEW)));
    }

    #[test]
    fn rounds_go_on_while_each_leaves_clearly_less() {
        let mut rounds = Rounds::default();
        for left in [400, 200, 100, 50, 20, 10, 5, 2] {
            assert!(rounds.another(sample(left << 20)), "{left}");
        }
        assert!(!rounds.another(sample(1 << 20)));
    }

    #[test]
    fn a_disk_that_is_written_faster_than_it_crosses_does_not_keep_the_memory_waiting() {
        let mut rounds = Rounds::default();
        assert!(rounds.another(sample(100 << 20)));
        assert!(!rounds.another(sample(90 << 20)));
        let mut rounds = Rounds::default();
        let made = (0..100).find(|n| !rounds.another(sample((1 << 40) >> n)));
        assert_eq!(made, Some(MOST_ROUNDS as usize - 1), "never without end");
    }

    #[test]
    fn what_may_be_left_follows_the_link_and_the_limit() {
        let mut rounds = Rounds::default();
        assert_eq!(rounds.most_left(30_000), LEAST_LEFT);
        rounds.another(Sample {
            bytes: 1 << 30,
            duration_us: 1_000_000,
            left: 0,
        });
        assert_eq!(
            rounds.most_left(30_000),
            ((1u64 << 30) as f64 * 0.015) as u64
        );
        // A round of little says nothing about the bandwidth.
        rounds.another(Sample {
            bytes: 1,
            duration_us: 1_000_000,
            left: 0,
        });
        assert!(rounds.most_left(30_000) > LEAST_LEFT);
    }
}
