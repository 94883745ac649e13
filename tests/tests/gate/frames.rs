//! Every kind of frame that a gate and a guard meet.

pub(crate) const POD: [u8; 6] = [0x52, 0x54, 0, 0, 0, 0x10];
pub(crate) const PEER: [u8; 6] = [0x52, 0x54, 0, 0, 0, 0x01];
const ALL: [u8; 6] = [0xff; 6];

/// EtherTypes (IEEE 802, as in linux/if_ether.h).
const ARP: u16 = 0x0806;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const TAG: u16 = 0x8100;
const SERVICE_TAG: u16 = 0x88a8;

/// Protocol numbers (IANA).
const IGMP: u8 = 2;
const TCP: u8 = 6;
const UDP: u8 = 17;
const FRAGMENT: u8 = 44;
const ICMPV6: u8 = 58;

#[derive(Clone, Debug)]
pub(crate) struct Frame {
    pub(crate) name: &'static str,
    pub(crate) bytes: Vec<u8>,
    /// Segments that it is to be cut into, and their size.
    pub(crate) gso: Option<(u32, u32)>,
}

fn frame(name: &'static str, to: [u8; 6], kind: u16, payload: &[u8]) -> Frame {
    let mut bytes = [to, PEER].concat();
    bytes.extend(kind.to_be_bytes());
    bytes.extend(payload);
    Frame {
        name,
        bytes,
        gso: None,
    }
}

fn ipv4(protocol: u8, to: [u8; 4], fragment: u16, payload: &[u8]) -> Vec<u8> {
    let length = 20 + payload.len() as u16;
    let mut packet = vec![0x45, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([0, 1]);
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0, 10, 77, 0, 1]);
    packet.extend(to);
    packet.extend(payload);
    packet
}

const POD4: [u8; 4] = [10, 77, 0, 10];

fn ipv6(next: u8, to: [u8; 16], payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([next, 255]);
    packet.extend(address6(1));
    packet.extend(to);
    packet.extend(payload);
    packet
}

fn address6(last: u8) -> [u8; 16] {
    let mut address = [0; 16];
    (address[0], address[15]) = (0xfd, last);
    address
}

/// A multicast address of link scope.
fn group6(last: u8) -> [u8; 16] {
    let mut address = [0; 16];
    (address[0], address[1], address[15]) = (0xff, 0x02, last);
    address
}

/// From port 7 to port 7.
const DATAGRAM: [u8; 12] = [0, 7, 0, 7, 0, 12, 0, 0, 1, 2, 3, 4];

fn tagged(kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut tag = vec![0, 42];
    tag.extend(kind.to_be_bytes());
    tag.extend(payload);
    tag
}

/// A frame of each kind from others.
pub(crate) fn frames() -> Vec<Frame> {
    const GROUP4: [u8; 6] = [1, 0, 0x5e, 0, 0, 1];
    const GROUP6: [u8; 6] = [0x33, 0x33, 0xff, 0, 0, 0x10];
    let datagram4 = ipv4(UDP, POD4, 0, &DATAGRAM);
    let datagram6 = ipv6(UDP, address6(10), &DATAGRAM);
    // The next header is UDP; offset 0, or 184 * 8; more follow, or not.
    let fragment6 = |offset: u16| {
        let mut payload = vec![UDP, 0];
        payload.extend((offset << 3 | u16::from(offset == 0)).to_be_bytes());
        payload.extend([0, 0, 0, 9]);
        payload.extend(DATAGRAM);
        ipv6(FRAGMENT, address6(10), &payload)
    };
    let segment = [&[0, 80, 0, 80][..], &[0; 8], &[0x50, 0x10], &[0; 1406]].concat();
    let whole = Frame {
        gso: Some((3, 500)),
        ..frame("gso", POD, IPV4, &ipv4(TCP, POD4, 0, &segment))
    };
    vec![
        frame("arp request", ALL, ARP, &[0, 1, 8, 0, 6, 4, 0, 1]),
        frame("arp reply", POD, ARP, &[0, 1, 8, 0, 6, 4, 0, 2]),
        frame("ipv4", POD, IPV4, &datagram4),
        frame("ipv6", POD, IPV6, &datagram6),
        frame(
            "neighbour solicitation",
            GROUP6,
            IPV6,
            &ipv6(ICMPV6, group6(1), &[135, 0, 0, 0, 0, 0, 0, 0]),
        ),
        frame(
            "neighbour advertisement",
            POD,
            IPV6,
            &ipv6(ICMPV6, address6(10), &[136, 0, 0, 0, 0x60, 0, 0, 0]),
        ),
        frame(
            "mld",
            GROUP6,
            IPV6,
            &ipv6(
                0,
                group6(0x16),
                &[ICMPV6, 0, 5, 2, 0, 0, 1, 0, 143, 0, 0, 0],
            ),
        ),
        frame(
            "igmp",
            GROUP4,
            IPV4,
            &ipv4(IGMP, [224, 0, 0, 22], 0, &[0x22, 0, 0, 0, 0, 0, 0, 0]),
        ),
        frame(
            "broadcast",
            ALL,
            IPV4,
            &ipv4(UDP, [10, 77, 0, 255], 0, &DATAGRAM),
        ),
        frame(
            "multicast, ipv4",
            GROUP4,
            IPV4,
            &ipv4(UDP, [224, 0, 0, 251], 0, &DATAGRAM),
        ),
        frame(
            "multicast, ipv6",
            GROUP6,
            IPV6,
            &ipv6(UDP, group6(0xfb), &DATAGRAM),
        ),
        frame(
            "first fragment",
            POD,
            IPV4,
            &ipv4(UDP, POD4, 0x2000, &DATAGRAM),
        ),
        frame(
            "later fragment",
            POD,
            IPV4,
            &ipv4(UDP, POD4, 185, &[0xff; 64]),
        ),
        frame("first ipv6 fragment", POD, IPV6, &fragment6(0)),
        frame("later ipv6 fragment", POD, IPV6, &fragment6(184)),
        frame("one tag", POD, TAG, &tagged(IPV4, &datagram4)),
        frame(
            "two tags",
            POD,
            SERVICE_TAG,
            &tagged(TAG, &tagged(IPV6, &datagram6)),
        ),
        whole,
        // The kernel runs no test on a cut IP packet, unless a tag hides it.
        frame("runt", POD, ARP, &[0]),
        frame("header only", POD, 0xdead, &[0]),
        frame("cut ipv4", POD, TAG, &tagged(IPV4, &[])),
        frame("cut ipv6", POD, TAG, &tagged(IPV6, &[0x60])),
        frame("junk", POD, 0xdead, &[0xa5; 46]),
        frame("length field", POD, 0x0026, &[0x42; 38]),
    ]
}

/// The pod's own announcement, brought back by the switch.
pub(crate) fn echo() -> Frame {
    let mut echo = frame("echo", ALL, ARP, &[0; 46]);
    echo.bytes[6..12].copy_from_slice(&POD);
    echo
}

pub(crate) fn is_group(frame: &Frame) -> bool {
    frame.bytes[0] & 1 == 1
}
