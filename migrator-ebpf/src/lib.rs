//! What the dataplane programs and user space share: the gate's word, the maps and their values, the
//! counters, and the pure functions over a frame that both sides must compute alike.
//!
//! The pinned maps outlive the service, so a layout here is an on-disk format: change [`ABI`] with it.

#![no_std]

mod bound;
mod checksum;
mod counter;
mod endpoint;
mod gate;
mod meaning;
mod outer;
mod packet;
mod settled;
mod trace;
mod tunnel;
mod uplink;

pub use bound::{
    Home, Lead, MAX_BOUND, Mark, NO_SLOT, OWN_VNI, SentKey, has_ports, mark_of, marked, sent_key,
};
pub use checksum::{UdpSegment, fold, udp_segment};
pub use counter::{COUNTERS_LEN, Counter, CounterRow, LOGGED_WORD};
pub use endpoint::{
    EndMarker, Endpoint, HERE, LANES, MAX_ENDPOINTS, MAX_NODES, Place, Steered,
    destination_address, lane_hash, lane_of, mapped, next_ttl,
};
pub use gate::{Gate, Mode, Verdict, verdict};
pub use outer::{
    Ends, Headers, OUTER_MAX, OUTER_V4, OUTER_V6, Outer, fill_v4, fill_v6, source_port,
};
pub use packet::{
    Bytes, FrameBytes, MAC_LEN, bucket, destination_mac, is_fast_kind, is_group, is_own_echo,
    source_mac,
};
pub use settled::{flip_of, is_settled, settle};
pub use trace::{Direction, TRACE_HEAD, TRACE_RING_BYTES, TraceEvent, is_watched, verdict_of};
pub use tunnel::{Landing, Probe, Tunnel, landing_key};
pub use uplink::{Extent, Local, QUEUES_MAX, extent, latch_index, may_open, spilled};

/// Version of the layouts below; part of the folder that the maps are pinned in.
pub const ABI: u32 = 2;

/// Pods that one node can hold: the maps are sized for it when they are made.
pub const MAX_SLOTS: u32 = 512;

/// Flow buckets of one slot. A flow never leaves its bucket; flows that share one only share their queue.
pub const BUCKETS: u32 = 256;

/// Row of the counters that books frames of a device without a slot.
pub const NO_SLOT_ROW: u32 = MAX_SLOTS;

/// `skb->mark` and `skb->priority` of what the service injects into a TAP, which the gate passes in any mode, and takes off again. Both need
/// CAP_NET_ADMIN (socket(7)), and neither comes from the network.
pub const INJECTED_MARK: u32 = u32::from_be_bytes(*b"migr");
/// See [`INJECTED_MARK`].
pub const INJECTED_PRIORITY: u32 = u32::from_be_bytes(*b"ator");

/// MAC address of each pod's gateway where pods are routed: of the host's side of every TAP on every node, and of what nodes send each other, so
/// that nothing changes in a guest that moves. Locally administered and unicast (IEEE 802); Calico's, too.
pub const GATEWAY_MAC: [u8; MAC_LEN] = [0xee; MAC_LEN];

