//! A UDP checksum that is unfinished: a local sender leaves it to the device (`CHECKSUM_PARTIAL`), and the uplink's
//! program sees only bytes. What is in the field then is the sum of the pseudo-header (`udp4_hwcsum` in Linux's net/ipv4/udp.c).

use crate::packet::{Bytes, ETH_P_IP, HEADER, UDP};

/// RFC 768: length of the header, and where in it the checksum is.
const UDP_HEADER: usize = 8;
const UDP_CHECKSUM: usize = 6;
/// RFC 791: more fragments, and the offset of this one.
const FRAGMENTED: u16 = 0x3fff;

/// A UDP datagram whose checksum is the pseudo-header's sum. It may be one in 65,536 that is finished and looks the same:
/// then finishing it changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UdpSegment {
    /// Offset of its header in the frame.
    pub at: usize,
    /// Its length, in bytes.
    pub len: usize,
}

impl UdpSegment {
    /// Offset of the checksum in the frame.
    pub const fn checksum_at(self) -> usize {
        self.at + UDP_CHECKSUM
    }

    /// The same datagram, once `len` bytes are in front of its frame.
    #[inline(always)]
    pub const fn behind(self, len: usize) -> Self {
        Self {
            at: self.at + len,
            len: self.len,
        }
    }

    /// The checksum, from the sum over the datagram with what is in the field now.
    pub const fn finished(sum: u64) -> u16 {
        match !fold(sum) {
            // RFC 768: zero would mean that there is none.
            0 => 0xffff,
            checksum => checksum,
        }
    }
}

