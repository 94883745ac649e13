//! Reading a frame: just enough to keep the order of its flow, and to know whose it is.

/// Bytes of an Ethernet address.
pub const MAC_LEN: usize = 6;

const ETHERTYPE: usize = 12;
pub(crate) const ETH_P_IP: u16 = 0x0800;
pub(crate) const ETH_P_IPV6: u16 = 0x86dd;
const ETH_P_8021Q: u16 = 0x8100;
const ETH_P_8021AD: u16 = 0x88a8;

/// RFC 791, RFC 8200: offsets of the next protocol, and the length of IPv6's fixed header.
const IPV4_PROTOCOL: usize = HEADER + 9;
const IPV6_NEXT: usize = HEADER + 6;
pub(crate) const IPV6_LEN: usize = 40;
/// Where the packet of an untagged frame begins.
pub(crate) const HEADER: usize = ETHERTYPE + 2;
/// IANA's protocol numbers.
const ICMP: u8 = 1;
pub(crate) const UDP: u8 = 17;
const FRAGMENT: u8 = 44;
const ICMPV6: u8 = 58;

/// How many VLAN tags are looked behind.
const MAX_TAGS: usize = 3;

/// A frame that starts at its Ethernet header, wherever its bytes are.
pub trait Bytes {
    /// `N` bytes at `offset`, or `None` if the frame ends before.
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;
}

/// A frame in user memory.
#[derive(Clone, Copy, Debug)]
pub struct FrameBytes<'a>(pub &'a [u8]);

impl Bytes for FrameBytes<'_> {
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.0.get(offset..)?.first_chunk().copied()
    }
}

/// The frame's source address.
#[inline(always)]
pub fn source_mac(frame: &impl Bytes) -> Option<[u8; MAC_LEN]> {
    frame.load(MAC_LEN)
}

/// The frame's destination address.
#[inline(always)]
pub fn destination_mac(frame: &impl Bytes) -> Option<[u8; MAC_LEN]> {
    frame.load(0)
}

/// Whether the frame goes to a broadcast or multicast address.
#[inline(always)]
pub fn is_group(frame: &impl Bytes) -> bool {
    matches!(frame.load::<1>(0), Some([first]) if first & 1 == 1)
}

/// Whether the frame comes from the pod's own address.
#[inline(always)]
pub fn is_own_echo(frame: &impl Bytes, mac: [u8; MAC_LEN]) -> bool {
    source_mac(frame) == Some(mac)
}

/// Whether an untagged frame with this EtherType may take the fast way: UDP and ICMP, and fragments of them.
///
/// It follows from what all frames of a flow have in common, so a flow is of one kind as a whole. TCP is left to the kernel,
/// which joins its segments (GRO) and gives them to the guest in pieces of up to 64 KiB.
#[inline(always)]
pub fn is_fast_kind(frame: &impl Bytes, kind: u16) -> bool {
    match kind {
        ETH_P_IP => matches!(frame.load(IPV4_PROTOCOL), Some([ICMP | UDP])),
        ETH_P_IPV6 => match frame.load(IPV6_NEXT) {
            Some([UDP | ICMPV6]) => true,
            Some([FRAGMENT]) => matches!(frame.load(HEADER + IPV6_LEN), Some([UDP | ICMPV6])),
            _ => false,
        },
        _ => false,
    }
}

/// The bucket of a frame's flow.
///
/// Only what every frame of a flow shares goes into it: for IPv4 and IPv6 the two addresses. Ports and
/// protocol stay out, because a later fragment has no ports, and in IPv6 the protocol moves behind the
/// fragment header: a flow must not be torn between two buckets by being fragmented. VLAN tags stay out
/// as well: the program sees the skb without its outermost tag, the reader of the park sees it put back.
/// Everything else goes by source address and type.
#[inline(always)]
pub fn bucket(frame: &impl Bytes) -> u8 {
    let mut at = ETHERTYPE;
    let mut kind = load_u16(frame, at);
    for _ in 0..MAX_TAGS {
        if !matches!(kind, ETH_P_8021Q | ETH_P_8021AD) {
            break;
        }
        at += 4;
        kind = load_u16(frame, at);
    }
    let header = at + 2;
    match kind {
        ETH_P_IP => {
            if let Some(addresses) = frame.load::<8>(header + 12) {
                return fold(mix(mix(0, word(&addresses, 0)), word(&addresses, 1)));
            }
        }
        ETH_P_IPV6 => {
            if let Some(addresses) = frame.load::<32>(header + 8) {
                let mut hash = 0;
                let mut i = 0;
                while i < 8 {
                    hash = mix(hash, word(&addresses, i));
                    i += 1;
                }
                return fold(hash);
            }
        }
        _ => {}
    }
    let [a, b, c, d, e, f] = source_mac(frame).unwrap_or([0; MAC_LEN]);
    let low = u32::from_be_bytes([c, d, e, f]);
    let high = u32::from_be_bytes([0, 0, a, b]) ^ u32::from(kind) << 16;
    fold(mix(mix(0, low), high))
}

/// Zero beyond the end, which is no type. Not an `Option`: the verifier refuses the undefined half of
/// a `None` that LLVM carries along.
#[inline(always)]
fn load_u16(frame: &impl Bytes, offset: usize) -> u16 {
    match frame.load(offset) {
        Some(bytes) => u16::from_be_bytes(bytes),
        None => 0,
    }
}

#[inline(always)]
fn word<const N: usize>(bytes: &[u8; N], i: usize) -> u32 {
    u32::from_be_bytes([
        bytes[i * 4],
        bytes[i * 4 + 1],
        bytes[i * 4 + 2],
        bytes[i * 4 + 3],
    ])
}

