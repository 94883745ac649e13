//! The headers that the uplink's program puts around a departed pod's frame. User space lays them out once for each way; the program fills in what differs
//! from frame to frame.
//!
//! ```text
//!   Ethernet 14 | IPv4 20 or IPv6 40 | UDP 8 | VXLAN 8 | the pod's frame
//! ```
//!
//! They say what the kernel's VXLAN device says for the same frame: no UDP checksum in IPv4 (RFC 7348), one in IPv6, 64 hops, and a packet that may be cut on its
//! way. The source port differs: it follows from the bucket, so a flow, its fragments included, stays on one.

use crate::MAC_LEN;
use crate::checksum::fold;

/// Bytes of the longest headers, those with IPv6, rounded up to whole words.
pub const OUTER_MAX: usize = 72;

/// Bytes of the headers with IPv4, and with IPv6.
pub const OUTER_V4: usize = 14 + 20 + 8 + 8;
/// See [`OUTER_V4`].
pub const OUTER_V6: usize = 14 + 40 + 8 + 8;

/// Where a packet of IPv4 has its length, identification and checksum, the UDP header its source port and length (RFC 791, RFC 768).
const V4_LEN: usize = 16;
const V4_ID: usize = 18;
const V4_SUM: usize = 24;
const V4_UDP: usize = 34;
/// The same of IPv6 (RFC 8200).
const V6_LEN: usize = 18;
const V6_UDP: usize = 54;
/// RFC 768: within its header.
const UDP_LEN: usize = 4;
const UDP_SUM: usize = 6;
/// UDP and VXLAN.
const INSIDE: u16 = 16;

/// The source ports that the kernel chooses from (`ip_local_port_range`, Documentation/networking/ip-sysctl.rst).
const PORTS: (u32, u32) = (32768, 60999);

/// Hops that an outer packet may take: what Linux gives its own (`IPDEFTTL` in linux/ip.h).
const TTL: u8 = 64;

/// A way to another node that the uplink's program knows: headers and all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Outer {
    /// Interface index of the device that it leaves by.
    pub device: u32,
    /// Longest frame of the pod that goes this way, in bytes.
    pub frame_max: u32,
    /// [`OUTER_V4`] or [`OUTER_V6`]: how much of `header` there is.
    pub len: u32,
    /// Sum of what does not change in the IPv4 header, or in the UDP checksum of IPv6: of 16-bit words in this machine's order.
    pub sum: u32,
    /// Zero where frames differ.
    pub headers: Headers,
}

/// The headers as they lie in the packet, to be read and written by words: what differs from frame to frame is 16 bits each, at even places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Headers(pub [u16; OUTER_MAX / 2]);

impl Headers {
    /// Stores 16 bits in network order.
    #[inline(always)]
    fn put(&mut self, at: usize, value: u16) {
        self.0[at / 2] = value.to_be();
    }
}

const _: () = assert!(size_of::<Outer>() == 88);

/// The ends of a way, of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ends {
    /// From this node's address to the other's.
    V4([u8; 4], [u8; 4]),
    /// The same.
    V6([u8; 16], [u8; 16]),
}

impl Outer {
    /// Lays the headers out. `hop`: where they are sent, then from where.
    pub fn new(
        device: u32,
        frame_max: u32,
        hop: [[u8; MAC_LEN]; 2],
        ends: Ends,
        (vni, port): (u32, u16),
    ) -> Self {
        let mut header = [0; OUTER_MAX];
        header[..6].copy_from_slice(&hop[0]);
        header[6..12].copy_from_slice(&hop[1]);
        let (len, udp) = match ends {
            Ends::V4(from, to) => {
                header[12..16].copy_from_slice(&[0x08, 0x00, 0x45, 0]);
                (header[22], header[23]) = (TTL, 17);
                header[26..30].copy_from_slice(&from);
                header[30..34].copy_from_slice(&to);
                (OUTER_V4, V4_UDP)
            }
            Ends::V6(from, to) => {
                header[12..15].copy_from_slice(&[0x86, 0xdd, 0x60]);
                (header[20], header[21]) = (17, TTL);
                header[22..38].copy_from_slice(&from);
                header[38..54].copy_from_slice(&to);
                (OUTER_V6, V6_UDP)
            }
        };
        header[udp + 2..udp + 4].copy_from_slice(&port.to_be_bytes());
        // RFC 7348: the flag that there is an identifier.
        header[udp + 8] = 0x08;
        header[udp + 12..udp + 15].copy_from_slice(&vni.to_be_bytes()[1..]);
        let sum = match ends {
            Ends::V4(..) => words(&header[14..V4_UDP]),
            // The pseudo-header: both addresses and the protocol, beside the length (RFC 8200, 8.1); then UDP and VXLAN.
            Ends::V6(..) => words(&header[22..OUTER_V6]) + u32::from(17u16.to_be()),
        };
        let mut headers = Headers([0; OUTER_MAX / 2]);
        for (word, pair) in headers.0.iter_mut().zip(header.chunks_exact(2)) {
            *word = u16::from_ne_bytes([pair[0], pair[1]]);
        }
        Self {
            device,
            frame_max,
            len: len as u32,
            sum,
            headers,
        }
    }

