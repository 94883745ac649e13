//! The endpoint table of a routed cluster: which node an address is at, and the frame that ends an old way.
//!
//! ```text
//!   address --ENDPOINTS--> index, MAC      index --PLACES--> epoch, node number      number --NODES--> where the tunnel leads
//! ```
//!
//! Both addresses of a pod have one index, so one store of eight bytes moves both.

use crate::packet::{Bytes, ETH_P_IP, ETH_P_IPV6, HEADER, bucket};
use crate::{GATEWAY_MAC, MAC_LEN};

/// Pods of a whole cluster that a node knows at most.
pub const MAX_ENDPOINTS: u32 = 8192;

/// Nodes that a node numbers, itself included.
pub const MAX_NODES: u32 = 256;

/// The number that a node has for itself.
pub const HERE: u16 = 0;

/// Outer UDP source ports that one node sends to another from. A flow stays on one, and an end marker goes out on each: so it follows every
/// frame through whatever chooses by the outer header (receive queues, equal-cost paths).
pub const LANES: u16 = 16;

/// What an address stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Endpoint {
    /// Index of the pod in the places.
    pub index: u32,
    /// The pod's MAC address.
    pub mac: [u8; MAC_LEN],
    /// Zero.
    pub spare: u16,
}

/// Where a pod is: one aligned `u64`, so that one store moves it.
///
/// ```text
/// bits  0..16  node number, 0: this node
/// bits 16..64  the pod's epoch
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// This node's number for the node.
    pub node: u16,
    /// The pod's epoch there; 48 bits of it.
    pub epoch: u64,
}

impl Place {
    /// The word that the map holds.
    pub const fn to_word(self) -> u64 {
        self.node as u64 | self.epoch << 16
    }

    /// Reads a word.
    pub const fn from_word(word: u64) -> Self {
        Self {
            node: word as u16,
            epoch: word >> 16,
        }
    }
}

/// The key of an address in the map of endpoints: IPv6, or IPv4 mapped into it (RFC 4291, 2.5.5.2).
pub const fn mapped(v4: [u8; 4]) -> [u8; 16] {
    let [a, b, c, d] = v4;
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}

/// The key of the address that an untagged frame is for. `None`: no IP.
#[inline(always)]
pub fn destination_address(frame: &impl Bytes) -> Option<[u8; 16]> {
    match u16::from_be_bytes(frame.load(12)?) {
        // RFC 791, RFC 8200: where the destination is.
        ETH_P_IP => Some(mapped(frame.load(HEADER + 16)?)),
        ETH_P_IPV6 => frame.load(HEADER + 24),
        _ => None,
    }
}

/// The flow hash that a frame leaves with, and its outer source port follows from (`udp_flow_src_port` in the kernel's
/// include/net/udp_tunnel.h looks at the upper half). Never 0, which stands for none.
#[inline(always)]
pub const fn lane_hash(lane: u16) -> u32 {
    ((lane % LANES) as u32) << 28 | 1 << 27
}

/// The lane of a frame's flow. Fragments are on the lane of their flow.
#[inline(always)]
pub fn lane_of(frame: &impl Bytes) -> u16 {
    bucket(frame) as u16 % LANES
}

/// What `steer` and `landing` have counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum Steered {
    /// Sent to the node where the pod is.
    Sent = 0,
    /// The pod is here, and the kernel had no route to it yet: given to its TAP.
    Here = 1,
    /// A frame that the gate of a departed pod sends on.
    Departed = 2,
    /// An end marker, sent.
    Marker = 3,
    /// Came out of the tunnel for a pod that is at another node: sent on.
    Relayed = 4,
    /// Dropped: no pod has that address.
    Unknown = 5,
    /// Dropped: the pod is here, and has no TAP; or its node has no address.
    Nowhere = 6,
    /// Dropped: no IP, or a group.
    NoIp = 7,
    /// Dropped: was sent on too often.
    TooFar = 8,
    /// An end marker that came.
    MarkerCame = 9,
}

