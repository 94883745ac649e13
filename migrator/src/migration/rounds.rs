//! When to freeze: how long the last round would take, from what the rounds so far have shown. Pure.
//!
//! The memory part of the downtime is predicted as `overhead + (pages left + pages dirtied until the stop) * bytes a page / bandwidth`,
//! each quantity with its error margin on the unlucky side. It freezes when that meets the limit. It never freezes by a timer: that
//! it does not converge shows in the pages left, which stop shrinking.

use std::fmt;

use vm_runtime::units::PAGE_SIZE;

/// Bytes that one page alone takes on the wire: frame header, first page and count, content.
const WIRE_PAGE: f64 = (PAGE_SIZE + 17) as f64;
/// A round below this many bytes tells the fixed cost of a round rather than the bandwidth.
const BANDWIDTH_SAMPLE: u64 = 1 << 20;
/// Weight of a new sample.
const GAIN: f64 = 0.4;
/// Deviations between the mean and the bound that is used.
const MARGIN: f64 = 2.0;
/// A last round of this many pages is lost in the cost of a round.
const FEW_PAGES: u64 = 64;
/// Rounds that are made, at most, although the limit is met.
const POLISH_ROUNDS: u32 = 4;
/// Rounds without progress after which the migration counts as stalled.
const STALL_ROUNDS: u32 = 3;
/// Progress is a round that leaves less than this part of the best so far.
const PROGRESS: f64 = 0.9;

/// What the user allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Limit for the memory part of the downtime, in microseconds.
    pub memory_limit_us: u64,
    /// What the rest of the downtime is expected to cost (stop, device state, grant, resume), in microseconds.
    pub fixed_us: u64,
    /// From the decision to the guest's stop, in microseconds: the visit of each CPU and the drain of the TAP. The guest goes on
    /// writing meanwhile.
    pub lead_us: u64,
    /// Rounds after which a migration that does not converge ends.
    pub max_rounds: u32,
    /// Whether it then ends with a freeze beyond the limit, instead of failing.
    pub force: bool,
}

impl Default for Policy {
    /// 30 ms of memory; 15 ms of everything else and 4 ms of lead, both measured; 30 rounds.
    fn default() -> Self {
        Self {
            memory_limit_us: 30_000,
            fixed_us: 15_000,
            lead_us: 4_000,
            max_rounds: 30,
            force: false,
        }
    }
}

/// One round, from its first read to the destination's acknowledgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundSample {
    /// Pages sent, zero pages included.
    pub pages: u64,
    /// Bytes sent, headers included.
    pub bytes: u64,
    /// Its length in microseconds.
    pub duration_us: u64,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Another round.
    Round,
    /// The prediction meets the limit.
    Freeze,
    /// The prediction does not meet the limit, and the pages left no longer shrink or the rounds are used up.
    Stalled(Stall),
}

/// A migration that does not converge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stall {
    /// Rounds so far.
    pub rounds: u32,
    /// Whether no more rounds are allowed.
    pub exhausted: bool,
    /// Pages left.
    pub pages_left: u64,
    /// Predicted memory part of the downtime, in microseconds.
    pub predicted_us: u64,
    /// Its limit, in microseconds.
    pub limit_us: u64,
    /// Measured dirty rate, bytes a second.
    pub dirty_bytes_per_s: u64,
    /// Measured bandwidth, bytes a second.
    pub bandwidth_bytes_per_s: u64,
}

impl fmt::Display for Stall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mb = |bytes: u64| bytes as f64 / 1e6;
        write!(
            f,
            "the guest writes memory as fast as it can be sent: after {} rounds {} pages are left, which would take {:.0} ms of a \
             limit of {:.0} ms (it dirties {:.0} MB/s, the link carries {:.0} MB/s); raise the downtime limit, allow the freeze \
             with --force, or try when the guest is calmer",
            self.rounds,
            self.pages_left,
            self.predicted_us as f64 / 1e3,
            self.limit_us as f64 / 1e3,
            mb(self.dirty_bytes_per_s),
            mb(self.bandwidth_bytes_per_s),
        )
    }
}

/// A smoothed quantity and its mean deviation.
#[derive(Clone, Copy, Debug)]
struct Estimate {
    mean: f64,
    deviation: f64,
}

impl Estimate {
    fn update(slot: &mut Option<Self>, sample: f64) {
        *slot = Some(match *slot {
            // One sample says nothing about its own error: assume a quarter.
            None => Self {
                mean: sample,
                deviation: sample / 8.0,
            },
            Some(Self { mean, deviation }) => {
                let error = sample - mean;
                Self {
                    mean: mean + GAIN * error,
                    deviation: deviation + GAIN * (error.abs() - deviation),
                }
            }
        });
    }

    fn low(self) -> f64 {
        (self.mean - MARGIN * self.deviation).max(self.mean / 4.0)
    }

    fn high(self) -> f64 {
        self.mean + MARGIN * self.deviation
    }
}