/// The one's complement sum in 16 bits (RFC 1071).
#[inline(always)]
pub const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + ((sum >> 16) & 0xffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// Whether an untagged IP packet of type `kind` is a whole UDP datagram with an unfinished checksum. Fragments never are: a sender
/// finishes the checksum before it cuts.
#[inline(always)]
pub fn udp_segment(frame: &impl Bytes, kind: u16) -> Option<UdpSegment> {
    let mut sum = UDP as u64;
    let at = if kind == ETH_P_IP {
        let [first] = frame.load(HEADER)?;
        let [protocol] = frame.load(HEADER + 9)?;
        let fragment = u16::from_be_bytes(frame.load(HEADER + 6)?);
        if protocol != UDP || fragment & FRAGMENTED != 0 {
            return None;
        }
        sum += words::<8>(&frame.load(HEADER + 12)?);
        HEADER + (first & 15) as usize * 4
    } else {
        let [next] = frame.load(HEADER + 6)?;
        if next != UDP {
            return None;
        }
        sum += words::<32>(&frame.load(HEADER + 8)?);
        HEADER + 40
    };
    let header: [u8; UDP_HEADER] = frame.load(at)?;
    let len = u16::from_be_bytes([header[4], header[5]]);
    let checksum = u16::from_be_bytes([header[6], header[7]]);
    (checksum == fold(sum + len as u64)).then_some(UdpSegment {
        at,
        len: len as usize,
    })
}

#[inline(always)]
fn words<const N: usize>(bytes: &[u8; N]) -> u64 {
    let mut sum = 0;
    let mut i = 0;
    while i < N {
        sum += u16::from_be_bytes([bytes[i], bytes[i + 1]]) as u64;
        i += 2;
    }
    sum
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::vec::Vec;

    use super::*;
    use crate::packet::{ETH_P_IPV6, FrameBytes};

    /// A datagram with payload `hello`, and its checksum as in the field.
    fn frame(kind: u16, options: usize, checksum: u16) -> Vec<u8> {
        let mut frame = std::vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        frame.extend(kind.to_be_bytes());
        if kind == ETH_P_IP {
            frame.extend([
                0x45 + options as u8,
                0,
                0,
                33 + 4 * options as u8,
                0,
                1,
                0x40,
                0,
                64,
                17,
                0,
                0,
            ]);
            frame.extend([10, 77, 0, 1, 10, 77, 0, 10]);
            frame.extend(std::vec![1; 4 * options]);
        } else {
            frame.extend([0x60, 0, 0, 0, 0, 13, 17, 64]);
            for last in [1, 2] {
                frame.extend([0xfd; 15]);
                frame.push(last);
            }
        }
        frame.extend([0x13, 0x88, 0, 7, 0, 13]);
        frame.extend(checksum.to_be_bytes());
        frame.extend(b"hello");
        frame
    }

    fn pseudo(frame: &[u8], kind: u16) -> u16 {
        let addresses = if kind == ETH_P_IP {
            &frame[26..34]
        } else {
            &frame[22..54]
        };
        let sum: u64 = addresses
            .chunks(2)
            .map(|pair| u64::from(u16::from_be_bytes([pair[0], pair[1]])))
            .sum();
        fold(sum + 17 + 13)
    }

    /// Over a whole datagram and its pseudo-header, a finished checksum makes the sum all ones (RFC 1071).
    fn is_finished(frame: &[u8], kind: u16, at: usize) -> bool {
        let mut bytes = frame[at..].to_vec();
        bytes.push(0);
        let sum: u64 = bytes
            .chunks(2)
            .map(|pair| u64::from(u16::from_be_bytes([pair[0], pair[1]])))
            .sum();
        fold(sum + u64::from(pseudo(frame, kind))) == 0xffff
    }

    fn finish(frame: &mut [u8], segment: UdpSegment) {
        let mut bytes = frame[segment.at..segment.at + segment.len].to_vec();
        bytes.push(0);
        let sum = bytes
            .chunks(2)
            .map(|pair| u64::from(u16::from_be_bytes([pair[0], pair[1]])))
            .sum();
        let checksum = UdpSegment::finished(sum);
        frame[segment.checksum_at()..segment.checksum_at() + 2]
            .copy_from_slice(&checksum.to_be_bytes());
    }

    #[test]
    fn an_unfinished_checksum_is_found_and_finished() {
        for (kind, options) in [(ETH_P_IP, 0), (ETH_P_IP, 3), (ETH_P_IPV6, 0)] {
            let sum = pseudo(&frame(kind, options, 0), kind);
            let mut partial = frame(kind, options, sum);
            let segment = udp_segment(&FrameBytes(&partial), kind).unwrap();
            assert_eq!(segment.len, 13);
            assert!(!is_finished(&partial, kind, segment.at));
            finish(&mut partial, segment);
            assert!(is_finished(&partial, kind, segment.at));
            assert_eq!(udp_segment(&FrameBytes(&partial), kind), None);
        }
    }

    #[test]
    fn a_finished_checksum_that_looks_unfinished_stays_as_it_is() {
        let sum = pseudo(&frame(ETH_P_IP, 0, 0), ETH_P_IP);
        let mut frame = frame(ETH_P_IP, 0, sum);
        // The payload is chosen so that the sum comes out right with the pseudo-header's own sum in the field.
        for word in 0..=u16::MAX {
            frame[42..44].copy_from_slice(&word.to_be_bytes());
            if is_finished(&frame, ETH_P_IP, 34) {
                break;
            }
        }
        assert!(is_finished(&frame, ETH_P_IP, 34));
        let before = frame.clone();
        let segment = udp_segment(&FrameBytes(&frame), ETH_P_IP).unwrap();
        finish(&mut frame, segment);
        assert_eq!(frame, before);
    }

    #[test]
    fn fragments_and_other_protocols_have_none() {
        let sum = pseudo(&frame(ETH_P_IP, 0, 0), ETH_P_IP);
        let mut fragment = frame(ETH_P_IP, 0, sum);
        fragment[20] = 0x20;
        assert_eq!(udp_segment(&FrameBytes(&fragment), ETH_P_IP), None);
        let mut icmp = frame(ETH_P_IP, 0, sum);
        icmp[23] = 1;
        assert_eq!(udp_segment(&FrameBytes(&icmp), ETH_P_IP), None);
        let whole = frame(ETH_P_IP, 0, sum);
        for end in 0..42 {
            assert_eq!(udp_segment(&FrameBytes(&whole[..end]), ETH_P_IP), None);
        }
    }
}
