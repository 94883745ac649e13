//! What the programs tell of a frame while somebody watches its pod.

use crate::{Counter, Gate, Verdict};

/// Bytes of a frame's head that are copied: Ethernet, two tags, IPv6 with a fragment header, and TCP without options are 90.
pub const TRACE_HEAD: usize = 96;

/// Bytes of the ring that the programs write into: some 2,000 frames.
pub const TRACE_RING_BYTES: u32 = 256 << 10;

/// Which program saw the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Direction {
    /// The gate: a frame for the guest.
    In = 0,
    /// The guard: a frame from the guest.
    Out = 1,
}

/// One frame and what became of it, as it lies in the ring.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct TraceEvent {
    /// `CLOCK_MONOTONIC` in nanoseconds.
    pub at_ns: u64,
    /// The gate's word that the program read.
    pub word: u64,
    /// Length of the frame.
    pub length: u32,
    /// Whose gate.
    pub slot: u16,
    /// The tag that the kernel keeps beside the frame; meaningless unless `vlan_protocol` is set.
    pub vlan_tci: u16,
    /// That tag's EtherType; 0: there is none.
    pub vlan_protocol: u16,
    /// [`Counter`] that booked the frame.
    pub counter: u8,
    /// [`Direction`].
    pub direction: u8,
    /// The bucket of its flow; the guard has none, and says 0.
    pub bucket: u8,
    /// How many bytes of `head` are the frame's. Those behind them are left over from other events.
    pub copied: u8,
    /// Two bytes that make the length a multiple of eight.
    pub unused: [u8; 2],
    /// Where the frame begins.
    pub head: [u8; TRACE_HEAD],
}

const _: () = assert!(size_of::<TraceEvent>() == 32 + TRACE_HEAD);
const _: () = assert!(TRACE_HEAD <= u8::MAX as usize && TRACE_HEAD.is_multiple_of(8));

impl TraceEvent {
    /// Reads an event out of the ring; `None` if it has another length.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; size_of::<Self>()] = bytes.try_into().ok()?;
        let (numbers, head) = bytes.split_first_chunk::<32>()?;
        let u16_at = |at: usize| u16::from_ne_bytes([numbers[at], numbers[at + 1]]);
        let (at_ns, rest) = numbers.split_first_chunk()?;
        let (word, rest) = rest.split_first_chunk()?;
        let (length, _) = rest.split_first_chunk()?;
        Some(Self {
            at_ns: u64::from_ne_bytes(*at_ns),
            word: u64::from_ne_bytes(*word),
            length: u32::from_ne_bytes(*length),
            slot: u16_at(20),
            vlan_tci: u16_at(22),
            vlan_protocol: u16_at(24),
            counter: numbers[26],
            direction: numbers[27],
            bucket: numbers[28],
            copied: numbers[29],
            unused: [0; 2],
            head: head.try_into().ok()?,
        })
    }

    /// The frame's first bytes.
    pub fn head(&self) -> &[u8] {
        let copied = usize::from(self.copied).min(TRACE_HEAD);
        &self.head[..copied]
    }

    /// The gate as the program read it.
    pub fn gate(&self) -> Gate {
        Gate::from_word(self.word)
    }

    /// The counter that booked the frame; `None` for a program that is newer than this code.
    pub fn counter(&self) -> Option<Counter> {
        Counter::ALL
            .into_iter()
            .find(|counter| *counter as u32 == u32::from(self.counter))
    }

    /// Which program saw it.
    pub fn direction(&self) -> Direction {
        match self.direction {
            0 => Direction::In,
            1.. => Direction::Out,
        }
    }
}

/// What became of a frame, by the counter that booked it.
pub const fn verdict_of(counter: Counter) -> Verdict {
    match counter {
        Counter::Passed | Counter::Sent | Counter::Homed => Verdict::Pass(counter),
        Counter::ParkedLocal | Counter::ParkedHold | Counter::ParkedForward => {
            Verdict::Park(counter)
        }
        Counter::RefusedEcho => Verdict::Show(counter),
        Counter::SentOut => Verdict::Out(counter),
        Counter::ForwardedTunnel | Counter::ForwardedXdp | Counter::SentBound => {
            Verdict::Tunnel(counter)
        }
        Counter::Landed | Counter::Fast => Verdict::Pass(counter),
        Counter::RefusedShut
        | Counter::RefusedNoSlot
        | Counter::RefusedGroup
        | Counter::FastLost
        | Counter::FastFull
        | Counter::ForwardedXdpLost
        | Counter::Blocked => Verdict::Drop(counter),
    }
}

/// Whether a slot is watched: its word in the map is the `CLOCK_MONOTONIC` nanosecond at which that ends by itself, 0 if nobody
/// watches. So a watcher that is killed leaves nothing on.
#[inline(always)]
pub fn is_watched(until_ns: u64, now_ns: impl FnOnce() -> u64) -> bool {
    until_ns != 0 && now_ns() < until_ns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_reads_back_as_it_lies_in_the_ring() {
        let mut bytes = [0u8; size_of::<TraceEvent>()];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = i as u8;
        }
        bytes[26] = Counter::ParkedHold as u8;
        bytes[27] = Direction::Out as u8;
        // A length that no program writes.
        bytes[29] = 255;
        // SAFETY: `repr(C)` without padding, as the assertion on its size says; every bit pattern is valid.
        let laid: TraceEvent = unsafe { bytes.as_ptr().cast::<TraceEvent>().read_unaligned() };
        let read = TraceEvent::from_bytes(&bytes).unwrap();
        assert_eq!(
            (laid.at_ns, laid.word, laid.length, laid.slot),
            (read.at_ns, read.word, read.length, read.slot)
        );
        assert_eq!(
            (laid.vlan_tci, laid.vlan_protocol, laid.bucket, laid.copied),
            (read.vlan_tci, read.vlan_protocol, read.bucket, read.copied)
        );
        assert_eq!(laid.head, read.head);
        assert_eq!(read.counter(), Some(Counter::ParkedHold));
        assert_eq!(read.direction(), Direction::Out);
        assert_eq!(read.head().len(), TRACE_HEAD);
        assert!(TraceEvent::from_bytes(&bytes[1..]).is_none());
    }

    #[test]
    fn a_watch_ends_by_itself_and_costs_no_clock_when_off() {
        assert!(!is_watched(0, || panic!("the clock is not asked")));
        assert!(is_watched(10, || 9));
        assert!(!is_watched(10, || 10));
    }

    #[test]
    fn a_verdict_keeps_its_counter() {
        for counter in Counter::ALL {
            assert_eq!(verdict_of(counter).counter(), counter);
        }
    }
}
