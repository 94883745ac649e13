//! The tunnel between nodes: where it leads, whose frames come out of it, and the probe that tells whether it does.

use crate::MAC_LEN;

/// Where the frames of a departed pod go. All zero: nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Tunnel {
    /// Interface index of the tunnel's device; 0: there is no tunnel.
    pub device: u32,
    /// VXLAN network identifier, 24 bits.
    pub vni: u32,
    /// 4 or 6: of which family `remote` is.
    pub family: u32,
    /// The other node's address, in network order; IPv4 in the first four bytes.
    pub remote: [u8; 16],
}

/// The pod that frames out of the tunnel are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Landing {
    /// Interface index of its TAP.
    pub tap: u32,
    /// VXLAN network identifier that its frames come with.
    pub vni: u32,
    /// Its slot.
    pub slot: u16,
    /// Zero.
    pub spare: u16,
}

/// Key of a pod in the map of landings: its MAC address, and two bytes of zero in front.
#[inline(always)]
pub const fn landing_key(mac: [u8; MAC_LEN]) -> u64 {
    let [a, b, c, d, e, f] = mac;
    u64::from_be_bytes([0, 0, a, b, c, d, e, f])
}

/// A frame that asks the other node's programs whether frames for a pod come out of the tunnel there. They answer by sending it
/// back with its kind changed; a node whose tunnel is off, or shut off by a firewall, does not.
///
/// ```text
/// destination 6: the pod | source 6 | EtherType 0x88b5 | kind u8 | magic 7 | slot u16 | number u64      big endian
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The slot of the pod at the node that asks.
    pub slot: u16,
    /// Tells this question from those before.
    pub number: u64,
}

impl Probe {
    /// A question.
    pub const ASK: u8 = 1;
    /// Its answer.
    pub const ANSWER: u8 = 2;
    /// Where the kind is.
    pub const KIND_AT: usize = 14;
    /// Bytes from the Ethernet header to the end of the number.
    pub const LEN: usize = 32;

    /// EtherType for local experiments (IEEE 802, "Local Experimental Ethertype 1"). The kind follows, then a magic word.
    pub const ETHERTYPE: u16 = 0x88b5;
    const MAGIC: [u8; 7] = *b"mtunnel";

    /// The question, about the pod at `mac`.
    pub fn ask(self, mac: [u8; MAC_LEN]) -> [u8; Self::LEN] {
        let mut frame = [0; Self::LEN];
        let (ethernet, rest) = frame.split_at_mut(Self::KIND_AT);
        ethernet[..6].copy_from_slice(&mac);
        // Locally administered: nobody's.
        ethernet[6] = 0x02;
        ethernet[12..].copy_from_slice(&Self::ETHERTYPE.to_be_bytes());
        rest[0] = Self::ASK;
        rest[1..8].copy_from_slice(&Self::MAGIC);
        rest[8..10].copy_from_slice(&self.slot.to_be_bytes());
        rest[10..].copy_from_slice(&self.number.to_be_bytes());
        frame
    }

    /// Reads what follows the two addresses: the kind, and the probe. `None`: an ordinary frame.
    #[inline(always)]
    pub fn parse(rest: [u8; Self::LEN - 12]) -> Option<(u8, Self)> {
        let [e0, e1, kind, m0, m1, m2, m3, m4, m5, m6, s0, s1, n @ ..] = rest;
        if u16::from_be_bytes([e0, e1]) != Self::ETHERTYPE
            || [m0, m1, m2, m3, m4, m5, m6] != Self::MAGIC
        {
            return None;
        }
        let slot = u16::from_be_bytes([s0, s1]);
        let number = u64::from_be_bytes(n);
        Some((kind, Self { slot, number }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_reads_back_and_an_ordinary_frame_is_none() {
        let probe = Probe {
            slot: 0x0102,
            number: 0x1122_3344_5566_7788,
        };
        let frame = probe.ask([0x52, 0x54, 0, 1, 2, 3]);
        assert_eq!(frame[..6], [0x52, 0x54, 0, 1, 2, 3]);
        let mut rest = [0; Probe::LEN - 12];
        rest.copy_from_slice(&frame[12..]);
        assert_eq!(Probe::parse(rest), Some((Probe::ASK, probe)));
        for changed in [0, 1, 3, 9] {
            let mut other = rest;
            other[changed] ^= 1;
            assert_eq!(Probe::parse(other), None, "byte {changed}");
        }
    }

    #[test]
    fn a_landing_key_is_the_address_as_a_number() {
        assert_eq!(landing_key([0x52, 0x54, 0, 0, 0, 0x10]), 0x5254_0000_0010);
    }
}