/// Knuth's multiplicative hash, a word at a time.
#[inline(always)]
fn mix(hash: u32, word: u32) -> u32 {
    (hash.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b1)
}

#[inline(always)]
fn fold(hash: u32) -> u8 {
    (hash >> 24) as u8
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::vec::Vec;

    use super::*;

    const POD: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
    const PEER: [u8; 6] = [0x52, 0x54, 0, 9, 9, 9];

    fn ethernet(kind: u16, tags: usize, payload: &[u8]) -> Vec<u8> {
        let mut frame = [POD, PEER].concat();
        for _ in 0..tags {
            frame.extend(ETH_P_8021Q.to_be_bytes());
            frame.extend([0, 42]);
        }
        frame.extend(kind.to_be_bytes());
        frame.extend(payload);
        frame
    }

    fn ipv4(last: u8, fragment: u16, rest: &[u8]) -> Vec<u8> {
        let mut header = std::vec![0x45, 0, 0, 40, 0, 1];
        header.extend(fragment.to_be_bytes());
        header.extend([64, 17, 0, 0, 10, 77, 0, last, 10, 77, 0, 10]);
        header.extend(rest);
        header
    }

    fn ipv6(next: u8, last: u8) -> Vec<u8> {
        let mut header = std::vec![0x60, 0, 0, 0, 0, 8, next, 64];
        let mut address = [0u8; 32];
        address[0] = 0xfd;
        address[15] = last;
        address[16] = 0xfd;
        address[31] = 10;
        header.extend(address);
        header.extend([0; 8]);
        header
    }

    fn of(frame: &[u8]) -> u8 {
        bucket(&FrameBytes(frame))
    }

    #[test]
    fn every_fragment_of_an_ipv4_datagram_has_one_bucket() {
        let first = ethernet(ETH_P_IP, 0, &ipv4(1, 0x2000, &[0x13, 0x88, 0, 7]));
        let later = ethernet(ETH_P_IP, 0, &ipv4(1, 185, &[0xff; 64]));
        let whole = ethernet(ETH_P_IP, 0, &ipv4(1, 0, &[0x13, 0x88, 0, 9]));
        assert_eq!(of(&first), of(&later));
        assert_eq!(of(&first), of(&whole));
    }

    #[test]
    fn an_ipv6_fragment_header_does_not_change_the_bucket() {
        let whole = ethernet(ETH_P_IPV6, 0, &ipv6(17, 1));
        let fragment = ethernet(ETH_P_IPV6, 0, &ipv6(44, 1));
        assert_eq!(of(&whole), of(&fragment));
    }

    #[test]
    fn udp_and_icmp_are_fast_as_a_whole_and_nothing_else_is() {
        let fast = |kind, packet: &[u8]| {
            let frame = ethernet(kind, 0, packet);
            is_fast_kind(&FrameBytes(&frame), kind)
        };
        let mut packet = ipv4(1, 0, &[]);
        for (protocol, expected) in [(1, true), (17, true), (6, false), (132, false), (47, false)] {
            packet[9] = protocol;
            assert_eq!(fast(ETH_P_IP, &packet), expected, "{protocol}");
            packet[6] = 0x20;
            assert_eq!(fast(ETH_P_IP, &packet), expected, "{protocol}, fragment");
        }
        for (next, expected) in [(17, true), (58, true), (6, false), (0, false), (60, false)] {
            assert_eq!(fast(ETH_P_IPV6, &ipv6(next, 1)), expected, "{next}");
            let mut fragment = ipv6(44, 1);
            fragment[40] = next;
            assert_eq!(fast(ETH_P_IPV6, &fragment), expected, "{next}, fragment");
        }
        assert!(!fast(0x0806, &[0; 46]));
        assert!(!fast(ETH_P_IP, &[0x45]));
    }

    #[test]
    fn vlan_tags_do_not_change_the_bucket() {
        for payload in [ipv4(3, 0, &[]), ipv6(17, 3)] {
            let kind = if payload[0] == 0x45 {
                ETH_P_IP
            } else {
                ETH_P_IPV6
            };
            let plain = of(&ethernet(kind, 0, &payload));
            for tags in 1..=MAX_TAGS {
                assert_eq!(of(&ethernet(kind, tags, &payload)), plain, "{tags} tags");
            }
        }
    }

    #[test]
    fn neighbours_spread_over_the_buckets() {
        let mut used = [false; 256];
        for last in 0..=255u8 {
            used[usize::from(of(&ethernet(ETH_P_IP, 0, &ipv4(last, 0, &[]))))] = true;
        }
        assert!(used.iter().filter(|used| **used).count() > 128);
    }

    #[test]
    fn a_cut_frame_still_has_a_bucket() {
        let whole = ethernet(ETH_P_IPV6, 2, &ipv6(17, 1));
        for end in 0..whole.len() {
            of(&whole[..end]);
        }
    }

    #[test]
    fn group_and_own_addresses_are_recognised() {
        let mut frame = ethernet(ETH_P_IP, 0, &[]);
        assert!(!is_group(&FrameBytes(&frame)));
        assert!(is_own_echo(&FrameBytes(&frame), PEER));
        assert!(!is_own_echo(&FrameBytes(&frame), POD));
        frame[..6].fill(0xff);
        assert!(is_group(&FrameBytes(&frame)));
        assert!(!is_group(&FrameBytes(&[])));
        assert!(!is_own_echo(&FrameBytes(&frame[..8]), PEER));
    }
}
