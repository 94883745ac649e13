//! How long the guest waited, in buckets that threads count into without a lock.

use std::sync::atomic::{AtomicU64, Ordering};

/// Buckets per power of two: a bound is at most an eighth above any value below it.
const PARTS: u64 = 8;
/// Values from here on, in microseconds, share the last bucket: more than an hour.
const END_US: u64 = 1 << 32;
const BUCKETS: usize = index(END_US) + 1;

/// Counts of values in microseconds.
#[derive(Debug)]
pub(super) struct Histogram {
    counts: Vec<AtomicU64>,
    max_us: AtomicU64,
}

impl Histogram {
    pub(super) fn new() -> Self {
        Self {
            counts: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
            max_us: AtomicU64::new(0),
        }
    }

    pub(super) fn add(&self, us: u64) {
        self.counts[index(us.min(END_US))].fetch_add(1, Ordering::Relaxed);
        self.max_us.fetch_max(us, Ordering::Relaxed);
    }

    pub(super) fn max_us(&self) -> u64 {
        self.max_us.load(Ordering::Relaxed)
    }

    /// Upper bound in microseconds (excluded) and count of each bucket that is not empty, ascending.
    pub(super) fn buckets(&self) -> Vec<(u64, u64)> {
        self.counts
            .iter()
            .enumerate()
            .map(|(index, count)| (lower(index + 1), count.load(Ordering::Relaxed)))
            .filter(|(_, count)| *count > 0)
            .collect()
    }
}

/// Below `PARTS` each value has its own bucket; above, each power of two has `PARTS`.
const fn index(us: u64) -> usize {
    if us < PARTS {
        return us as usize;
    }
    let shift = us.ilog2() - PARTS.ilog2();
    (shift as u64 * PARTS + (us >> shift)) as usize
}

/// The least value of a bucket.
fn lower(index: usize) -> u64 {
    let index = index as u64;
    if index < 2 * PARTS {
        return index;
    }
    let shift = index / PARTS - 1;
    (index - shift * PARTS) << shift
}

/// The bound below which `part` of the counted values lie (0 to 1); 0 without any.
pub fn quantile(buckets: &[(u64, u64)], part: f64) -> u64 {
    let total: u64 = buckets.iter().map(|(_, count)| count).sum();
    let rank = (total as f64 * part).ceil().max(1.0) as u64;
    let mut seen = 0;
    for (bound, count) in buckets {
        seen += count;
        if seen >= rank {
            return *bound;
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_value_lies_below_the_bound_of_its_bucket_and_not_far(us in 0u64..END_US) {
            let histogram = Histogram::new();
            histogram.add(us);
            let [(bound, 1)] = histogram.buckets()[..] else {
                panic!("{:?}", histogram.buckets());
            };
            prop_assert!(us < bound);
            prop_assert!(bound - us <= us / PARTS + 1);
            prop_assert_eq!(histogram.max_us(), us);
            prop_assert_eq!(lower(index(us)), if us < 2 * PARTS { us } else { lower(index(us)) });
            prop_assert!(lower(index(us)) <= us);
        }
    }

    #[test]
    fn quantiles_are_the_bounds_of_their_ranks() {
        let buckets = [(10, 98), (20, 1), (50, 1)];
        assert_eq!(
            [0.5, 0.98, 0.99, 0.999].map(|part| quantile(&buckets, part)),
            [10, 10, 20, 50]
        );
        assert_eq!(quantile(&[], 0.5), 0);
    }

    #[test]
    fn endless_waits_are_counted_too() {
        let histogram = Histogram::new();
        histogram.add(u64::MAX);
        assert_eq!(histogram.buckets().len(), 1);
        assert_eq!(histogram.max_us(), u64::MAX);
    }
}