/// Names of the programs and maps in the object; the maps are pinned under the same names.
pub mod names {
    /// tcx egress program of a pod's TAP.
    pub const GATE: &str = "gate";
    /// tcx ingress program of a pod's TAP.
    pub const GUARD: &str = "guard";
    /// tcx ingress program of the tunnel's device.
    pub const LANDING: &str = "landing";
    /// tcx egress program of the tunnel's device, in a routed cluster.
    pub const STEER: &str = "steer";
    /// Hash of [`crate::Endpoint`], by address, see [`crate::mapped`].
    pub const ENDPOINTS: &str = "ENDPOINTS";
    /// Array of `u64`, by the index of an endpoint: [`crate::Place`]. Memory-mappable.
    pub const PLACES: &str = "PLACES";
    /// Array of [`crate::Tunnel`], by node number.
    pub const NODES: &str = "NODES";
    /// Per-CPU array of `u64`, by [`crate::Steered`].
    pub const STEERED: &str = "STEERED";
    /// Array of [`crate::Tunnel`], by slot.
    pub const TUNNELS: &str = "TUNNELS";
    /// Hash of [`crate::Landing`], by [`crate::landing_key`].
    pub const LANDINGS: &str = "LANDINGS";
    /// Array of `u64`, by slot: the number of the last [`crate::Probe`] that was answered. Memory-mappable.
    pub const PROBED: &str = "PROBED";
    /// Hash of [`crate::Lead`], by [`crate::SentKey`]: flows of pods of this node that are translated at another one.
    pub const LEADS: &str = "LEADS";
    /// Hash of [`crate::Home`], by [`crate::SentKey`]: flows of pods that have left which are translated here.
    pub const HOMES: &str = "HOMES";
    /// Array of `u64`, by slot: 1 if it may have any in [`LEADS`]; then, at [`crate::OWN_VNI`], this node's own. Memory-mappable.
    pub const LED: &str = "LED";
    /// XDP program of the node's uplink.
    pub const UPLINK: &str = "uplink";
    /// XDP program of the entries of [`TAPS`].
    pub const INTO_TAP: &str = "into_tap";
    /// XDP program of the entries of [`WAYS_OUT`].
    pub const ONTO_WIRE: &str = "onto_wire";
    /// Program of the kernel's tracepoint [`DEVMAP_XMIT`].
    pub const TAP_FULL: &str = "tap_full";
    /// include/trace/events/xdp.h: a batch of redirected frames was given to a device.
    pub const DEVMAP_XMIT: &str = "xdp_devmap_xmit";
    /// Array of `u64`, by slot: [`crate::Gate`]. Memory-mappable.
    pub const GATES: &str = "GATES";
    /// Hash of [`crate::Device`], by interface index.
    pub const DEVICES: &str = "DEVICES";
    /// Array of [`crate::Brief`] as `u64`, by interface index: what an open gate needs of [`DEVICES`]. Memory-mappable, not pinned.
    pub const BRIEFS: &str = "BRIEFS";
    /// Array of `u64`, by [`crate::bucket_index`]: frames parked, added by the gate. Memory-mappable.
    pub const PARKED: &str = "PARKED";
    /// Array of `u64`, by [`crate::bucket_index`]: parked frames that have left the service. Memory-mappable.
    pub const DONE: &str = "DONE";
    /// Array of `u64`, by slot: how far the service has injected the log of the pod's arrival, for the service after it.
    /// Memory-mappable.
    pub const INJECTED: &str = "INJECTED";
    /// Array of `u64`, by slot: what [`INJECTED`] is once the gate has passed the frame that the service injects next; 0: what it was. So a service
    /// that is killed in between has noted neither too much nor too little. Memory-mappable.
    pub const INJECTED_NEXT: &str = "INJECTED_NEXT";
    /// Per-CPU array of [`crate::CounterRow`], by slot, and one row more: [`crate::NO_SLOT_ROW`].
    pub const COUNTERS: &str = "COUNTERS";
    /// Array of `u64`, by slot: until when the pod is watched, see [`crate::is_watched`]. Memory-mappable, not pinned.
    pub const TRACE: &str = "TRACE";
    /// Array of `u64`, by slot: frames that the ring had no room for. Memory-mappable, not pinned.
    pub const TRACE_MISSED: &str = "TRACE_MISSED";
    /// Ring buffer of [`crate::TraceEvent`]. Not pinned.
    pub const TRACE_RING: &str = "TRACE_RING";
    /// Hash of [`crate::Local`], by MAC address: the pods that the uplink's program knows.
    pub const LOCALS: &str = "LOCALS";
    /// Hash of devices, by slot: the TAPs that frames are redirected to.
    pub const TAPS: &str = "TAPS";
    /// Hash of [`crate::Outer`], by slot: where the uplink's program sends a departed pod's frames. It is there before the gate's word is TUNNEL, and as
    /// long as the word is.
    pub const OUTERS: &str = "OUTERS";
    /// Hash of devices, by interface index: those that such frames leave by.
    pub const WAYS_OUT: &str = "WAYS_OUT";
    /// Array of `u64`, by [`crate::bucket_index`]: frames that the uplink's program left to the kernel. Memory-mappable.
    pub const PASSED: &str = "PASSED";
    /// Array of `u64`, by [`crate::bucket_index`]: those of them that have come to the gate. Memory-mappable.
    pub const ARRIVED: &str = "ARRIVED";
    /// Array of `u64`, by [`crate::latch_index`]: the gate's word under which a bucket takes the fast way.
    pub const LATCHES: &str = "LATCHES";
}

