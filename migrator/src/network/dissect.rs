//! What the first bytes of a frame say, for people. Pure; the bytes may be anybody's.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use vm_runtime::units::MacAddress;

/// EtherTypes (IEEE 802, as in linux/if_ether.h).
const ARP: u16 = 0x0806;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const TAGS: [u16; 2] = [0x8100, 0x88a8];

/// Protocol numbers (IANA): those that have ports at their beginning.
const WITH_PORTS: [u8; 4] = [6, 17, 132, 136];
/// IPv6 extension headers whose length is in their second byte (RFC 8200): hop-by-hop, routing, destination options.
const EXTENSIONS: [u8; 3] = [0, 43, 60];
/// IPv6 fragment header.
const FRAGMENT: u8 = 44;
/// Extension headers that are looked behind.
const MOST_EXTENSIONS: usize = 4;

/// Where a fragment belongs in its packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fragment {
    /// Byte of the packet's payload that it begins with.
    pub offset: u32,
    /// Whether others follow behind it.
    pub more: bool,
}

/// What a frame is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrameHead {
    /// Who sent it on this network.
    pub source_mac: MacAddress,
    /// To whom.
    pub destination_mac: MacAddress,
    /// VLAN numbers, the outermost first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vlan: Vec<u16>,
    /// The innermost protocol that is known: `tcp`, `icmpv6`, `arp`; else a number, as in `ip 47` and `ethernet 0x88cc`.
    pub protocol: String,
    /// The sender's address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<IpAddr>,
    /// The receiver's address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination: Option<IpAddr>,
    /// The sender's port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_port: Option<u16>,
    /// The receiver's port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination_port: Option<u16>,
    /// Present in a fragment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fragment: Option<Fragment>,
}

fn bytes<const N: usize>(head: &[u8], at: usize) -> Option<[u8; N]> {
    head.get(at..)?.first_chunk().copied()
}

fn number(head: &[u8], at: usize) -> Option<u16> {
    bytes(head, at).map(u16::from_be_bytes)
}

/// Reads the head of a frame. `tag` is the outermost VLAN number, where the kernel keeps it beside the frame. `None`: not even an
/// Ethernet header.
pub fn dissect(head: &[u8], tag: Option<u16>) -> Option<FrameHead> {
    const VLAN_NUMBER: u16 = 0x0fff;
    let mut frame = FrameHead {
        destination_mac: MacAddress(bytes(head, 0)?),
        source_mac: MacAddress(bytes(head, 6)?),
        vlan: tag.map(|tag| tag & VLAN_NUMBER).into_iter().collect(),
        protocol: String::new(),
        source: None,
        destination: None,
        source_port: None,
        destination_port: None,
        fragment: None,
    };
    let mut at = 12;
    let mut kind = number(head, at)?;
    while TAGS.contains(&kind) {
        let (Some(tag), Some(next)) = (number(head, at + 2), number(head, at + 4)) else {
            break;
        };
        frame.vlan.push(tag & VLAN_NUMBER);
        at += 4;
        kind = next;
    }
    let payload = head.get(at + 2..).unwrap_or_default();
    match kind {
        ARP => {
            frame.protocol = "arp".to_owned();
            frame.source = bytes::<4>(payload, 14).map(IpAddr::from);
            frame.destination = bytes::<4>(payload, 24).map(IpAddr::from);
        }
        IPV4 => frame.ipv4(payload),
        IPV6 => frame.ipv6(payload),
        // IEEE 802.3: below 0x600 it is a length.
        0..0x600 => frame.protocol = "llc".to_owned(),
        _ => frame.protocol = format!("ethernet {kind:#06x}"),
    }
    Some(frame)
}

impl FrameHead {
    fn ipv4(&mut self, packet: &[u8]) {
        self.protocol = "ipv4".to_owned();
        self.source = bytes::<4>(packet, 12).map(IpAddr::from);
        self.destination = bytes::<4>(packet, 16).map(IpAddr::from);
        let (Some(first), Some(field), Some([protocol])) =
            (packet.first(), number(packet, 6), bytes(packet, 9))
        else {
            return;
        };
        let fragment = Fragment {
            offset: u32::from(field & 0x1fff) * 8,
            more: field & 0x2000 != 0,
        };
        self.fragment = (fragment.offset > 0 || fragment.more).then_some(fragment);
        self.transport(protocol, packet, usize::from(first & 0xf) * 4);
    }

    fn ipv6(&mut self, packet: &[u8]) {
        self.protocol = "ipv6".to_owned();
        self.source = bytes::<16>(packet, 8).map(IpAddr::from);
        self.destination = bytes::<16>(packet, 24).map(IpAddr::from);
        let Some([mut next]) = bytes(packet, 6) else {
            return;
        };
        let mut at = 40;
        for _ in 0..MOST_EXTENSIONS {
            let Some([following, length]) = bytes(packet, at) else {
                break;
            };
            if next == FRAGMENT {
                let Some(field) = number(packet, at + 2) else {
                    break;
                };
                self.fragment = Some(Fragment {
                    offset: u32::from(field & !7),
                    more: field & 1 != 0,
                });
                at += 8;
            } else if EXTENSIONS.contains(&next) {
                at += 8 + usize::from(length) * 8;
            } else {
                break;
            }
            next = following;
        }
        self.transport(next, packet, at);
    }

