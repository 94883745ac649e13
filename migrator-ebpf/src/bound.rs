//! Flows whose address translation stays behind when the pod moves: what its new node leads back to the node that translates (its home), and how that
//! node knows such a frame.
//!
//! ```text
//!   guest --TAP--> guard: LEADS has the flow --tunnel, marked home--> landing: HOMES has it --> the node's own stack, which translates
//!                    ^                                                         HOMES has not
//!                    +------------- landing <----tunnel, marked back-----------------+
//! ```
//!
//! A frame of a flow that its home does not know any more comes back, is let out where the pod is, and so are those after it.

use crate::packet::{Bytes, ETH_P_IP, ETH_P_IPV6, HEADER, IPV6_LEN, UDP};
use crate::{MAX_SLOTS, Tunnel, mapped};

/// Flows that a node leads to other nodes, and as many that it translates for pods that have left.
pub const MAX_BOUND: u32 = 1 << 16;

/// Index of this node's own VXLAN network identifier in the map `LED`, behind the slots.
pub const OWN_VNI: u32 = MAX_SLOTS;

/// The slot in keys of flows whose pod has left.
pub const NO_SLOT: u16 = u16::MAX;

/// IANA's protocol numbers: those whose header begins with two ports.
const TCP: u8 = 6;
const DCCP: u8 = 33;
const SCTP: u8 = 132;
const UDPLITE: u8 = 136;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
/// RFC 791: the bits of the fragment offset and of "more fragments".
const FRAGMENT_BITS: u16 = 0x3fff;
/// RFC 792, RFC 4443: echo request and answer.
const ECHO_V4: [u8; 2] = [8, 0];
const ECHO_V6: [u8; 2] = [128, 129];

/// What the packets look like that a pod sends in one flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct SentKey {
    /// The pod's address, see [`mapped`].
    pub source: [u8; 16],
    /// The receiver's.
    pub destination: [u8; 16],
    /// The two ports, big endian; of an ICMP echo its identifier, and zero.
    pub ports: [u8; 4],
    /// The pod's slot, or [`NO_SLOT`].
    pub slot: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub spare: u8,
}

/// Where a flow's packets are led.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Lead {
    /// The way to its home, with the identifier that is [`marked`] so.
    pub tunnel: Tunnel,
    /// Second of `CLOCK_BOOTTIME` at which this ends at the latest; 0: it has ended.
    pub until_s: u32,
}

/// What becomes of a frame that has come home.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Home {
    /// Interface index of the bridge that takes it for its own; 0: it goes on from the tunnel's device.
    pub device: u32,
    /// Second of `CLOCK_BOOTTIME` at which this ends at the latest.
    pub until_s: u32,
    /// The bridge's MAC address.
    pub mac: [u8; 6],
    /// Zero.
    pub spare: u16,
}

const _: () = assert!(size_of::<SentKey>() == 40);
const _: () = assert!(size_of::<Lead>() == 32);
const _: () = assert!(size_of::<Home>() == 16);

/// What a frame in the tunnel is marked as. The mark is in VXLAN's network identifier: so it is in no part of the frame, and a node without such flows
/// takes it for another network's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// On its way to the node that translates it.
    Home,
    /// Sent back by that node.
    Back,
}

/// The two upper bits of the identifier's 24.
const HOME: u32 = 1 << 23;
const BACK: u32 = 1 << 22;

/// The identifier of marked frames of a network.
#[inline(always)]
pub const fn marked(vni: u32, mark: Mark) -> u32 {
    match mark {
        Mark::Home => vni ^ HOME,
        Mark::Back => vni ^ BACK,
    }
}

/// How a frame with identifier `vni` is marked, for a node of network `own` (0: of none).
#[inline(always)]
pub const fn mark_of(own: u32, vni: u32) -> Option<Mark> {
    if own == 0 {
        return None;
    }
    match own ^ vni {
        HOME => Some(Mark::Home),
        BACK => Some(Mark::Back),
        _ => None,
    }
}

/// The flow of an untagged frame that a pod sends. `None`: of a kind that is not led. Fragments are none: all but the first have no ports.
#[inline(always)]
pub fn sent_key(frame: &impl Bytes, slot: u16) -> Option<SentKey> {
    match u16::from_be_bytes(frame.load(HEADER - 2)?) {
        ETH_P_IP => {
            let header: [u8; 20] = frame.load(HEADER)?;
            if u16::from_be_bytes([header[6], header[7]]) & FRAGMENT_BITS != 0 {
                return None;
            }
            let protocol = header[9];
            let length = usize::from(header[0] & 0x0f) * 4;
            let ports = numbers(frame, HEADER + length, protocol, (ICMP, ECHO_V4))?;
            let [.., a, b, c, d, e, f, g, h] = header;
            Some(SentKey {
                source: mapped([a, b, c, d]),
                destination: mapped([e, f, g, h]),
                ports,
                slot,
                protocol,
                spare: 0,
            })
        }
        ETH_P_IPV6 => {
            let [protocol] = frame.load(HEADER + 6)?;
            let ports = numbers(frame, HEADER + IPV6_LEN, protocol, (ICMPV6, ECHO_V6))?;
            Some(SentKey {
                source: frame.load(HEADER + 8)?,
                destination: frame.load(HEADER + 24)?,
                ports,
                slot,
                protocol,
                spare: 0,
            })
        }
        _ => None,
    }
}