impl Steered {
    /// All of them, in order.
    pub const ALL: [Self; 10] = [
        Self::Sent,
        Self::Here,
        Self::Departed,
        Self::Marker,
        Self::Relayed,
        Self::Unknown,
        Self::Nowhere,
        Self::NoIp,
        Self::TooFar,
        Self::MarkerCame,
    ];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sent => "sent",
            Self::Here => "here",
            Self::Departed => "departed",
            Self::Marker => "marker",
            Self::Relayed => "relayed",
            Self::Unknown => "dropped_unknown",
            Self::Nowhere => "dropped_nowhere",
            Self::NoIp => "dropped_no_ip",
            Self::TooFar => "dropped_too_far",
            Self::MarkerCame => "marker_came",
        }
    }
}

/// A frame behind the last one that a node sends a pod by its old way. The sender puts one on each lane from each CPU; the node that the pod has left
/// shows them to its service.
///
/// ```text
/// destination 6: the pod | source 6 | EtherType 0x88b5 | magic 8 | node u16 | part u16 | parts u16 | nonce u64      big endian
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndMarker {
    /// The sender's number for the node that it goes to: `steer` looks it up.
    pub node: u16,
    /// Which of the sender's markers this is, from 0: CPU times [`LANES`] plus lane.
    pub part: u16,
    /// How many there are.
    pub parts: u16,
    /// What the node that the pod has left gave the sender: tells whose it is, and of which departure.
    pub nonce: u64,
}

impl EndMarker {
    /// Bytes of the frame: Ethernet's shortest, without the check sequence.
    pub const LEN: usize = 60;
    /// Where what is not an address begins.
    pub const AT: usize = 12;
    /// Bytes from there to the end of the nonce.
    pub const BODY: usize = 24;

    /// EtherType for local experiments (IEEE 802, "Local Experimental Ethertype 1"), then a magic word.
    const HEAD: [u8; 10] = *b"\x88\xb5migr-end";

    /// The frame, for the pod at `mac`.
    pub fn frame(self, mac: [u8; MAC_LEN]) -> [u8; Self::LEN] {
        let mut frame = [0; Self::LEN];
        frame[..6].copy_from_slice(&mac);
        frame[6..12].copy_from_slice(&GATEWAY_MAC);
        frame[12..22].copy_from_slice(&Self::HEAD);
        frame[22..24].copy_from_slice(&self.node.to_be_bytes());
        frame[24..26].copy_from_slice(&self.part.to_be_bytes());
        frame[26..28].copy_from_slice(&self.parts.to_be_bytes());
        frame[28..36].copy_from_slice(&self.nonce.to_be_bytes());
        frame
    }

    /// Reads what follows the two addresses. `None`: an ordinary frame.
    #[inline(always)]
    pub fn parse(body: [u8; Self::BODY]) -> Option<Self> {
        let [
            t0,
            t1,
            m0,
            m1,
            m2,
            m3,
            m4,
            m5,
            m6,
            m7,
            o0,
            o1,
            p0,
            p1,
            q0,
            q1,
            n @ ..,
        ] = body;
        if [t0, t1, m0, m1, m2, m3, m4, m5, m6, m7] != Self::HEAD {
            return None;
        }
        Some(Self {
            node: u16::from_be_bytes([o0, o1]),
            part: u16::from_be_bytes([p0, p1]),
            parts: u16::from_be_bytes([q0, q1]),
            nonce: u64::from_be_bytes(n),
        })
    }

    /// Reads a frame.
    #[inline(always)]
    pub fn of(frame: &impl Bytes) -> Option<Self> {
        Self::parse(frame.load(Self::AT)?)
    }
}

