//! A frame that the kernel has lost between the uplink's program and the gate keeps its bucket on the kernel's way. Once nothing of the
//! bucket has moved for a while, and every CPU has done something else meanwhile, nothing is under way: then the counts are made equal.

use std::collections::BTreeMap;
use std::sync::Weak;
use std::sync::atomic::Ordering;
use std::time::Duration;

use migrator_ebpf::bucket_index;

use super::{FastWay, STRAGGLERS};
use crate::network::gate::{Gates, lock};
use crate::network::grace;

/// Between two looks.
const TICK: Duration = Duration::from_millis(100);
const _: () = assert!(TICK.as_millis() > STRAGGLERS.as_millis());

/// Frames left to the kernel, and arrived, of each bucket of a slot.
type Counts = Vec<(u64, u64)>;

/// What is missing in a bucket where nothing moves. Negative, as two's complement, if too many have arrived.
const fn missing(before: (u64, u64), now: (u64, u64)) -> Option<u64> {
    let (passed, arrived) = now;
    let still = before.0 == passed && before.1 == arrived;
    if still && passed != arrived {
        return Some(passed.wrapping_sub(arrived));
    }
    None
}

impl FastWay {
    fn look(&self) -> BTreeMap<u16, Counts> {
        let locals = lock(&self.locals);
        let slots = locals.iter().flatten().map(|(_, local)| local.slot);
        slots
            .map(|slot| {
                let counts = (0..=u8::MAX).map(|bucket| self.counts(slot, bucket));
                (slot, counts.collect())
            })
            .collect()
    }

    fn correct(&self, before: &BTreeMap<u16, Counts>) {
        for (slot, counts) in before {
            for (bucket, before) in (0..=u8::MAX).zip(counts) {
                let Some(missing) = missing(*before, self.counts(*slot, bucket)) else {
                    continue;
                };
                if let Some(arrived) = self.arrived.get(bucket_index(*slot, bucket)) {
                    // The gate may add at any time; a difference that is still true stays true.
                    arrived.fetch_add(missing, Ordering::AcqRel);
                    tracing::debug!(
                        slot,
                        bucket,
                        frames = missing as i64,
                        "frames were lost between uplink and gate: the bucket may take the fast way again"
                    );
                }
            }
        }
    }
}

/// Looks after the counts as long as the network is in use.
pub(crate) async fn keep(gates: Weak<Gates>) {
    let mut before = BTreeMap::new();
    loop {
        tokio::time::sleep(TICK).await;
        let Some(gates) = gates.upgrade() else {
            return;
        };
        let now = gates.fast.look();
        if before
            .iter()
            .any(|(slot, counts)| is_still(counts, now.get(slot)))
        {
            let fast = std::sync::Arc::clone(&gates);
            let corrected = tokio::task::spawn_blocking(move || {
                grace::grace_period().map(|()| fast.fast.correct(&before))
            });
            if let Ok(Err(error)) = corrected.await {
                tracing::warn!(%error, "no grace period: flows behind a lost frame keep taking the kernel's way");
            }
        }
        before = now;
    }
}

fn is_still(before: &Counts, now: Option<&Counts>) -> bool {
    let now = now.into_iter().flatten();
    before
        .iter()
        .zip(now)
        .any(|(before, now)| missing(*before, *now).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bucket_that_stands_still_is_corrected() {
        assert_eq!(missing((5, 3), (5, 3)), Some(2));
        assert_eq!(missing((5, 3), (6, 3)), None);
        assert_eq!(missing((5, 3), (5, 4)), None);
        assert_eq!(missing((5, 5), (5, 5)), None);
        assert_eq!(missing((3, 5), (3, 5)), Some(2u64.wrapping_neg()));
    }
}