/// The measurements of one migration and the decision that follows from them.
#[derive(Clone, Debug)]
pub struct Convergence {
    policy: Policy,
    /// Bytes a second.
    bandwidth: Option<Estimate>,
    /// Pages a second.
    dirty: Option<Estimate>,
    /// Microseconds that a round costs beyond its bytes.
    overhead: Option<Estimate>,
    rounds: u32,
    best_left: Option<u64>,
    without_progress: u32,
    /// Pages left at the decision before this one.
    last_left: Option<u64>,
    /// Rounds that were made although the limit was met.
    polished: u32,
}

impl Convergence {
    /// Nothing is known yet.
    pub fn new(policy: Policy) -> Self {
        Self {
            policy,
            bandwidth: None,
            dirty: None,
            overhead: None,
            rounds: 0,
            best_left: None,
            without_progress: 0,
            last_left: None,
            polished: 0,
        }
    }

    /// Takes in a finished round.
    pub fn round_done(&mut self, sample: RoundSample) {
        self.rounds += 1;
        let duration_us = sample.duration_us.max(1) as f64;
        let bytes = sample.bytes as f64;
        match self.bandwidth {
            Some(bandwidth) if sample.bytes < BANDWIDTH_SAMPLE => {
                let wire_us = bytes / bandwidth.mean.max(1.0) * 1e6;
                Estimate::update(&mut self.overhead, (duration_us - wire_us).max(0.0));
            }
            _ => Estimate::update(&mut self.bandwidth, bytes.max(1.0) / duration_us * 1e6),
        }
    }

    /// Takes in a scan: `pages` were written in the `interval_us` since the scan before (or since tracking began).
    pub fn scanned(&mut self, pages: u64, interval_us: u64) {
        let rate = pages as f64 / interval_us.max(1) as f64 * 1e6;
        Estimate::update(&mut self.dirty, rate);
    }

    /// Rounds finished.
    pub fn rounds(&self) -> u32 {
        self.rounds
    }

    /// Measured bandwidth in bytes a second; 0 before the first round.
    pub fn bandwidth_bytes_per_s(&self) -> u64 {
        self.bandwidth.map_or(0, |e| e.mean as u64)
    }

    /// Measured dirty rate in bytes a second; 0 before the first scan.
    pub fn dirty_bytes_per_s(&self) -> u64 {
        self.dirty.map_or(0, |e| (e.mean * PAGE_SIZE as f64) as u64)
    }

    /// Predicted memory part of the downtime in microseconds, were it frozen with `pages_left` to send.
    /// `u64::MAX` before the first round.
    pub fn predict_memory_us(&self, pages_left: u64) -> u64 {
        let Some(bandwidth) = self.bandwidth else {
            return u64::MAX;
        };
        let dirtied = self.dirty.map_or(0.0, Estimate::high) * self.policy.lead_us as f64 / 1e6;
        let bytes = (pages_left as f64 + dirtied) * WIRE_PAGE;
        let wire_us = bytes / bandwidth.low().max(1.0) * 1e6;
        // Beyond u64 the cast saturates, which is what "never" should look like.
        (self.overhead.map_or(0.0, Estimate::high) + wire_us).ceil() as u64
    }

    /// Predicted downtime in microseconds, were it frozen with `pages_left` to send: the memory part and the rest.
    pub fn predict_downtime_us(&self, pages_left: u64) -> u64 {
        self.predict_memory_us(pages_left)
            .saturating_add(self.policy.fixed_us)
    }

    /// Whether the memory part of the downtime would meet its limit, were it frozen with `pages_left` to send.
    pub fn fits(&self, pages_left: u64) -> bool {
        self.predict_memory_us(pages_left) <= self.policy.memory_limit_us
    }

    /// The guest was slowed: progress is measured from here on, a single round without it is a stall, and as many rounds are allowed as
    /// at the beginning.
    pub fn eased(&mut self) {
        self.best_left = self.last_left;
        self.without_progress = STALL_ROUNDS - 1;
        self.dirty = None;
        self.policy.max_rounds = self.policy.max_rounds.saturating_add(self.rounds);
    }

