//! Sockets for each kind of traffic. The only place with `unsafe`.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::kind::{GROUP4, GROUP6, Kind};

/// linux/socket.h and asm-generic/socket.h (x86_64 uses it unchanged), linux/in.h, linux/in6.h.
const AF_INET: i32 = 2;
const AF_INET6: i32 = 10;
const SOCK_RAW: i32 = 3;
const SOCK_CLOEXEC: i32 = 0o2_000_000;
const IPPROTO_ICMP: i32 = 1;
const IPPROTO_ICMPV6: i32 = 58;
const SOL_SOCKET: i32 = 1;
const SO_RCVBUF: i32 = 8;
const SO_RCVBUFFORCE: i32 = 33;
/// Bytes: what comes in a burst after seconds of silence must not be lost here.
static BUFFER: i32 = 8 << 20;

/// RFC 792 and RFC 4443.
const ECHO_REQUEST4: u8 = 8;
const ECHO_REPLY4: u8 = 0;
const ECHO_REQUEST6: u8 = 128;
const ECHO_REPLY6: u8 = 129;
/// Bytes of an ICMP echo before its data.
const ECHO_HEADER: usize = 8;

unsafe extern "C" {
    fn setsockopt(fd: i32, level: i32, name: i32, value: *const i32, length: u32) -> i32;
    fn socket(family: i32, kind: i32, protocol: i32) -> i32;
}

fn enlarge(socket: &UdpSocket) {
    // Past the sysctl's limit where that is allowed, else up to it.
    for option in [SO_RCVBUF, SO_RCVBUFFORCE] {
        // SAFETY: setsockopt(2) reads 4 bytes through the pointer, which lives across the call; the descriptor
        // is borrowed from a live socket. A refusal leaves the buffer as it was, which is what we want then.
        unsafe { setsockopt(socket.as_raw_fd(), SOL_SOCKET, option, &raw const BUFFER, 4) };
    }
}

/// A raw ICMP socket. `UdpSocket` only lends its `send_to` and `recv_from`.
fn raw(kind: Kind) -> io::Result<UdpSocket> {
    let (family, protocol) = match kind.is_ipv6() {
        true => (AF_INET6, IPPROTO_ICMPV6),
        false => (AF_INET, IPPROTO_ICMP),
    };
    // SAFETY: socket(2) takes no pointers.
    let fd = unsafe { socket(family, SOCK_RAW | SOCK_CLOEXEC, protocol) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given this descriptor to us, and nobody else owns it.
    Ok(UdpSocket::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Own addresses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Own {
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Ipv6Addr,
}

impl Own {
    /// The index of the interface that has the IPv6 address, from /proc/net/if_inet6.
    fn interface(&self) -> io::Result<u32> {
        let wanted: String = self
            .v6
            .octets()
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        let table = std::fs::read_to_string("/proc/net/if_inet6")?;
        table
            .lines()
            .filter_map(|line| line.strip_prefix(&wanted))
            .find_map(|rest| u32::from_str_radix(rest.split_whitespace().next()?, 16).ok())
            .ok_or_else(|| io::Error::other(format!("no interface has {}", self.v6)))
    }
}

/// Where the receiver takes packets of a kind.
pub(crate) fn receiver(kind: Kind, own: Own) -> io::Result<UdpSocket> {
    let socket = match kind {
        Kind::Echo4 | Kind::Echo6 => raw(kind)?,
        Kind::Udp4 | Kind::Fragments4 => UdpSocket::bind((own.v4, kind.port()))?,
        Kind::Udp6 | Kind::Fragments6 => UdpSocket::bind((own.v6, kind.port()))?,
        Kind::Group4 => {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, kind.port()))?;
            socket.join_multicast_v4(&GROUP4, &own.v4)?;
            socket
        }
        Kind::Group6 => {
            let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, kind.port()))?;
            socket.join_multicast_v6(&GROUP6, own.interface()?)?;
            socket
        }
    };
    enlarge(&socket);
    Ok(socket)
}

/// What a sender sends packets of a kind from, and takes their answers with.
pub(crate) fn sender(kind: Kind, own: Own) -> io::Result<UdpSocket> {
    let socket = match kind {
        Kind::Echo4 | Kind::Echo6 => raw(kind)?,
        // A group goes out by the interface of the source's address.
        Kind::Udp4 | Kind::Fragments4 | Kind::Group4 => UdpSocket::bind((own.v4, 0))?,
        Kind::Udp6 | Kind::Fragments6 | Kind::Group6 => UdpSocket::bind((own.v6, 0))?,
    };
    enlarge(&socket);
    Ok(socket)
}

/// Where packets of a kind go to.
pub(crate) fn target(kind: Kind, own: Own, to: Own) -> io::Result<SocketAddr> {
    Ok(match kind {
        Kind::Echo4 => (to.v4, 0).into(),
        Kind::Echo6 => (to.v6, 0).into(),
        Kind::Udp4 | Kind::Fragments4 => (to.v4, kind.port()).into(),
        Kind::Udp6 | Kind::Fragments6 => (to.v6, kind.port()).into(),
        Kind::Group4 => (GROUP4, kind.port()).into(),
        Kind::Group6 => SocketAddrV6::new(GROUP6, kind.port(), 0, own.interface()?).into(),
    })
}

/// What goes into the socket for a packet: an echo gets its header here.
pub(crate) fn wrap(kind: Kind, sender: u16, number: u64, packet: Vec<u8>) -> Vec<u8> {
    let request = match kind {
        Kind::Echo4 => ECHO_REQUEST4,
        Kind::Echo6 => ECHO_REQUEST6,
        Kind::Udp4
        | Kind::Udp6
        | Kind::Fragments4
        | Kind::Fragments6
        | Kind::Group4
        | Kind::Group6 => return packet,
    };
    let mut bytes = vec![request, 0, 0, 0];
    bytes.extend(sender.to_be_bytes());
    bytes.extend((number as u16).to_be_bytes());
    bytes.extend(packet);
    if kind == Kind::Echo4 {
        // For ICMPv6 the kernel does it.
        let sum = checksum(&bytes);
        bytes[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    bytes
}

/// The packet in what a socket gave; `None` if it is no request, or no answer, whichever is wanted.
pub(crate) fn unwrap(kind: Kind, bytes: &[u8], answer: bool) -> Option<&[u8]> {
    let (message, wanted) = match kind {
        Kind::Echo4 => {
            // A raw IPv4 socket gives the IP header as well.
            let header = usize::from(bytes.first()? & 0xf) * 4;
            let wanted = if answer { ECHO_REPLY4 } else { ECHO_REQUEST4 };
            (bytes.get(header..)?, wanted)
        }
        Kind::Echo6 => (bytes, if answer { ECHO_REPLY6 } else { ECHO_REQUEST6 }),
        Kind::Udp4
        | Kind::Udp6
        | Kind::Fragments4
        | Kind::Fragments6
        | Kind::Group4
        | Kind::Group6 => return Some(bytes),
    };
    (*message.first()? == wanted).then(|| message.get(ECHO_HEADER..))?
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
