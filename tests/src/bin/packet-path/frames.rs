//! Numbered frames for a pod, and what is read of them again. Pure.

use clap::ValueEnum;
use migrator::network::VNET_HEADER;
use vm_runtime::units::MacAddress;

const MAGIC: [u8; 4] = *b"path";
/// Flows by their source address: each stays in one of the gate's buckets.
const FLOWS: usize = 8;
const ETHERNET: usize = 14;
const IPV4: usize = 20;
const UDP: usize = 8;
const TCP: usize = 20;
/// 45 segments of 1,448 bytes with their headers: the most that fits the length field of IPv4, which is 65,535.
const SEGMENTS: usize = 45 * 1448;

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// UDP in frames of 64 bytes
    #[value(name = "64")]
    Small,
    /// UDP in frames of 1,400 bytes
    #[value(name = "1400")]
    Large,
    /// TCP segments of 64 KB that are not cut yet
    #[value(name = "gso")]
    Segments,
}

/// The frames of all flows to one address, ready but for their number.
#[derive(Debug)]
pub(crate) struct Frames {
    flows: Vec<Vec<u8>>,
    number_at: usize,
}

impl Frames {
    /// For the pod with that address.
    pub(crate) fn new(kind: Kind, pod: MacAddress) -> Frames {
        let transport = match kind {
            Kind::Small | Kind::Large => UDP,
            Kind::Segments => TCP,
        };
        Frames {
            flows: (0..FLOWS).map(|flow| frame(kind, pod, flow)).collect(),
            number_at: VNET_HEADER + ETHERNET + IPV4 + transport + MAGIC.len(),
        }
    }

    /// The first flow's frame without the virtio-net header, and where its number is.
    pub(crate) fn first(&self) -> (&[u8], usize) {
        (&self.flows[0][VNET_HEADER..], self.number_at - VNET_HEADER)
    }

    /// Frame `number`: the next one of its flow.
    pub(crate) fn number(&mut self, number: u64) -> &[u8] {
        let frame = &mut self.flows[flow_of(number)];
        frame[self.number_at..self.number_at + 8].copy_from_slice(&number.to_be_bytes());
        frame
    }
}

/// The flow of a frame.
pub(crate) fn flow_of(number: u64) -> usize {
    (number % FLOWS as u64) as usize
}

/// How many flows there are.
pub(crate) const fn flows() -> usize {
    FLOWS
}

/// The number of a frame with a virtio-net header; none of a frame that is not ours.
pub(crate) fn number_of(frame: &[u8]) -> Option<u64> {
    number_in(frame.get(VNET_HEADER..)?)
}

/// The same of a frame without that header.
pub(crate) fn number_in(frame: &[u8]) -> Option<u64> {
    let packet = frame.get(ETHERNET..)?;
    let transport = match packet.get(9)? {
        6 => TCP,
        17 => UDP,
        _ => return None,
    };
    let (magic, rest) = packet.get(IPV4 + transport..)?.split_first_chunk::<4>()?;
    let number = rest.first_chunk::<8>()?;
    (*magic == MAGIC).then(|| u64::from_be_bytes(*number))
}

fn frame(kind: Kind, MacAddress(pod): MacAddress, flow: usize) -> Vec<u8> {
    let mut frame = vec![0; VNET_HEADER];
    let (length, protocol) = match kind {
        Kind::Small => (64 - ETHERNET, 17),
        Kind::Large => (1400 - ETHERNET, 17),
        Kind::Segments => {
            // linux/virtio_net.h: NEEDS_CSUM, TCPV4, header length, segment size, checksum start and offset.
            frame[..2].copy_from_slice(&[1, 1]);
            let fields = [54u16, 1448, 34, 16];
            for (to, field) in frame[2..].chunks_exact_mut(2).zip(fields) {
                to.copy_from_slice(&field.to_le_bytes());
            }
            (IPV4 + TCP + SEGMENTS, 6)
        }
    };
    frame.extend(pod);
    frame.extend([0x52, 0x54, 0, 0, 0, 0x01, 0x08, 0x00]);
    let header = frame.len();
    frame.extend([0x45, 0]);
    frame.extend((length as u16).to_be_bytes());
    frame.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
    frame.extend([10, 77, 1, flow as u8, 10, 77, 0, 10]);
    let sum = checksum(&frame[header..]);
    frame[header + 10..header + 12].copy_from_slice(&sum.to_be_bytes());
    // The ports: of discard, whoever listens.
    frame.extend([0, 9, 0, 9]);
    if kind == Kind::Segments {
        // Number, acknowledgement, offset and ACK, window, checksum, urgent pointer.
        frame.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    } else {
        frame.extend(((length - IPV4) as u16).to_be_bytes());
        frame.extend([0, 0]);
    }
    frame.extend(MAGIC);
    frame.resize(VNET_HEADER + ETHERNET + length, 0);
    frame
}

/// RFC 1071, over a header whose own sum is still zero.
pub(crate) fn checksum(header: &[u8]) -> u16 {
    let sum: u32 = header
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    !(((sum & 0xffff) + (sum >> 16)) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: MacAddress = MacAddress([0x52, 0x54, 0, 0, 0, 0x10]);

    #[test]
    fn a_number_is_read_back_from_every_kind_of_frame() {
        for (kind, length) in [
            (Kind::Small, 64),
            (Kind::Large, 1400),
            (Kind::Segments, 54 + SEGMENTS),
        ] {
            let mut frames = Frames::new(kind, POD);
            for number in [0, 7, 8, u64::MAX] {
                let frame = frames.number(number);
                assert_eq!(frame.len(), VNET_HEADER + length);
                assert_eq!(number_of(frame), Some(number), "{kind:?}");
            }
        }
        assert_eq!(number_of(&[0; 200]), None);
        assert_eq!(number_of(&[0; 12]), None);
    }

    #[test]
    fn the_headers_sum_to_nothing() {
        let mut frames = Frames::new(Kind::Segments, POD);
        let frame = frames.number(3);
        assert_eq!(checksum(&frame[VNET_HEADER + ETHERNET..][..IPV4]), 0);
    }
}