/// The TTL of an outer packet that is sent on for a pod which has left this node; `None`: it has been sent on too often.
///
/// The places that a frame is sent on by have growing epochs, so it ends where the pod is. Were two nodes' tables wrong about each other, this ends it:
/// each such step takes eight hops off what is left.
#[inline(always)]
pub const fn next_ttl(came_with: u8) -> Option<u8> {
    const STEP: u8 = 8;
    if came_with > 2 * STEP {
        Some(came_with - STEP)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FrameBytes;

    #[test]
    fn a_place_is_one_word_and_reads_back() {
        let place = Place {
            node: 0x0102,
            epoch: 0x0304_0506_0708,
        };
        assert_eq!(place.to_word(), 0x0304_0506_0708_0102);
        assert_eq!(Place::from_word(place.to_word()), place);
        assert_eq!(Place::from_word(0).node, HERE);
    }

    #[test]
    fn an_end_marker_reads_back_and_an_ordinary_frame_is_none() {
        let marker = EndMarker {
            node: 2,
            part: 17,
            parts: 32,
            nonce: 0x1122_3344_5566_7788,
        };
        let frame = marker.frame([0x52, 0x54, 0, 1, 2, 3]);
        assert_eq!(frame[..6], [0x52, 0x54, 0, 1, 2, 3]);
        assert_eq!(EndMarker::of(&FrameBytes(&frame)), Some(marker));
        assert_eq!(EndMarker::of(&FrameBytes(&frame[..35])), None);
        for changed in 12..22 {
            let mut other = frame;
            other[changed] ^= 1;
            assert_eq!(EndMarker::of(&FrameBytes(&other)), None, "byte {changed}");
        }
        let probe = crate::Probe { slot: 1, number: 2 }.ask([0x52, 0x54, 0, 1, 2, 3]);
        assert_eq!(EndMarker::of(&FrameBytes(&probe)), None);
    }

    #[test]
    fn the_destination_of_either_family_is_a_key() {
        let mut frame = [0u8; 74];
        (frame[12], frame[13]) = (0x08, 0x00);
        frame[30..34].copy_from_slice(&[10, 77, 0, 10]);
        let mut key = [0; 16];
        (key[10], key[11]) = (0xff, 0xff);
        key[12..].copy_from_slice(&[10, 77, 0, 10]);
        assert_eq!(destination_address(&FrameBytes(&frame)), Some(key));
        (frame[12], frame[13]) = (0x86, 0xdd);
        frame[38..54].copy_from_slice(&[7; 16]);
        assert_eq!(destination_address(&FrameBytes(&frame)), Some([7; 16]));
        assert_eq!(destination_address(&FrameBytes(&frame[..50])), None);
        (frame[12], frame[13]) = (0x08, 0x06);
        assert_eq!(destination_address(&FrameBytes(&frame)), None);
    }

    #[test]
    fn every_lane_has_a_source_port_of_its_own() {
        // `udp_flow_src_port`, with the kernel's default range.
        let port = |hash: u32| {
            let hash = hash ^ hash << 16;
            ((u64::from(hash) * (60999 - 32768)) >> 32) + 32768
        };
        for lane in 1..LANES {
            assert!(port(lane_hash(lane)) > port(lane_hash(lane - 1)));
            assert_ne!(lane_hash(lane), 0);
        }
        assert_eq!(lane_hash(LANES), lane_hash(0));
    }

    #[test]
    fn a_frame_in_a_circle_ends() {
        let (mut ttl, mut steps) = (64, 0);
        while let Some(next) = next_ttl(ttl) {
            assert!(next < ttl);
            ttl = next;
            steps += 1;
        }
        assert_eq!(steps, 6);
        assert_eq!(next_ttl(0), None);
    }

    #[test]
    fn names_differ() {
        for (at, one) in Steered::ALL.into_iter().enumerate() {
            assert_eq!(one as usize, at);
            for other in Steered::ALL.into_iter().skip(at + 1) {
                assert_ne!(one.name(), other.name());
            }
        }
    }
}
