//! rtnetlink, in messages of our own.
//!
//! Layouts: linux/rtnetlink.h, linux/if_addr.h; all integers are in the machine's byte order.

use std::io::IoSliceMut;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recvmsg, sendto, socket,
};

/// A request: its type, its flags beyond REQUEST and ACK, and what follows the header.
pub(crate) struct Message {
    kind: u16,
    flags: i32,
    body: Vec<u8>,
}

impl Message {
    fn attribute(&mut self, kind: u16, value: &[u8]) {
        let length = (value.len() + 4) as u16;
        self.body.extend(length.to_ne_bytes());
        self.body.extend(kind.to_ne_bytes());
        self.body.extend(value);
        self.body.resize(self.body.len().next_multiple_of(4), 0);
    }

    fn encode(&self, sequence: u32) -> Vec<u8> {
        let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK | self.flags;
        let mut out = Vec::with_capacity(16 + self.body.len());
        out.extend((16 + self.body.len() as u32).to_ne_bytes());
        out.extend(self.kind.to_ne_bytes());
        out.extend((flags as u16).to_ne_bytes());
        out.extend(sequence.to_ne_bytes());
        out.extend(0u32.to_ne_bytes());
        out.extend(&self.body);
        out
    }
}

fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => libc::AF_INET as u8,
        IpAddr::V6(_) => libc::AF_INET6 as u8,
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// RTM_NEWLINK, struct ifinfomsg.
pub(crate) fn link_up(index: u32) -> Message {
    let up = libc::IFF_UP as u32;
    let mut body = vec![0; 4];
    body.extend(index.to_ne_bytes());
    body.extend(up.to_ne_bytes());
    body.extend(up.to_ne_bytes());
    Message {
        kind: libc::RTM_NEWLINK,
        flags: 0,
        body,
    }
}

/// RTM_NEWLINK, struct ifinfomsg: nothing but the MTU.
pub(crate) fn link_mtu(index: u32, mtu: u32) -> Message {
    link_attribute(index, libc::IFLA_MTU, &mtu.to_ne_bytes())
}

/// The same with nothing but the address.
pub(crate) fn link_address(index: u32, mac: [u8; 6]) -> Message {
    link_attribute(index, libc::IFLA_ADDRESS, &mac)
}

fn link_attribute(index: u32, kind: u16, value: &[u8]) -> Message {
    let mut body = vec![0; 4];
    body.extend(index.to_ne_bytes());
    body.extend([0; 8]);
    let mut message = Message {
        kind: libc::RTM_NEWLINK,
        flags: 0,
        body,
    };
    message.attribute(kind, value);
    message
}

/// RTM_NEWNEIGH, struct ndmsg (linux/neighbour.h): an entry that stays as it is.
pub(crate) fn neighbour(index: u32, address: IpAddr, mac: [u8; 6]) -> Message {
    let mut body = vec![family(address), 0, 0, 0];
    body.extend(index.to_ne_bytes());
    body.extend(libc::NUD_PERMANENT.to_ne_bytes());
    body.extend([0, 0]);
    let mut message = Message {
        kind: libc::RTM_NEWNEIGH,
        flags: libc::NLM_F_CREATE | libc::NLM_F_REPLACE,
        body,
    };
    message.attribute(libc::NDA_DST, &octets(address));
    message.attribute(libc::NDA_LLADDR, &mac);
    message
}

/// RTM_NEWADDR, struct ifaddrmsg.
pub(crate) fn new_address(index: u32, address: IpAddr, prefix: u8) -> Message {
    let mut body = vec![family(address), prefix, 0, 0];
    body.extend(index.to_ne_bytes());
    let mut message = Message {
        kind: libc::RTM_NEWADDR,
        flags: libc::NLM_F_CREATE | libc::NLM_F_REPLACE,
        body,
    };
    message.attribute(libc::IFA_LOCAL, &octets(address));
    message.attribute(libc::IFA_ADDRESS, &octets(address));
    match address {
        IpAddr::V4(v4) if prefix < 31 => {
            let broadcast = v4.to_bits() | (u32::MAX >> prefix);
            message.attribute(libc::IFA_BROADCAST, &broadcast.to_be_bytes());
        }
        IpAddr::V4(_) => {}
        IpAddr::V6(_) => {
            message.attribute(libc::IFA_FLAGS, &libc::IFA_F_NODAD.to_ne_bytes());
        }
    }
    message
}