/// What the programs know about a device they are attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Device {
    /// Interface index of the pod's park.
    pub park: u32,
    /// Interface index of the uplink, once the pod has gone and the network sends to its new place: where frames of the node's own bridge then
    /// go. 0 before.
    pub out: u32,
    /// Interface index of the tunnel's device; 0 if there is none. What comes by it was sent here by another node, and follows the pod.
    pub tunnel: u32,
    /// Interface index of the uplink whose program counts what it leaves to the kernel; 0 if there is none.
    pub uplink: u32,
    /// The pod's slot.
    pub slot: u16,
    /// The pod's MAC address.
    pub mac: [u8; MAC_LEN],
}

const _: () = assert!(size_of::<Device>() == 24);
const _: () = assert!(size_of::<Tunnel>() == 28);
const _: () = assert!(size_of::<Landing>() == 12);
const _: () = assert!(size_of::<Endpoint>() == 12);
const _: () = assert!(size_of::<CounterRow>() == COUNTERS_LEN * 8);

/// Interface indices below this one have a [`Brief`]; devices beyond it are looked up, which takes a little longer.
pub const BRIEFS_MAX: u32 = 1 << 16;

/// What the gate needs of a [`Device`] while nothing waits, in one word. 0: it is in no such place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Brief {
    /// The pod's slot.
    pub slot: u16,
    /// As in [`Device`].
    pub uplink: u32,
}

impl Brief {
    const KNOWN: u64 = 1 << 16;

    /// The word that the map holds.
    pub const fn to_word(self) -> u64 {
        self.slot as u64 | Self::KNOWN | (self.uplink as u64) << 32
    }

    /// Reads a word.
    #[inline(always)]
    pub const fn from_word(word: u64) -> Option<Self> {
        if word & Self::KNOWN == 0 {
            return None;
        }
        Some(Self {
            slot: word as u16,
            uplink: (word >> 32) as u32,
        })
    }
}

/// Index of a bucket in the maps of `parked` and `done` counters.
pub const fn bucket_index(slot: u16, bucket: u8) -> u32 {
    slot as u32 * BUCKETS + bucket as u32
}

#[cfg(feature = "user")]
mod user {
    // SAFETY: `repr(C)`, four `u32`, then 2 + 6 bytes without padding, every bit pattern valid: what a map value needs.
    unsafe impl aya::Pod for super::Device {}
    // SAFETY: `repr(C)`, three `u32` and 16 bytes without padding, every bit pattern valid.
    unsafe impl aya::Pod for super::Tunnel {}
    // SAFETY: `repr(C)`, 4 + 4 + 2 + 2 bytes without padding, every bit pattern valid.
    unsafe impl aya::Pod for super::Landing {}
    // SAFETY: `repr(C)`, 4 + 6 + 2 bytes without padding, every bit pattern valid.
    unsafe impl aya::Pod for super::Endpoint {}
    // SAFETY: `repr(C)`, 16 + 16 + 4 + 2 + 1 + 1 bytes without padding, every bit pattern valid.
    unsafe impl aya::Pod for super::SentKey {}
    // SAFETY: `repr(C)`, a `Tunnel` and a `u32` without padding, every bit pattern valid.
    unsafe impl aya::Pod for super::Lead {}
    // SAFETY: `repr(C)`, two `u32`, then 6 + 2 bytes without padding, every bit pattern valid.
    unsafe impl aya::Pod for super::Home {}
    // SAFETY: `repr(C)`, 2 + 2 bytes without padding, every bit pattern valid.
    unsafe impl aya::Pod for super::Local {}
    // SAFETY: `repr(C)`, four `u32` and 72 bytes, a multiple of its alignment of 8: no padding, every bit pattern valid.
    unsafe impl aya::Pod for super::Outer {}
    // SAFETY: an array of `u64` behind `repr(transparent)`: no padding, every bit pattern valid.
    unsafe impl aya::Pod for super::CounterRow {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_brief_reads_back_and_zero_is_none() {
        for (slot, uplink) in [(0, 0), (7, 3), (u16::MAX, u32::MAX)] {
            let brief = Brief { slot, uplink };
            assert_eq!(Brief::from_word(brief.to_word()), Some(brief));
        }
        assert_eq!(Brief::from_word(0), None);
    }
}