    fn transport(&mut self, protocol: u8, packet: &[u8], at: usize) {
        self.protocol = match protocol {
            1 => "icmp".to_owned(),
            2 => "igmp".to_owned(),
            6 => "tcp".to_owned(),
            17 => "udp".to_owned(),
            58 => "icmpv6".to_owned(),
            132 => "sctp".to_owned(),
            other => format!("ip {other}"),
        };
        let is_first = self.fragment.is_none_or(|fragment| fragment.offset == 0);
        if is_first && WITH_PORTS.contains(&protocol) {
            self.source_port = number(packet, at);
            self.destination_port = number(packet, at + 2);
        }
    }
}

impl std::fmt::Display for FrameHead {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let end =
            |address: Option<IpAddr>, mac: MacAddress, port: Option<u16>| match (address, port) {
                (Some(IpAddr::V6(ip)), Some(port)) => format!("[{ip}]:{port}"),
                (Some(ip), Some(port)) => format!("{ip}:{port}"),
                (Some(ip), None) => ip.to_string(),
                (None, _) => mac.to_string(),
            };
        write!(
            f,
            "{} {} > {}",
            self.protocol,
            end(self.source, self.source_mac, self.source_port),
            end(
                self.destination,
                self.destination_mac,
                self.destination_port
            ),
        )?;
        for vlan in &self.vlan {
            write!(f, " vlan {vlan}")?;
        }
        match self.fragment {
            Some(Fragment { offset, more }) => {
                write!(f, " fragment {offset}{}", if more { "+" } else { "" })
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACS: [u8; 12] = [0x52, 0x54, 0, 0, 0, 0x10, 0x52, 0x54, 0, 0, 0, 1];

    fn frame(parts: &[&[u8]]) -> Vec<u8> {
        [&MACS[..], &parts.concat()].concat()
    }

    fn text(bytes: &[u8], tag: Option<u16>) -> String {
        dissect(bytes, tag).unwrap().to_string()
    }

    fn ipv4(protocol: u8, field: u16) -> Vec<u8> {
        let mut packet = vec![0x46, 0, 0, 40, 0, 1];
        packet.extend(field.to_be_bytes());
        packet.extend([64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 1, 1, 1, 1]);
        packet.extend([0, 53, 4, 0]);
        packet
    }

    fn ipv6(next: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, 8, next, 64, 0xfd];
        packet.extend([0; 14]);
        packet.push(1);
        packet.extend([0xff, 2]);
        packet.extend([0; 13]);
        packet.push(0x16);
        packet.extend(payload);
        packet
    }

    #[test]
    fn each_protocol_is_named_with_its_ends() {
        let udp = frame(&[&[8, 0], &ipv4(17, 0)]);
        assert_eq!(text(&udp, None), "udp 10.0.0.1:53 > 10.0.0.2:1024");
        let first = frame(&[&[8, 0], &ipv4(17, 0x2000)]);
        assert_eq!(
            text(&first, None),
            "udp 10.0.0.1:53 > 10.0.0.2:1024 fragment 0+"
        );
        let later = frame(&[&[8, 0], &ipv4(17, 185)]);
        assert_eq!(text(&later, None), "udp 10.0.0.1 > 10.0.0.2 fragment 1480");
        let tagged = frame(&[&[0x81, 0, 0xe0, 42, 8, 0], &ipv4(1, 0)]);
        assert_eq!(
            text(&tagged, Some(0x2007)),
            "icmp 10.0.0.1 > 10.0.0.2 vlan 7 vlan 42"
        );
        let hop = [58, 0, 5, 2, 0, 0, 1, 0, 143, 0];
        let mld = frame(&[&[0x86, 0xdd], &ipv6(0, &hop)]);
        assert_eq!(text(&mld, None), "icmpv6 fd00::1 > ff02::16");
        let piece = [6, 0, 5, 0xc9, 0, 0, 0, 1, 0, 80, 0, 81];
        let fragment = frame(&[&[0x86, 0xdd], &ipv6(44, &piece)]);
        assert_eq!(
            text(&fragment, None),
            "tcp fd00::1 > ff02::16 fragment 1480+"
        );
        let tcp = frame(&[&[0x86, 0xdd], &ipv6(6, &[0, 80, 0, 81])]);
        assert_eq!(text(&tcp, None), "tcp [fd00::1]:80 > [ff02::16]:81");
        let arp = [
            0, 1, 8, 0, 6, 4, 0, 1, 2, 2, 2, 2, 2, 2, 10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 10, 0, 0, 2,
        ];
        let arp = frame(&[&[8, 6], &arp]);
        assert_eq!(text(&arp, None), "arp 10.0.0.1 > 10.0.0.2");
        assert_eq!(
            text(&frame(&[&[0x88, 0xcc]]), None),
            "ethernet 0x88cc 52:54:00:00:00:01 > 52:54:00:00:00:10"
        );
    }

    #[test]
    fn a_frame_may_be_cut_or_forged_anywhere() {
        let hop = [58, 255, 5, 2, 0, 0, 1, 0, 143, 0];
        for whole in [
            frame(&[&[0x81, 0, 0, 42, 0x86, 0xdd], &ipv6(0, &hop)]),
            frame(&[&[8, 0], &ipv4(6, 0)]),
            frame(&[&[8, 6], &[0; 28]]),
        ] {
            for end in 0..whole.len() {
                assert_eq!(dissect(&whole[..end], None).is_some(), end >= 14, "{end}");
                let mut forged = whole.clone();
                forged[end] ^= 0xff;
                let _ = dissect(&forged, None);
            }
        }
    }
}
