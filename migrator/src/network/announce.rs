//! The frames that tell the network where a pod lives now. Pure.
//!
//! They are sent out of the uplink, past the node's own bridge, whose entry for the pod the service
//! owns: so that the switches learn the pod's MAC on this node's port. Their echo at the old node is
//! the end marker of the log.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use vm_runtime::units::MacAddress;

/// When the announcement is sent, counted from the opening of the gate. QEMU repeats its own in a
/// similar rhythm; the first must be early, the rest are for what a busy switch has lost.
pub const SCHEDULE: [Duration; 6] = [
    Duration::from_millis(0),
    Duration::from_millis(50),
    Duration::from_millis(150),
    Duration::from_millis(250),
    Duration::from_millis(350),
    Duration::from_millis(450),
];

const BROADCAST: [u8; 6] = [0xff; 6];
/// ff02::1, all nodes (RFC 4291), as an Ethernet group address (RFC 2464).
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

const ETH_P_ARP: u16 = 0x0806;
const ETH_P_RARP: u16 = 0x8035;
const ETH_P_IPV6: u16 = 0x86dd;

/// Shortest Ethernet frame without its checksum (IEEE 802.3).
const FRAME_MIN: usize = 60;

const ARP_REQUEST: u16 = 1;
const ARP_REPLY: u16 = 2;
/// RFC 903.
const REVERSE_REQUEST: u16 = 3;

/// IPv6 next header of ICMPv6.
const ICMPV6: u8 = 58;
/// RFC 4861: neighbour advertisement, with the override flag.
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const NA_OVERRIDE: u8 = 0x20;
/// RFC 4861: target link-layer address, in units of 8 bytes.
const TARGET_LINK_LAYER: [u8; 2] = [2, 1];

/// Plain Ethernet frames, in the order they are sent: RARP (which any switch learns from), then for
/// IPv4 a gratuitous ARP as request and as reply (RFC 5227 neighbours honour one or the other), and
/// for IPv6 an unsolicited neighbour advertisement.
pub fn announcement(mac: MacAddress, v4: Option<Ipv4Addr>, v6: Option<Ipv6Addr>) -> Vec<Vec<u8>> {
    let MacAddress(mac) = mac;
    let none = Ipv4Addr::UNSPECIFIED;
    let mut frames = vec![arp(ETH_P_RARP, REVERSE_REQUEST, mac, none, mac, none)];
    if let Some(address) = v4 {
        frames.push(arp(ETH_P_ARP, ARP_REQUEST, mac, address, [0; 6], address));
        frames.push(arp(ETH_P_ARP, ARP_REPLY, mac, address, BROADCAST, address));
    }
    if let Some(address) = v6 {
        frames.push(neighbour_advertisement(mac, address));
    }
    frames
}

fn ethernet(to: [u8; 6], from: [u8; 6], kind: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(96);
    frame.extend(to);
    frame.extend(from);
    frame.extend(kind.to_be_bytes());
    frame
}

fn arp(
    kind: u16,
    operation: u16,
    mac: [u8; 6],
    sender: Ipv4Addr,
    target_mac: [u8; 6],
    target: Ipv4Addr,
) -> Vec<u8> {
    let mut frame = ethernet(BROADCAST, mac, kind);
    // Ethernet, IPv4, address lengths 6 and 4 (RFC 826).
    frame.extend([0, 1, 0x08, 0, 6, 4]);
    frame.extend(operation.to_be_bytes());
    frame.extend(mac);
    frame.extend(sender.octets());
    frame.extend(target_mac);
    frame.extend(target.octets());
    frame.resize(FRAME_MIN, 0);
    frame
}

fn neighbour_advertisement(mac: [u8; 6], address: Ipv6Addr) -> Vec<u8> {
    let mut message = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, NA_OVERRIDE, 0, 0, 0];
    message.extend(address.octets());
    message.extend(TARGET_LINK_LAYER);
    message.extend(mac);
    let checksum = icmpv6_checksum(address, ALL_NODES, &message);
    message[2..4].copy_from_slice(&checksum.to_be_bytes());

    let mut frame = ethernet(ALL_NODES_MAC, mac, ETH_P_IPV6);
    frame.extend([0x60, 0, 0, 0]);
    frame.extend((message.len() as u16).to_be_bytes());
    // RFC 4861: a hop limit of 255 proves that no router passed it on.
    frame.extend([ICMPV6, 255]);
    frame.extend(address.octets());
    frame.extend(ALL_NODES.octets());
    frame.extend(message);
    frame
}

/// RFC 4443: over the pseudo header and the message.
fn icmpv6_checksum(from: Ipv6Addr, to: Ipv6Addr, message: &[u8]) -> u16 {
    let mut bytes = Vec::with_capacity(40 + message.len());
    bytes.extend(from.octets());
    bytes.extend(to.octets());
    bytes.extend((message.len() as u32).to_be_bytes());
    bytes.extend([0, 0, 0, ICMPV6]);
    bytes.extend(message);
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56]);

    #[test]
    fn every_frame_comes_from_the_pod_and_goes_to_a_group() {
        let v6 = "fd77::10".parse().expect("an address");
        let frames = announcement(MAC, Some(Ipv4Addr::new(10, 77, 0, 10)), Some(v6));
        assert_eq!(frames.len(), 4);
        for frame in &frames {
            assert_eq!(&frame[6..12], MAC.0);
            assert_eq!(frame[0] & 1, 1);
            assert!(frame.len() >= FRAME_MIN);
        }
    }

    #[test]
    fn a_pod_without_addresses_still_teaches_the_switches() {
        assert_eq!(announcement(MAC, None, None).len(), 1);
    }

    #[test]
    fn the_gratuitous_arp_has_the_bytes_of_rfc_5227() {
        let frames = announcement(MAC, Some(Ipv4Addr::new(10, 77, 0, 10)), None);
        assert_eq!(
            frames[1][..42],
            [
                0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52, 0x54, 0, 0x12, 0x34, 0x56, 8,
                6, // Ethernet
                0, 1, 8, 0, 6, 4, 0, 1, // a request
                0x52, 0x54, 0, 0x12, 0x34, 0x56, 10, 77, 0, 10, // sender
                0, 0, 0, 0, 0, 0, 10, 77, 0, 10, // target
            ]
        );
    }

    #[test]
    fn the_checksum_of_the_advertisement_is_right() {
        let address: Ipv6Addr = "fd77::10".parse().expect("an address");
        let frame = neighbour_advertisement(MAC.0, address);
        let message = &frame[54..];
        // Over a message that carries its own checksum the sum is 0xffff, and its complement 0.
        assert_eq!(icmpv6_checksum(address, ALL_NODES, message), 0);
    }
}