/// Whether flows of this protocol are led: TCP, UDP and their like, and ICMP.
pub const fn has_ports(protocol: u8) -> bool {
    matches!(protocol, TCP | UDP | DCCP | SCTP | UDPLITE)
}

#[inline(always)]
fn numbers(
    frame: &impl Bytes,
    at: usize,
    protocol: u8,
    (icmp, echo): (u8, [u8; 2]),
) -> Option<[u8; 4]> {
    if has_ports(protocol) {
        return frame.load(at);
    }
    if protocol != icmp {
        return None;
    }
    let [kind, _, _, _, high, low]: [u8; 6] = frame.load(at)?;
    if kind != echo[0] && kind != echo[1] {
        return None;
    }
    Some([high, low, 0, 0])
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::vec::Vec;

    use super::*;
    use crate::FrameBytes;

    const ADDRESSES: [u8; 8] = [10, 77, 0, 10, 192, 0, 2, 1];

    fn v4(protocol: u8, fragment: u16, options: usize, rest: &[u8]) -> Vec<u8> {
        let mut frame = std::vec![0; 12];
        frame.extend([8, 0, 0x45 + options as u8, 0, 0, 60, 0, 1]);
        frame.extend(fragment.to_be_bytes());
        frame.extend([64, protocol, 0, 0]);
        frame.extend(ADDRESSES);
        frame.resize(frame.len() + options * 4, 1);
        frame.extend(rest);
        frame
    }

    fn of(frame: &[u8]) -> Option<SentKey> {
        sent_key(&FrameBytes(frame), 7)
    }

    #[test]
    fn ports_are_found_behind_options_and_fragments_have_none() {
        let ports = [0x13, 0x88, 0x01, 0xbb, 9, 9];
        for options in [0, 3] {
            let key = of(&v4(TCP, 0x4000, options, &ports)).unwrap();
            assert_eq!(key.ports, [0x13, 0x88, 0x01, 0xbb]);
            assert_eq!(key.source, mapped([10, 77, 0, 10]));
            assert_eq!(key.destination, mapped([192, 0, 2, 1]));
            assert_eq!((key.protocol, key.slot), (TCP, 7));
        }
        for fragment in [0x2000, 0x2001, 185] {
            assert_eq!(of(&v4(UDP, fragment, 0, &ports)), None);
        }
        assert_eq!(of(&v4(47, 0, 0, &ports)), None, "GRE");
        assert_eq!(of(&v4(TCP, 0, 0, &ports[..3])), None, "cut");
    }

    #[test]
    fn an_echo_is_known_by_its_identifier_and_an_error_is_none() {
        for kind in ECHO_V4 {
            let key = of(&v4(ICMP, 0, 0, &[kind, 0, 1, 2, 0xab, 0xcd, 0, 1])).unwrap();
            assert_eq!(key.ports, [0xab, 0xcd, 0, 0]);
        }
        assert_eq!(of(&v4(ICMP, 0, 0, &[3, 4, 1, 2, 0xab, 0xcd, 0, 1])), None);
    }

    #[test]
    fn a_flow_of_ipv6_has_its_whole_addresses() {
        let mut frame = std::vec![0; 12];
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 8, UDP, 64]);
        frame.extend([0xfd; 16]);
        frame.extend([0xfe; 16]);
        frame.extend([1, 2, 3, 4]);
        let key = of(&frame).unwrap();
        assert_eq!((key.source, key.destination), ([0xfd; 16], [0xfe; 16]));
        assert_eq!(key.ports, [1, 2, 3, 4]);
        for other in [0, 44, 60] {
            frame[20] = other;
            assert_eq!(of(&frame), None, "{other}");
        }
    }

    #[test]
    fn a_mark_is_known_to_nodes_of_the_network_only() {
        for own in [1, 77, 0x00ff_ffff] {
            for mark in [Mark::Home, Mark::Back] {
                let vni = marked(own, mark);
                assert!(vni < 1 << 24 && vni != own);
                assert_eq!(mark_of(own, vni), Some(mark));
                assert_eq!(mark_of(own + 1, vni), None);
                assert_eq!(mark_of(0, vni), None);
            }
            assert_eq!(mark_of(own, own), None);
        }
    }
}