/// RTM_NEWROUTE, struct rtmsg: the default route, its gateway on the link whatever the prefix says.
pub(crate) fn default_route(index: u32, gateway: IpAddr) -> Message {
    let mut body = vec![
        family(gateway),
        0,
        0,
        0,
        libc::RT_TABLE_MAIN,
        libc::RTPROT_STATIC,
        libc::RT_SCOPE_UNIVERSE,
        libc::RTN_UNICAST,
    ];
    /// `RTNH_F_ONLINK` (linux/rtnetlink.h).
    const ONLINK: u32 = 4;
    body.extend(ONLINK.to_ne_bytes());
    let mut message = Message {
        kind: libc::RTM_NEWROUTE,
        flags: libc::NLM_F_CREATE | libc::NLM_F_REPLACE,
        body,
    };
    message.attribute(libc::RTA_GATEWAY, &octets(gateway));
    message.attribute(libc::RTA_OIF, &index.to_ne_bytes());
    message
}

pub(crate) struct Netlink {
    socket: OwnedFd,
    sequence: AtomicU32,
}

/// The agent's one socket; a template's is open already.
pub(crate) fn netlink() -> Result<&'static Netlink> {
    static OPEN: OnceLock<Netlink> = OnceLock::new();
    match OPEN.get() {
        Some(netlink) => Ok(netlink),
        None => {
            let netlink = Netlink::open()?;
            Ok(OPEN.get_or_init(|| netlink))
        }
    }
}

impl Netlink {
    fn open() -> Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )
        .context("opening an rtnetlink socket")?;
        Ok(Self {
            socket,
            sequence: AtomicU32::new(0),
        })
    }

    /// Sends a request, and awaits what the kernel says to it.
    pub(crate) fn call(&self, message: Message) -> Result<()> {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        let kernel = NetlinkAddr::new(0, 0);
        let fd = self.socket.as_raw_fd();
        sendto(fd, &message.encode(sequence), &kernel, MsgFlags::empty())
            .context("sending to rtnetlink")?;
        let mut buffer = [0u8; 4096];
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let length = recvmsg::<()>(fd, &mut slices, None, MsgFlags::empty())
            .context("receiving from rtnetlink")?
            .bytes;
        match acknowledgement(&buffer[..length]) {
            Some(0) => Ok(()),
            Some(errno) => Err(std::io::Error::from_raw_os_error(errno).into()),
            None => bail!("rtnetlink did not answer with an acknowledgement"),
        }
    }
}

/// The errno in an NLMSG_ERROR message, 0 being success.
fn acknowledgement(answer: &[u8]) -> Option<i32> {
    let kind = u16::from_ne_bytes(answer.get(4..6)?.try_into().ok()?);
    let error = i32::from_ne_bytes(answer.get(16..20)?.try_into().ok()?);
    (i32::from(kind) == libc::NLMSG_ERROR).then_some(error.checked_neg()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_address_carries_its_broadcast_address() {
        let message = new_address(2, "10.77.0.10".parse().expect("an address"), 24);
        let wire = message.encode(7);
        assert_eq!(wire.len(), 16 + 8 + 3 * 8);
        assert_eq!(wire[..4], (wire.len() as u32).to_ne_bytes());
        assert_eq!(wire[wire.len() - 4..], [10, 77, 0, 255]);
    }

    #[test]
    fn an_ipv6_address_skips_duplicate_detection() {
        let message = new_address(2, "fd77::10".parse().expect("an address"), 64);
        assert_eq!(message.body[message.body.len() - 4..], 2u32.to_ne_bytes());
    }

    #[test]
    fn a_neighbour_is_permanent_and_has_its_mac() {
        let message = neighbour(2, "169.254.1.1".parse().expect("an address"), [0xee; 6]);
        // ndm_state, a u16 behind family, padding and index.
        assert_eq!(message.body[8..10], 0x80u16.to_ne_bytes());
        // Each attribute is 4 bytes and its value, padded to 4.
        assert_eq!(message.body.len(), 12 + 8 + 12);
        assert_eq!(message.body[16..20], [169, 254, 1, 1]);
        assert_eq!(message.body[24..30], [0xee; 6]);
    }

    #[test]
    fn an_error_answer_gives_its_errno() {
        let mut answer = vec![0u8; 36];
        answer[4..6].copy_from_slice(&2u16.to_ne_bytes());
        answer[16..20].copy_from_slice(&(-17i32).to_ne_bytes());
        assert_eq!(acknowledgement(&answer), Some(17));
        assert_eq!(acknowledgement(&answer[..10]), None);
    }
}
