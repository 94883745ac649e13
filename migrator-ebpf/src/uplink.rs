//! The fast way: from the uplink straight to the TAP, without overtaking anything.
//!
//! ```text
//!   uplink --> [uplink: XDP] --redirect--> batch of this poll --> TAP's queue --> guest
//!                   |                                                ^
//!                   +--pass--> GRO, backlog, bridge --> [gate] ------+--> park
//!                  `passed`                            `arrived`
//! ```
//!
//! Two ways to one queue: a frame on either must not overtake one of its own flow on the other.
//!
//! **From the kernel's way to the fast one.** Each frame of a fast kind that the program leaves to the kernel is counted in
//! `passed` of its bucket, each one that comes to the gate from the uplink in `arrived`; the gate adds to `parked` first. A
//! frame may be redirected if `arrived == passed` and `parked == done`: then no frame of its bucket is on the kernel's way, nor in
//! the park. The older counter of each pair is read first, so that a frame between the two reads shows as one that is missing.
//! GRO may make one skb of many frames: it counts for as many (`gso_segs`). A frame that the kernel loses keeps its bucket on the
//! kernel's way until the service has seen it stand still, and corrects `arrived`.
//!
//! **From the fast way to the kernel's.** Redirected frames are in the TAP's queue only at the end of the poll (`xdp_do_flush`), while
//! one that is passed after them may get there within it. So nothing but the gate's word brings a bucket back: once it may be redirected, the word
//! is kept as its latch, and as long as the gate has this word everything of the bucket is redirected. Whether a frame is of a fast kind
//! is the same for a whole flow, see [`is_fast_kind`](crate::is_fast_kind). The word changes with HOLD, whose frames come into the park: behind
//! what the TAP's queue holds once every CPU has left the poll that it was in, which is waited for before that queue is read.
//!
//! **Several queues.** A flow stays in one receive queue, and a queue is polled by one CPU at a time (`NAPI_STATE_SCHED`). Each queue has latches
//! of its own, so the two rules above are about one thread of execution: what another queue does to the bucket's counters can only
//! keep this one on the kernel's way.
//!
//! **A departed pod's frames.** In TUNNEL the program may put the headers around a frame itself and send it out, if the slot has an [`Outer`](crate::Outer). Then no frame of a
//! fast kind that comes in by the uplink takes the kernel's tunnel under that word: it is sent on here, or parked and relayed. So the rule above
//! holds as it is: with `arrived == passed`, all earlier frames have been parked, under this word or one before it, and with `parked == done` the other node's guest has them. A latched
//! bucket stays here. A frame that cannot be sent after all spills its bucket: for good under this word, the bucket is the relay's.

use crate::packet::{Bytes, ETH_P_IP, HEADER};
use crate::settled::{flip_of, settle};
use crate::{BUCKETS, MAX_SLOTS};

/// Receive queues of an uplink that have latches; frames of others take the kernel's way.
pub const QUEUES_MAX: u32 = 16;

/// A pod on this node, by its MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Local {
    /// Its slot.
    pub slot: u16,
    /// Longest frame that its TAP takes, in bytes.
    pub frame_max: u16,
}

const _: () = assert!(size_of::<Local>() == 4);

/// Index of a bucket's latch, of one receive queue.
pub const fn latch_index(queue: u32, bucket_index: u32) -> u32 {
    queue * (MAX_SLOTS * BUCKETS) + bucket_index
}

/// What a bucket's latch says once a frame could not be sent on: under this word the bucket is the relay's.
#[inline(always)]
pub const fn spilled(word: u64) -> u64 {
    // No flip's own, and another for each flip.
    settle(flip_of(word))
}

/// Whether nothing of a bucket is on the kernel's way or in the park. The counters must have been read in this order.
#[inline(always)]
pub const fn may_open(arrived: u64, passed: u64, done: u64, parked: u64) -> bool {
    // Not `>=`: more arrivals than frames is a count that is wrong.
    arrived == passed && parked.wrapping_sub(done) as i64 <= 0
}

/// What an IP packet says of its length, beside what there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// It is here, and the TAP takes it.
    Whole,
    /// Longer than the TAP takes: frames that were joined to one.
    TooLong,
    /// Not all of it is where the program sees it.
    Elsewhere,
}

/// Compares the length of an untagged IP packet of type `kind` with that of the frame, `len`.
#[inline(always)]
pub fn extent(frame: &impl Bytes, kind: u16, len: usize, frame_max: usize) -> Extent {
    // RFC 791 total length; RFC 8200 payload length, behind 40 bytes.
    let (at, more) = if kind == ETH_P_IP { (2, 0) } else { (4, 40) };
    let said = match frame.load(HEADER + at) {
        Some(bytes) => HEADER + more + u16::from_be_bytes(bytes) as usize,
        None => usize::MAX,
    };
    if said > len {
        Extent::Elsewhere
    } else if len > frame_max {
        Extent::TooLong
    } else {
        Extent::Whole
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{ETH_P_IPV6, FrameBytes};

    #[test]
    fn a_bucket_opens_only_when_nothing_of_it_is_under_way() {
        assert!(may_open(7, 7, 3, 3));
        assert!(!may_open(6, 7, 3, 3), "one is on the kernel's way");
        assert!(!may_open(8, 7, 3, 3), "a count is wrong");
        assert!(!may_open(7, 7, 3, 4), "one is parked");
        assert!(may_open(7, 7, 4, 3), "as the gate forgives it");
        assert!(may_open(0, 0, 0, 0));
    }

    #[test]
    fn every_queue_has_latches_of_its_own() {
        let last = crate::bucket_index((MAX_SLOTS - 1) as u16, 255);
        assert_eq!(latch_index(1, 0), latch_index(0, last) + 1);
    }

    #[test]
    fn the_length_decides_whether_a_frame_is_whole() {
        let mut frame = [0u8; 80];
        frame[16..18].copy_from_slice(&46u16.to_be_bytes());
        let ip = |len: usize, max| extent(&FrameBytes(&frame[..len]), ETH_P_IP, len, max);
        assert_eq!(ip(60, 1514), Extent::Whole);
        assert_eq!(ip(64, 1514), Extent::Whole, "padding");
        assert_eq!(ip(59, 1514), Extent::Elsewhere);
        assert_eq!(ip(60, 59), Extent::TooLong);
        assert_eq!(ip(16, 1514), Extent::Elsewhere);
        let mut frame = [0u8; 80];
        frame[18..20].copy_from_slice(&10u16.to_be_bytes());
        let ip6 = |len: usize| extent(&FrameBytes(&frame[..len]), ETH_P_IPV6, len, 1514);
        assert_eq!(ip6(64), Extent::Whole);
        assert_eq!(ip6(63), Extent::Elsewhere);
    }
}
