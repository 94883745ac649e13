//! Times, and how often each was. Pure.

/// Times in buckets, 16 to each power of two: within 7 percent of the truth.
#[derive(Clone, Debug)]
pub(super) struct Histogram(Vec<u64>);

const SUB_BITS: u32 = 4;

impl Histogram {
    pub(super) fn new() -> Histogram {
        Histogram(vec![0; bucket(u64::MAX) + 1])
    }

    pub(super) fn add(&mut self, ns: u64) {
        self.0[bucket(ns)] += 1;
    }

    /// `[[upper bound in ns, count], ...]` of the buckets that hold something.
    pub(super) fn json(&self) -> String {
        let filled = self.0.iter().enumerate().filter(|(_, count)| **count > 0);
        let pairs: Vec<String> = filled
            .map(|(at, count)| format!("[{},{count}]", upper(at)))
            .collect();
        format!("[{}]", pairs.join(","))
    }
}

fn bucket(ns: u64) -> usize {
    let sub = 1u64 << SUB_BITS;
    if ns < sub {
        return ns as usize;
    }
    let shift = ns.ilog2() - SUB_BITS;
    ((u64::from(shift) + 1) * sub + (ns >> shift) - sub) as usize
}

/// The greatest number of a bucket.
fn upper(bucket: usize) -> u64 {
    let (bucket, sub) = (bucket as u64, 1u64 << SUB_BITS);
    if bucket < sub {
        return bucket;
    }
    let shift = bucket / sub - 1;
    let end = u128::from(sub + bucket % sub + 1) << shift;
    u64::try_from(end - 1).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_is_in_a_bucket_whose_bounds_hold_it_closely() {
        let mut last = 0;
        for ns in
            (0..4096).chain((12..64).flat_map(|bit| [(1 << bit) - 1, 1 << bit, 5 << (bit - 2)]))
        {
            let at = bucket(ns);
            assert!(upper(at) >= ns, "{ns}");
            assert!(at == 0 || upper(at - 1) < ns, "{ns}");
            assert!(upper(at) as f64 <= ns as f64 * 1.07, "{ns}");
            last = last.max(at);
        }
        assert_eq!(last, bucket(1 << 63) + 4);
        assert_eq!(upper(bucket(u64::MAX)), u64::MAX);
    }

    #[test]
    fn a_histogram_names_what_it_holds() {
        let mut histogram = Histogram::new();
        for ns in [3, 3, 1000] {
            histogram.add(ns);
        }
        assert_eq!(histogram.json(), "[[3,2],[1023,1]]");
    }
}
