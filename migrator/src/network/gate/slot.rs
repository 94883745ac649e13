//! The gate of one pod: its word, what waits in its buckets, and its counters.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use aya::maps::PerCpuValues;
use migrator_ebpf::{CounterRow, Gate, NO_SLOT_ROW, bucket_index, names};

use super::{Gates, lock};
use crate::network::error::GateError;

/// A bit of a slot's word in [`names::INJECTED`], beside a number of the log, none of which has it: see [`SlotGate::own_injected`].
const OWN_INJECTED: u64 = 1 << 62;

/// The gate of one slot.
#[derive(Clone, Debug)]
pub(crate) struct SlotGate {
    pub(super) gates: Arc<Gates>,
    pub(super) slot: u16,
}

impl SlotGate {
    pub(crate) fn slot(&self) -> u16 {
        self.slot
    }

    fn word(&self) -> &AtomicU64 {
        static SHUT: AtomicU64 = AtomicU64::new(0);
        // A slot is checked against MAX_SLOTS when it is attached.
        self.gates.words.get(u32::from(self.slot)).unwrap_or(&SHUT)
    }

    pub(crate) fn get(&self) -> Gate {
        Gate::from_word(self.word().load(Ordering::Acquire))
    }

    /// Flips the gate: one 8-byte store.
    pub(crate) fn set(&self, gate: Gate) {
        self.word().store(gate.to_word(), Ordering::Release);
        self.gates.flips.note(self.slot);
    }

    pub(crate) fn parked(&self, bucket: u8) -> u64 {
        let index = bucket_index(self.slot, bucket);
        let parked = self.gates.parked.get(index);
        parked.map_or(0, |value| value.load(Ordering::Acquire))
    }

    pub(crate) fn done(&self, bucket: u8) -> u64 {
        let index = bucket_index(self.slot, bucket);
        let done = self.gates.done.get(index);
        done.map_or(0, |value| value.load(Ordering::Acquire))
    }

    /// Parked frames, over all buckets, that have not left the service: in the park, or lost with it.
    pub(crate) fn waiting(&self) -> u64 {
        let of = |bucket| self.parked(bucket).wrapping_sub(self.done(bucket)) as i64;
        (0..=u8::MAX).map(|bucket| of(bucket).max(0) as u64).sum()
    }

    /// The counters, and what waits, of one moment: no frame is parked from the one to the other, unless frames come faster than both can be read.
    /// For a slot that no thread serves.
    pub(crate) fn counters_and_waiting(&self) -> Result<(CounterRow, u64), GateError> {
        /// At 300,000 frames a second, every fifth attempt meets none.
        const ATTEMPTS: u32 = 1000;
        let mut before = self.waiting();
        for _ in 1..ATTEMPTS {
            let counters = self.counters()?;
            let waiting = self.waiting();
            if waiting == before {
                return Ok((counters, waiting));
            }
            before = waiting;
        }
        Ok((self.counters()?, before))
    }

    /// A parked frame of the bucket has left the service. `done` never passes `parked`: if the kernel
    /// cut one parked frame into several on its way here, they count as one.
    pub(crate) fn add_done(&self, bucket: u8) {
        let done = self.done(bucket);
        if self.parked(bucket).wrapping_sub(done) as i64 > 0 {
            self.set_done(bucket, done.wrapping_add(1));
        }
    }

    /// Only one thread of one service writes `done`.
    pub(crate) fn set_done(&self, bucket: u8, value: u64) {
        let index = bucket_index(self.slot, bucket);
        if let Some(done) = self.gates.done.get(index) {
            done.store(value, Ordering::Release);
        }
    }

    fn noted(&self) -> u64 {
        let injected = self.gates.injected.get(u32::from(self.slot));
        injected.map_or(0, |value| value.load(Ordering::Acquire))
    }

    /// How far the log of the pod's arrival was injected; outlives the service. 0: not at all. From a hold on, how far
    /// the log of its departure was: acknowledged, or rolled back; `u64::MAX` if that log is in memory only.
    pub(crate) fn injected(&self) -> u64 {
        match self.noted() {
            u64::MAX => u64::MAX,
            noted => noted & !OWN_INJECTED,
        }
    }

    /// See [`injected`](Self::injected).
    pub(crate) fn set_injected(&self, seq: u64) {
        if let Some(injected) = self.gates.injected.get(u32::from(self.slot)) {
            injected.store(seq, Ordering::Release);
        }
    }

    /// What [`injected`](Self::injected) becomes with the next frame that is injected; `None`: it stays. The gate's program does that in the same call
    /// that puts the frame into the TAP.
    pub(crate) fn set_injected_next(&self, seq: Option<u64>) {
        if let Some(next) = self.gates.injected_next.get(u32::from(self.slot)) {
            next.store(seq.unwrap_or(0), Ordering::Release);
        }
    }

    /// With the next frame that is injected, [`own_injected`](Self::own_injected) becomes true.
    pub(crate) fn set_own_next(&self) {
        self.set_injected_next(match self.noted() {
            u64::MAX => None,
            noted => Some(noted | OWN_INJECTED),
        });
    }

    /// Whether a frame was injected that came out of the park and is in no log, since that was forgotten.
    pub(crate) fn own_injected(&self) -> bool {
        !matches!(self.noted(), u64::MAX) && self.noted() & OWN_INJECTED != 0
    }

    /// See [`own_injected`](Self::own_injected).
    pub(crate) fn forget_own(&self) {
        self.set_injected(self.injected());
    }

    /// As [`set_injected`](Self::set_injected), but never backwards.
    pub(crate) fn raise_injected(&self, seq: u64) {
        if seq > self.injected() {
            self.set_injected(seq);
        }
    }

    /// Nothing waits in any bucket, and no log was injected: for a slot whose park is new.
    pub(crate) fn clear(&self) -> Result<(), GateError> {
        self.set_injected(0);
        self.gates.fast.clear(self.slot);
        for bucket in 0..=u8::MAX {
            self.set_done(bucket, self.parked(bucket));
        }
        let cpus = aya::util::nr_cpus()
            .map_err(|(_, error)| self.gates.map_error(names::COUNTERS, error.into()))?;
        let zero = PerCpuValues::try_from(vec![CounterRow::default(); cpus])
            .map_err(|error| self.gates.map_error(names::COUNTERS, error.into()))?;
        lock(&self.gates.counters)
            .set(u32::from(self.slot), zero, 0)
            .map_err(|error| self.gates.map_error(names::COUNTERS, error.into()))
    }

    /// The slot's counters, over all CPUs.
    pub(crate) fn counters(&self) -> Result<CounterRow, GateError> {
        debug_assert!(u32::from(self.slot) < NO_SLOT_ROW);
        let values = lock(&self.gates.counters)
            .get(&u32::from(self.slot), 0)
            .map_err(|error| self.gates.map_error(names::COUNTERS, error.into()))?;
        let mut sum = CounterRow::default();
        for row in values.iter() {
            for (total, value) in sum.0.iter_mut().zip(row.0) {
                *total += value;
            }
        }
        Ok(sum)
    }
}