    /// Whether the outer packet is IPv6.
    #[inline(always)]
    pub const fn is_v6(&self) -> bool {
        self.len == OUTER_V6 as u32
    }
}

/// The source port of a bucket's frames.
#[inline(always)]
pub const fn source_port(bucket: u8) -> u16 {
    (PORTS.0 + ((bucket as u32 * (PORTS.1 - PORTS.0)) >> 8)) as u16
}

/// Fills in the headers of IPv4 for a frame of `len` bytes. `id` tells the pieces of one packet from those of another.
#[inline(always)]
pub fn fill_v4(headers: &mut Headers, sum: u32, len: u16, bucket: u8, id: u16) {
    let total = len + INSIDE + 20;
    headers.put(V4_LEN, total);
    headers.put(V4_ID, id);
    let sum = fold(sum as u64 + total.to_be() as u64 + id.to_be() as u64);
    // In this machine's order, as it is summed up.
    headers.0[V4_SUM / 2] = !sum;
    headers.put(V4_UDP, source_port(bucket));
    headers.put(V4_UDP + UDP_LEN, len + INSIDE);
}

/// Fills in the headers of IPv6 for a frame of `len` bytes. `inner`: the sum of the frame, in this machine's order.
#[inline(always)]
pub fn fill_v6(headers: &mut Headers, sum: u32, len: u16, bucket: u8, inner: u64) {
    let (udp, port) = (len + INSIDE, source_port(bucket));
    headers.put(V6_LEN, udp);
    headers.put(V6_UDP, port);
    headers.put(V6_UDP + UDP_LEN, udp);
    // The length is in the pseudo-header, too.
    let own = port.to_be() as u64 + 2 * udp.to_be() as u64;
    headers.0[(V6_UDP + UDP_SUM) / 2] = match !fold(sum as u64 + own + fold(inner) as u64) {
        // RFC 8200, 8.1: zero would mean that there is none.
        0 => 0xffff,
        sum => sum,
    };
}

/// Of an even number of bytes.
fn words(bytes: &[u8]) -> u32 {
    let pairs = bytes.chunks_exact(2);
    pairs
        .map(|pair| u32::from(u16::from_ne_bytes([pair[0], pair[1]])))
        .sum()
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::vec::Vec;

    use super::*;

    const HOP: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];

    fn bytes(headers: Headers) -> Vec<u8> {
        headers
            .0
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect()
    }

    fn frame(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 7) as u8).collect()
    }

    /// The sum that a receiver finds over what a checksum is of.
    fn found(parts: &[&[u8]]) -> u16 {
        let mut bytes = parts.concat();
        if bytes.len() % 2 == 1 {
            bytes.push(0);
        }
        fold(u64::from(words(&bytes)))
    }

    #[test]
    fn headers_of_ipv4_are_those_of_rfc_7348() {
        let ends = Ends::V4([10, 78, 0, 1], [10, 78, 0, 2]);
        let outer = Outer::new(7, 1514, HOP, ends, (0x00ab_cdef, 4789));
        let mut headers = outer.headers;
        fill_v4(&mut headers, outer.sum, 60, 255, 0x1234);
        let header = bytes(headers);
        let (head, rest) = header.split_at(OUTER_V4);
        assert_eq!(rest, [0; OUTER_MAX - OUTER_V4]);
        assert_eq!(head[..14], [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0]);
        assert_eq!(head[14..24], [0x45, 0, 0, 96, 0x12, 0x34, 0, 0, 64, 17]);
        assert_eq!(found(&[&head[14..34]]), 0xffff);
        assert_eq!(head[26..34], [10, 78, 0, 1, 10, 78, 0, 2]);
        assert_eq!(head[34..36], source_port(255).to_be_bytes());
        assert_eq!(head[36..42], [0x12, 0xb5, 0, 76, 0, 0]);
        assert_eq!(head[42..], [8, 0, 0, 0, 0xab, 0xcd, 0xef, 0]);
    }

    #[test]
    fn the_checksum_of_ipv6_is_right_for_frames_of_every_length() {
        let ends = Ends::V6([0xfd; 16], [0x20; 16]);
        let outer = Outer::new(7, 1514, HOP, ends, (77, 4789));
        assert!(outer.is_v6());
        for len in [14, 15, 60, 61, 1514] {
            let frame = frame(len);
            let mut headers = outer.headers;
            let inner = u64::from(found(&[&frame]));
            fill_v6(&mut headers, outer.sum, len as u16, 3, inner);
            let header = bytes(headers);
            let udp = (len as u16 + 16).to_be_bytes();
            assert_eq!(header[18..20], udp);
            assert_eq!(header[58..60], udp);
            let pseudo = [&header[22..54], &udp, &[0, 17]].concat();
            assert_eq!(found(&[&pseudo, &header[54..70], &frame]), 0xffff, "{len}");
            assert_ne!(header[60..62], [0, 0]);
        }
    }

    #[test]
    fn source_ports_are_the_kernels_and_differ_from_bucket_to_bucket() {
        for bucket in 1..=u8::MAX {
            assert!(source_port(bucket) > source_port(bucket - 1));
        }
        assert!(source_port(0) >= 32768 && source_port(255) < 60999);
    }
}
