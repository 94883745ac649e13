//! Where a frame ends, by what it says of itself. Pure.

/// linux/if_ether.h.
const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;
const TAGS: [u16; 2] = [0x8100, 0x88a8];
const ETHERNET: usize = 14;
const TAG: usize = 4;
/// RFC 826, for Ethernet and IPv4.
const ARP_LENGTH: usize = 28;
/// RFC 8200.
const IPV6_HEADER: usize = 40;

/// Bytes of an Ethernet frame up to the end of its packet; of one that does not say, its header's.
pub(super) fn of(frame: &[u8]) -> usize {
    let half = |at: usize| {
        let bytes = frame.get(at..)?.first_chunk::<2>()?;
        Some(u16::from_be_bytes(*bytes))
    };
    let mut at = ETHERNET;
    let mut kind = half(ETHERNET - 2);
    while kind.is_some_and(|kind| TAGS.contains(&kind)) {
        at += TAG;
        kind = half(at - 2);
    }
    let length = match kind {
        Some(IPV4) => half(at + 2).map(usize::from),
        Some(IPV6) => half(at + 4).map(|payload| IPV6_HEADER + usize::from(payload)),
        Some(ARP) => Some(ARP_LENGTH),
        _ => None,
    };
    at + length.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(tags: &[u16], kind: u16, rest: &[u8]) -> Vec<u8> {
        let mut frame = vec![2; 12];
        for tag in tags {
            frame.extend(tag.to_be_bytes());
            frame.extend([0, 7]);
        }
        frame.extend(kind.to_be_bytes());
        frame.extend(rest);
        frame
    }

    #[test]
    fn packets_say_where_they_end() {
        let mut v4 = vec![0x45, 0, 1, 0x2c];
        v4.resize(300, 1);
        assert_eq!(of(&frame(&[], IPV4, &v4)), 14 + 300);
        assert_eq!(of(&frame(&[0x8100], IPV4, &v4)), 18 + 300);
        assert_eq!(of(&frame(&[0x88a8, 0x8100], IPV4, &v4)), 22 + 300);
        let v6 = [0x60, 0, 0, 0, 0xff, 0xff, 17, 64];
        assert_eq!(of(&frame(&[], IPV6, &v6)), 14 + 40 + 65535);
        assert_eq!(of(&frame(&[], ARP, &[0; 46])), 42);
    }

    #[test]
    fn what_says_nothing_ends_behind_its_header() {
        assert_eq!(of(&frame(&[], 0x88cc, &[9; 100])), 14);
        assert_eq!(of(&frame(&[0x8100], 0x0027, &[9; 100])), 18);
        assert_eq!(of(&frame(&[], IPV4, &[0x45])), 14);
        assert_eq!(of(&[]), 14);
    }
}
