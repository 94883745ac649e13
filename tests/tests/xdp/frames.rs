//! Frames of every kind that an uplink meets.

pub(crate) const POD: [u8; 6] = [0x52, 0x54, 0, 0, 0, 0x10];
const PEER: [u8; 6] = [0x52, 0x54, 0, 0, 0, 0x01];

const ICMP: u8 = 1;
const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
const FRAGMENT: u8 = 44;
const ICMPV6: u8 = 58;
const SCTP: u8 = 132;

pub(crate) fn frame(to: [u8; 6], kind: u16, packet: &[u8]) -> Vec<u8> {
    let mut frame = [to, PEER].concat();
    frame.extend(kind.to_be_bytes());
    frame.extend(packet);
    frame
}

pub(crate) fn ipv4(protocol: u8, fragment: u16, options: usize, payload: &[u8]) -> Vec<u8> {
    let total = (20 + 4 * options + payload.len()) as u16;
    let mut packet = vec![0x45 + options as u8, 0];
    packet.extend(total.to_be_bytes());
    packet.extend([0, 1]);
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0, 10, 77, 0, 1, 10, 77, 0, 10]);
    packet.extend(vec![1; 4 * options]);
    packet.extend(payload);
    packet
}

pub(crate) fn ipv6(next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([next, 64]);
    for last in [1, 10] {
        packet.extend([0xfd; 15]);
        packet.push(last);
    }
    packet.extend(payload);
    packet
}

pub(crate) fn udp(len: usize, checksum: u16) -> Vec<u8> {
    let mut datagram = vec![0x13, 0x88, 0, 7];
    datagram.extend((len as u16 + 8).to_be_bytes());
    datagram.extend(checksum.to_be_bytes());
    datagram.extend((0..len).map(|i| (i * 7) as u8));
    datagram
}

fn inner(next: u8) -> Vec<u8> {
    [vec![next, 0, 0, 1, 0, 0, 0, 9], vec![0; 16]].concat()
}

pub(crate) fn plain() -> Vec<u8> {
    frame(POD, 0x0800, &ipv4(UDP, 0, 0, &udp(18, 0)))
}

/// What may take the fast way.
pub(crate) fn fast_frames() -> Vec<(&'static str, Vec<u8>)> {
    let padded = [plain(), vec![0; 10]].concat();
    vec![
        ("udp", plain()),
        ("udp6", frame(POD, 0x86dd, &ipv6(UDP, &udp(18, 1)))),
        ("icmp", frame(POD, 0x0800, &ipv4(ICMP, 0, 0, &[8; 40]))),
        ("icmp6", frame(POD, 0x86dd, &ipv6(ICMPV6, &[128; 40]))),
        (
            "first fragment",
            frame(POD, 0x0800, &ipv4(UDP, 0x2000, 0, &udp(16, 0))),
        ),
        (
            "later fragment",
            frame(POD, 0x0800, &ipv4(UDP, 185, 0, &[7; 64])),
        ),
        (
            "fragment6",
            frame(POD, 0x86dd, &ipv6(FRAGMENT, &inner(UDP))),
        ),
        ("options", frame(POD, 0x0800, &ipv4(UDP, 0, 2, &udp(18, 0)))),
        ("padding", padded),
        (
            "longest",
            frame(POD, 0x0800, &ipv4(UDP, 0, 0, &udp(1472, 0))),
        ),
    ]
}

/// What the kernel gets in any case, and the gate does not count as arrived.
pub(crate) fn other_frames() -> Vec<(&'static str, Vec<u8>)> {
    const GROUP: [u8; 6] = [1, 0, 0x5e, 0, 0, 1];
    let packet = ipv4(UDP, 0, 0, &udp(18, 0));
    let tagged = [vec![0, 42, 0x08, 0x00], packet.clone()].concat();
    vec![
        ("tcp", frame(POD, 0x0800, &ipv4(TCP, 0, 0, &[0; 20]))),
        ("tcp6", frame(POD, 0x86dd, &ipv6(TCP, &[0; 20]))),
        ("sctp", frame(POD, 0x0800, &ipv4(SCTP, 0, 0, &[0; 20]))),
        (
            "fragment of tcp6",
            frame(POD, 0x86dd, &ipv6(FRAGMENT, &inner(TCP))),
        ),
        ("options6", frame(POD, 0x86dd, &ipv6(60, &[17; 48]))),
        ("arp", frame(POD, 0x0806, &[0; 46])),
        ("vlan", frame(POD, 0x8100, &tagged)),
        ("junk", frame(POD, 0xdead, &[0xa5; 46])),
        ("broadcast", frame([0xff; 6], 0x0800, &packet)),
        ("multicast", frame(GROUP, 0x0800, &packet)),
        ("another's", frame(PEER, 0x0800, &packet)),
        ("cut ip", frame(POD, 0x0800, &[0x45, 0, 0, 46])),
        ("runt", frame(POD, 0x0800, &[])),
    ]
}
