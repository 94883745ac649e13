//! The kinds of traffic of the switchover soak, and their numbered packets. Pure, and only `std`: the program in the
//! guests is compiled from this file by `rustc` alone.
//!
//! ```text
//! mark u32, kind u8, 1 if an answer u8, sender u16, run u64, number u64, then filler that follows from the number
//! ```
//!
//! Integers are little-endian. Over UDP this is the datagram, in an ICMP echo its data.

use std::net::{Ipv4Addr, Ipv6Addr};

/// Where orders are taken (TCP).
pub const CONTROL_PORT: u16 = 7200;
/// Where the receiver answers streams (TCP).
pub const STREAM_PORT: u16 = 7210;
/// The IPv4 group that the receiver joins (RFC 2365, administratively scoped).
pub const GROUP4: Ipv4Addr = Ipv4Addr::new(239, 77, 0, 1);
/// The IPv6 group that the receiver joins (RFC 4291: transient, site-local scope).
pub const GROUP6: Ipv6Addr = Ipv6Addr::new(0xff15, 0, 0, 0, 0, 0, 0, 0x77);

const MARK: u32 = 0x464c_4f57;
const HEADER: usize = 24;

/// A kind of traffic, each a flow of its own from each sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// UDP over IPv4, in one packet.
    Udp4,
    /// UDP over IPv6, in one packet.
    Udp6,
    /// UDP over IPv4, in three fragments.
    Fragments4,
    /// UDP over IPv6, in three fragments.
    Fragments6,
    /// ICMP echo, answered by the guest's kernel.
    Echo4,
    /// ICMPv6 echo, answered by the guest's kernel.
    Echo6,
    /// UDP to an IPv4 group; the answers are unicast.
    Group4,
    /// UDP to an IPv6 group; the answers are unicast.
    Group6,
}

impl Kind {
    /// All of them, in the order of their indices.
    pub const ALL: [Kind; 8] = [
        Kind::Udp4,
        Kind::Udp6,
        Kind::Fragments4,
        Kind::Fragments6,
        Kind::Echo4,
        Kind::Echo6,
        Kind::Group4,
        Kind::Group6,
    ];

    /// Those that go to one receiver: all that a network of routes carries. They are the first ones of [`ALL`](Self::ALL).
    pub fn unicast() -> &'static [Kind] {
        const ALL: &[Kind] = &Kind::ALL;
        let ones = ALL.iter().take_while(|kind| !kind.is_group());
        &ALL[..ones.count()]
    }

    /// Its place in [`ALL`](Self::ALL).
    pub fn index(self) -> usize {
        self as usize
    }

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Udp4 => "udp4",
            Self::Udp6 => "udp6",
            Self::Fragments4 => "fragments4",
            Self::Fragments6 => "fragments6",
            Self::Echo4 => "echo4",
            Self::Echo6 => "echo6",
            Self::Group4 => "group4",
            Self::Group6 => "group6",
        }
    }

    /// The receiver's port; of no meaning for ICMP.
    pub fn port(self) -> u16 {
        CONTROL_PORT + 1 + self as u16
    }

    /// Whether it goes over IPv6.
    pub fn is_ipv6(self) -> bool {
        matches!(
            self,
            Self::Udp6 | Self::Fragments6 | Self::Echo6 | Self::Group6
        )
    }

    /// Whether it is an ICMP echo.
    pub fn is_echo(self) -> bool {
        matches!(self, Self::Echo4 | Self::Echo6)
    }

    /// Whether it goes to a group.
    pub fn is_group(self) -> bool {
        matches!(self, Self::Group4 | Self::Group6)
    }

    /// Bytes of a packet, above UDP or ICMP. Of fragments: three of Ethernet's 1500 bytes.
    pub fn length(self) -> usize {
        match self {
            Self::Fragments4 | Self::Fragments6 => 4000,
            Self::Udp4 | Self::Udp6 | Self::Group4 | Self::Group6 => 200,
            Self::Echo4 | Self::Echo6 => 56,
        }
    }

    /// Its part of a sender's packets, of [`SHARES`]. A fragmented datagram is three frames each way, and the guest
    /// keeps but few of them for a reader that is late.
    pub fn share(self) -> u32 {
        match self {
            Self::Udp4 | Self::Udp6 => 5,
            Self::Group4 | Self::Group6 => 4,
            Self::Echo4 | Self::Echo6 => 2,
            Self::Fragments4 | Self::Fragments6 => 1,
        }
    }
}

/// The sum of all shares.
pub const SHARES: u32 = 24;

/// A numbered packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// What it goes as.
    pub kind: Kind,
    /// Whether the receiver sends it back.
    pub answer: bool,
    /// Who sent the first one.
    pub sender: u16,
    /// Tells it from packets of an earlier run.
    pub run: u64,
    /// From 0, in its flow.
    pub number: u64,
}

impl Packet {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.kind.length());
        bytes.extend(MARK.to_le_bytes());
        bytes.extend([self.kind as u8, u8::from(self.answer)]);
        bytes.extend(self.sender.to_le_bytes());
        bytes.extend(self.run.to_le_bytes());
        bytes.extend(self.number.to_le_bytes());
        bytes.extend((HEADER..self.kind.length()).map(|at| filler(self.number, at)));
        bytes
    }

    /// The packet, and whether its filler is right; `None` if it is somebody else's.
    pub fn decode(bytes: &[u8]) -> Option<(Packet, bool)> {
        let mark: [u8; 4] = *bytes.first_chunk()?;
        if u32::from_le_bytes(mark) != MARK {
            return None;
        }
        let eight = |at: usize| Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        let packet = Packet {
            kind: *Kind::ALL.get(usize::from(*bytes.get(4)?))?,
            answer: *bytes.get(5)? != 0,
            sender: u16::from_le_bytes(*bytes.get(6..)?.first_chunk()?),
            run: eight(8)?,
            number: eight(16)?,
        };
        let right = bytes.len() == packet.kind.length()
            && (HEADER..bytes.len()).all(|at| bytes[at] == filler(packet.number, at));
        Some((packet, right))
    }
}

fn filler(number: u64, at: usize) -> u8 {
    (number.wrapping_mul(31).wrapping_add(at as u64 * 7) >> 1) as u8
}
