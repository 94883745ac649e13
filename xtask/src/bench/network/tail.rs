//! What the round trips around a move say: how long they were, and when they were as before again. Pure.

use crate::silence::RoundTrip;

/// Looked at before the request and after the resume, in microseconds.
pub(super) const AROUND_US: u64 = 1_000_000;
/// Windows after the resume, in microseconds.
const WINDOW_US: u64 = 10_000;
/// A window whose p99 is within so many times that of before has no tail.
const WITHIN: f64 = 2.0;

/// When the steps of a move were, in microseconds of Unix time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moments {
    /// The move was asked for.
    pub(super) requested_us: u64,
    /// The guest ran at the destination.
    pub(super) resumed_us: u64,
}

/// Times in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Latency {
    /// Of packets that left in the second before the request.
    pub(super) p99_before: f64,
    /// Of packets that left from a second before the request to a second after the resume.
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
    /// From the resume to the first answer after it; a second if there is none.
    pub(super) first_answer: f64,
    /// From the resume to the first window that is as before; a second if none is.
    pub(super) tail: f64,
}

/// None without packets before the move.
pub(super) fn latency(trips: &[RoundTrip], at: Moments) -> Option<Latency> {
    let sent = |from: u64, until: u64| -> Vec<u64> {
        let mut took: Vec<u64> = trips
            .iter()
            .filter(|trip| (from..until).contains(&trip.sent_us))
            .map(|trip| trip.took_us)
            .collect();
        took.sort_unstable();
        took
    };
    let begin = at.requested_us.saturating_sub(AROUND_US);
    let all = sent(begin, at.resumed_us + AROUND_US);
    let p99_before = percentile(&sent(begin, at.requested_us), 99)?;
    let tail_us = (0..AROUND_US).step_by(WINDOW_US as usize).find(|after_us| {
        let from = at.resumed_us + after_us;
        // A window without any answered packet is not as before.
        percentile(&sent(from, from + WINDOW_US), 99).is_some_and(|p99| p99 <= WITHIN * p99_before)
    });
    let answered = trips.iter().map(|trip| trip.sent_us + trip.took_us);
    let first_us = answered.filter(|us| *us >= at.resumed_us).min();
    let first_us = first_us.map_or(AROUND_US, |us| us - at.resumed_us);
    Some(Latency {
        p99_before,
        p50: percentile(&all, 50)?,
        p99: percentile(&all, 99)?,
        max: percentile(&all, 100)?,
        first_answer: first_us as f64 / 1e3,
        tail: tail_us.unwrap_or(AROUND_US) as f64 / 1e3,
    })
}

/// By nearest rank, in milliseconds, of sorted microseconds.
fn percentile(sorted_us: &[u64], percent: usize) -> Option<f64> {
    let rank = (sorted_us.len() * percent).div_ceil(100).max(1);
    sorted_us.get(rank - 1).map(|us| *us as f64 / 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Moments = Moments {
        requested_us: 2_000_000,
        resumed_us: 2_500_000,
    };

    /// A packet a millisecond, and what it takes by when it left.
    fn trips(took_us: impl Fn(u64) -> u64) -> Vec<RoundTrip> {
        (0..4_000)
            .map(|ms| RoundTrip {
                sent_us: ms * 1_000,
                took_us: took_us(ms),
            })
            .collect()
    }

    #[test]
    fn a_move_that_only_holds_packets_back_has_no_tail() {
        // Those that wait are answered at the resume.
        let latency = latency(
            &trips(|ms| match ms {
                2_470..2_500 => (2_500 - ms) * 1_000,
                _ => 300,
            }),
            AT,
        )
        .unwrap();
        assert_eq!(latency.tail, 0.0);
        assert_eq!((latency.p50, latency.max), (0.3, 30.0));
        assert_eq!(latency.first_answer, 0.0);
        assert_eq!(latency.p99_before, 0.3);
    }

    #[test]
    fn a_tail_lasts_until_a_window_is_as_before() {
        let slow = |until: u64| {
            trips(move |ms| match ms {
                0..2_500 => 300,
                ms if ms < until => 700,
                // Twice that of before is as before.
                _ => 600,
            })
        };
        assert_eq!(latency(&slow(2_620), AT).unwrap().tail, 120.0);
        assert_eq!(latency(&slow(9_999), AT).unwrap().tail, 1_000.0);
    }

    #[test]
    fn packets_that_were_never_answered_leave_no_window_empty_and_well() {
        let mut trips = trips(|_| 300);
        trips.retain(|trip| !(2_500_000..2_600_000).contains(&trip.sent_us));
        let latency_of = latency(&trips, AT).unwrap();
        assert_eq!((latency_of.first_answer, latency_of.tail), (100.3, 100.0));
        assert_eq!(latency(&[], AT), None);
    }
}