    /// What to do with `pages_left` to send; to be asked once after each round and its scan.
    pub fn decide(&mut self, pages_left: u64) -> Decision {
        let predicted_us = self.predict_memory_us(pages_left);
        let shrinks = self.last_left.is_none_or(|last| pages_left < last / 2);
        self.last_left = Some(pages_left);
        if predicted_us <= self.policy.memory_limit_us {
            // The limit is met. A round more, while each leaves less than half, makes the downtime shorter still.
            if shrinks && pages_left > FEW_PAGES && self.polished < POLISH_ROUNDS {
                self.polished += 1;
                return Decision::Round;
            }
            return Decision::Freeze;
        }
        match self.best_left {
            Some(best) if pages_left as f64 >= best as f64 * PROGRESS => {
                self.without_progress += 1;
            }
            _ => {
                self.best_left = Some(pages_left);
                self.without_progress = 0;
            }
        }
        let exhausted = self.rounds >= self.policy.max_rounds;
        if !exhausted && self.without_progress < STALL_ROUNDS {
            return Decision::Round;
        }
        Decision::Stalled(Stall {
            rounds: self.rounds,
            exhausted,
            pages_left,
            predicted_us,
            limit_us: self.policy.memory_limit_us,
            dirty_bytes_per_s: self.dirty_bytes_per_s(),
            bandwidth_bytes_per_s: self.bandwidth_bytes_per_s(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A guest with `working_set` pages, of which it writes `rate` a second, over a link of `bandwidth` bytes a second.
    fn run(
        policy: Policy,
        rate: f64,
        working_set: f64,
        bandwidth: f64,
    ) -> (Convergence, Decision, u64) {
        let mut rounds = Convergence::new(policy);
        let mut left = 100_000.0f64;
        loop {
            let bytes = left * WIRE_PAGE;
            let seconds = bytes / bandwidth + 0.0005;
            let duration_us = (seconds * 1e6) as u64;
            rounds.round_done(RoundSample {
                pages: left as u64,
                bytes: bytes as u64,
                duration_us,
            });
            left = (rate * seconds).min(working_set);
            rounds.scanned(left as u64, duration_us);
            match rounds.decide(left as u64) {
                Decision::Round => {}
                Decision::Stalled(stall) if !stall.exhausted => {}
                decision => return (rounds, decision, left as u64),
            }
        }
    }

    #[test]
    fn a_calm_guest_freezes_within_a_few_rounds() {
        let (rounds, decision, _) = run(Policy::default(), 2_000.0, 5_000.0, 1e9);
        assert_eq!(decision, Decision::Freeze);
        assert!(rounds.rounds() <= 8, "{} rounds", rounds.rounds());
    }

    #[test]
    fn a_guest_that_writes_faster_than_the_link_stalls_and_the_message_has_the_figures() {
        let (rounds, decision, _) = run(Policy::default(), 1e6, 90_000.0, 1e9);
        let Decision::Stalled(stall) = decision else {
            panic!("{decision:?}");
        };
        assert_eq!(rounds.rounds(), Policy::default().max_rounds);
        let text = stall.to_string();
        assert!(
            text.contains("after 30 rounds 90000 pages are left"),
            "{text}"
        );
        assert!(text.contains("--force"), "{text}");
    }

    #[test]
    fn a_stall_shows_in_the_progress_long_before_the_last_round() {
        let mut rounds = Convergence::new(Policy::default());
        let sample = RoundSample {
            pages: 50_000,
            bytes: 200_000_000,
            duration_us: 200_000,
        };
        let mut decisions = Vec::new();
        for _ in 0..5 {
            rounds.round_done(sample);
            rounds.scanned(50_000, 200_000);
            decisions.push(matches!(rounds.decide(50_000), Decision::Stalled(_)));
        }
        assert_eq!(decisions, [false, false, false, true, true]);
    }

    #[test]
    fn a_working_set_that_fits_the_limit_freezes_at_any_write_rate() {
        let (_, decision, left) = run(Policy::default(), 1e9, 1_000.0, 1e9);
        assert_eq!((decision, left), (Decision::Freeze, 1_000));
    }

    #[test]
    fn nothing_is_predicted_before_the_first_round() {
        let mut rounds = Convergence::new(Policy::default());
        assert_eq!(rounds.predict_downtime_us(0), u64::MAX);
        assert_ne!(rounds.decide(0), Decision::Freeze);
    }

    proptest! {
        #[test]
        fn it_never_freezes_when_the_prediction_exceeds_the_limit(
            limit in 0u64..200_000,
            history in proptest::collection::vec((0u64..1 << 20, 0u64..1 << 32, 0u64..10_000_000, 0u64..1 << 20), 0..40),
        ) {
            let policy = Policy { memory_limit_us: limit, ..Policy::default() };
            let mut rounds = Convergence::new(policy);
            for (pages, bytes, duration_us, left) in history {
                rounds.round_done(RoundSample { pages, bytes, duration_us });
                rounds.scanned(left, duration_us);
                let predicted = rounds.predict_memory_us(left);
                let decision = rounds.decide(left);
                prop_assert!(decision != Decision::Freeze || predicted <= limit);
                prop_assert!(predicted > limit || !matches!(decision, Decision::Stalled(_)));
            }
        }

        #[test]
        fn more_pages_never_take_less_time(bytes in 1u64..1 << 32, us in 1u64..10_000_000, left in 0u64..1 << 30, more in 0u64..1 << 30) {
            let mut rounds = Convergence::new(Policy::default());
            rounds.round_done(RoundSample { pages: 1, bytes, duration_us: us });
            prop_assert!(rounds.predict_downtime_us(left) <= rounds.predict_downtime_us(left + more));
        }
    }
}
