//! Finds out which open gates have nothing waiting, and tells their programs. Why that keeps the order is in `migrator_ebpf`'s module `settled`.

use std::sync::Weak;
use std::sync::atomic::Ordering;
use std::time::Duration;

use migrator_ebpf::{Gate, MAX_SLOTS, Mode, bucket_index, is_settled, settle};

use super::Gates;
use crate::network::grace;

/// Between two looks. A gate that has just opened works as well, a tenth of a microsecond a frame slower.
const TICK: Duration = Duration::from_millis(100);

/// A gate that may be settled.
#[derive(Debug, PartialEq, Eq)]
struct Look {
    slot: u16,
    word: u64,
    parked: Vec<u64>,
}

/// A slot's `parked`, if none of its buckets waits. `done` is read before `parked` of the same bucket, as the gate does.
fn nothing_waits(buckets: impl Iterator<Item = (u64, u64)>) -> Option<Vec<u64>> {
    buckets
        .map(|(done, parked)| (parked.wrapping_sub(done) as i64 <= 0).then_some(parked))
        .collect()
}

impl Gates {
    fn look(&self, slot: u16) -> Option<Look> {
        let word = self.words.get(u32::from(slot))?.load(Ordering::Acquire);
        let gate = Gate::from_word(word);
        if gate.mode != Mode::Local || gate.slot != slot || is_settled(word, slot) {
            return None;
        }
        let buckets = (0..=u8::MAX).map(|bucket| {
            let index = bucket_index(slot, bucket);
            let of = |words: &super::MappedWords| {
                let word = words.get(index);
                word.map_or(0, |word| word.load(Ordering::Acquire))
            };
            (of(&self.done), of(&self.parked))
        });
        let parked = nothing_waits(buckets)?;
        Some(Look { slot, word, parked })
    }

    fn idle(&self) -> Vec<Look> {
        let slots = (0..MAX_SLOTS).filter_map(|slot| u16::try_from(slot).ok());
        slots.filter_map(|slot| self.look(slot)).collect()
    }

    /// Settles the gates that are as they were before a grace period.
    fn settle(&self, before: &[Look]) {
        for look in before {
            if self.look(look.slot).as_ref() != Some(look) {
                continue;
            }
            if let Some(word) = self.words.get(u32::from(look.slot)) {
                // Fails if the gate was flipped just now: then it is another one's turn.
                let _ = word.compare_exchange(
                    look.word,
                    settle(look.word),
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                );
            }
        }
    }
}

/// Settles gates as long as the network is in use.
pub(crate) async fn keep_settled(gates: Weak<Gates>) {
    loop {
        tokio::time::sleep(TICK).await;
        let Some(gates) = gates.upgrade() else {
            return;
        };
        let idle = gates.idle();
        if idle.is_empty() {
            continue;
        }
        let settled = tokio::task::spawn_blocking(move || {
            grace::grace_period().map(|()| gates.settle(&idle))
        });
        if let Ok(Err(error)) = settled.await {
            tracing::warn!(%error, "no grace period: open gates look at every frame");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_idle_only_if_none_of_its_buckets_waits() {
        let of = |buckets: &[(u64, u64)]| nothing_waits(buckets.iter().copied());
        assert_eq!(of(&[(3, 3), (0, 0)]), Some(vec![3, 0]));
        assert_eq!(of(&[(3, 3), (4, 5)]), None);
        assert_eq!(of(&[(u64::MAX, 0)]), None, "one waits, over the end");
        assert_eq!(of(&[(6, 5)]), Some(vec![5]), "as the gate forgives it");
    }
}
