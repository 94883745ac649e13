//! Conversations with ctnetlink over a socket, which block. A socket belongs to the network namespace of the thread that opened it.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use super::codec::{self, Attributes};
use super::flow::Flow;

/// linux/netfilter/nfnetlink.h `NFNL_SUBSYS_CTNETLINK`, as it stands in a message's type.
const SUBSYSTEM: u16 = 1 << 8;
/// linux/netfilter/nfnetlink_conntrack.h `IPCTNL_MSG_CT_*`.
const NEW: u16 = SUBSYSTEM;
const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 2;
/// linux/netfilter/nfnetlink_compat.h `NF_NETLINK_CONNTRACK_NEW`, a bit of [`NetlinkAddr`]'s groups.
const GROUP_NEW: u32 = 1;

/// `struct nlmsghdr` (linux/netlink.h), and `struct nfgenmsg` (linux/netfilter/nfnetlink.h) behind it.
const HEADER: usize = 16;
const FAMILY_HEADER: usize = 4;

/// Messages that go to the kernel at once: so many answers fit a socket's buffer.
const BATCH: usize = 64;
/// The kernel answers within the call that asks; what takes longer than this is broken.
const ANSWER_S: i64 = 5;
/// One read: the kernel makes its pieces of a dump 32 KiB at most (net/netlink/af_netlink.c `netlink_dump`).
const READ: usize = 64 << 10;
/// How often a dump is taken again that changed under it.
const DUMPS: u32 = 3;
/// Bytes of news that may wait: some ten thousand new flows.
const NEWS: usize = 8 << 20;

/// A socket to ctnetlink.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    sequence: u32,
}

/// What to do with a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Make it; `EEXIST` if it is there.
    Create,
    /// Bring it up to date; `ENOENT` if it is not there.
    Update,
    /// Let it go after so many seconds, unless a packet comes.
    Fade(u32),
    /// Remove it; `ENOENT` if it is not there.
    Delete,
}

impl Change {
    fn message(self, flow: &Flow) -> (u16, i32, Attributes) {
        let (kind, flags, attributes) = match self {
            Self::Create => {
                let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
                (NEW, flags, codec::create(flow))
            }
            Self::Update => (NEW, 0, codec::update(flow)),
            Self::Fade(seconds) => (NEW, 0, codec::fade(flow, seconds)),
            // Always with a tuple: without one the kernel removes every entry that there is.
            Self::Delete => (DELETE, 0, codec::name(flow)),
        };
        (
            kind,
            flags | libc::NLM_F_REQUEST | libc::NLM_F_ACK,
            attributes,
        )
    }
}

fn family(address: IpAddr) -> u8 {
    // Both fit a byte: linux/socket.h.
    match address {
        IpAddr::V4(_) => libc::AF_INET as u8,
        IpAddr::V6(_) => libc::AF_INET6 as u8,
    }
}

impl Socket {
    pub(super) fn open() -> io::Result<Self> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkNetFilter,
        )?;
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::new(ANSWER_S, 0))?;
        Ok(Self { fd, sequence: 0 })
    }

    fn push(
        &mut self,
        batch: &mut Vec<u8>,
        family: u8,
        (kind, flags, attributes): (u16, i32, Attributes),
    ) {
        self.sequence += 1;
        let attributes = attributes.into_bytes();
        let length = (HEADER + FAMILY_HEADER + attributes.len()) as u32;
        batch.extend(length.to_ne_bytes());
        batch.extend(kind.to_ne_bytes());
        batch.extend((flags as u16).to_ne_bytes());
        batch.extend(self.sequence.to_ne_bytes());
        batch.extend([0; 4]);
        // Version 0, no resource.
        batch.extend([family, 0, 0, 0]);
        batch.extend(attributes);
    }

    /// Carries a change out on each flow; what came of each, in order.
    pub(super) fn change(
        &mut self,
        change: Change,
        flows: &[&Flow],
    ) -> io::Result<Vec<Result<(), Errno>>> {
        let mut results = Vec::with_capacity(flows.len());
        let mut buffer = vec![0; READ];
        for part in flows.chunks(BATCH) {
            let first = self.sequence + 1;
            let mut batch = Vec::new();
            for flow in part {
                let message = change.message(flow);
                self.push(&mut batch, family(flow.original.source), message);
            }
            send(self.fd.as_raw_fd(), &batch, MsgFlags::empty())?;
            let mut answers = vec![None; part.len()];
            while answers.iter().any(Option::is_none) {
                let length = self.receive(&mut buffer)?;
                for message in Messages(&buffer[..length]) {
                    let index = message.sequence.wrapping_sub(first) as usize;
                    if let (Some(result), Some(answer)) = (message.error(), answers.get_mut(index))
                    {
                        *answer = Some(result);
                    }
                }
            }
            results.extend(answers.into_iter().flatten());
        }
        Ok(results)
    }

    /// The flows of a pod with these addresses.
    pub(super) fn dump(&mut self, pod: &[IpAddr]) -> io::Result<Vec<Flow>> {
        let mut flows = Vec::new();
        for address in pod {
            match address {
                IpAddr::V4(_) => {
                    for answers in [false, true] {
                        let filter = || codec::filter(*address, answers);
                        flows.extend(self.dump_part(family(*address), filter)?);
                    }
                }
                // The kernel's filter of IPv6 addresses finds all others (seen up to 6.18: `ctnetlink_filter_match_tuple`).
                IpAddr::V6(_) => {
                    flows.extend(self.dump_part(family(*address), Attributes::default)?);
                }
            }
        }
        // A kernel before 5.8 does not filter at all; and a flow may be found by both of its ends.
        flows.retain(|flow| flow.concerns(pod));
        let mut seen = std::collections::HashSet::new();
        flows.retain(|flow| seen.insert((flow.original, flow.zone)));
        Ok(flows)
    }

    fn dump_part(
        &mut self,
        family: u8,
        attributes: impl Fn() -> Attributes,
    ) -> io::Result<Vec<Flow>> {
        let mut left = DUMPS;
        loop {
            left -= 1;
            let (flows, whole) = self.dump_once(family, attributes())?;
            if whole || left == 0 {
                return Ok(flows);
            }
        }
    }

    /// Also whether the table has not changed its size meanwhile.
    fn dump_once(&mut self, family: u8, attributes: Attributes) -> io::Result<(Vec<Flow>, bool)> {
        let mut request = Vec::new();
        let flags = libc::NLM_F_REQUEST | libc::NLM_F_DUMP;
        self.push(&mut request, family, (GET, flags, attributes));
        send(self.fd.as_raw_fd(), &request, MsgFlags::empty())?;
        let (mut flows, mut whole) = (Vec::new(), true);
        let mut buffer = vec![0; READ];
        loop {
            let length = self.receive(&mut buffer)?;
            for message in Messages(&buffer[..length]) {
                if message.sequence != self.sequence {
                    continue;
                }
                // linux/netlink.h `NLM_F_DUMP_INTR`.
                whole &= message.flags & 0x10 == 0;
                match message.error() {
                    Some(Err(errno)) => return Err(errno.into()),
                    Some(Ok(())) => return Ok((flows, whole)),
                    None => flows.extend(message.flow()),
                }
            }
        }
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match recv(self.fd.as_raw_fd(), buffer, MsgFlags::empty()) {
                Ok(length) => return Ok(length),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// Hears of every new flow of its namespace, from when it was opened.
#[derive(Debug)]
pub(super) struct News {
    fd: OwnedFd,
    buffer: Vec<u8>,
}

impl News {
    pub(super) fn open() -> io::Result<Self> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkNetFilter,
        )?;
        setsockopt(&fd, sockopt::RcvBufForce, &NEWS)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, GROUP_NEW))?;
        let buffer = vec![0; READ];
        Ok(Self { fd, buffer })
    }

    /// What has come since the last call, of a pod with these addresses. Never waits. False if there was more than could wait.
    pub(super) fn take(&mut self, pod: &[IpAddr]) -> io::Result<(Vec<Flow>, bool)> {
        let (mut flows, mut whole) = (Vec::new(), true);
        loop {
            match recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Ok(length) => {
                    let found = Messages(&self.buffer[..length]).filter_map(|m| m.flow());
                    flows.extend(found.filter(|flow| flow.concerns(pod)));
                }
                Err(Errno::EINTR) => {}
                Err(Errno::ENOBUFS) => whole = false,
                Err(Errno::EAGAIN) => return Ok((flows, whole)),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// One message of the kernel.
struct Message<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    payload: &'a [u8],
}

impl Message<'_> {
    /// What it says of a request, if it does: also a dump's end.
    fn error(&self) -> Option<Result<(), Errno>> {
        let ends = [libc::NLMSG_ERROR, libc::NLMSG_DONE].contains(&i32::from(self.kind));
        let code = self.payload.first_chunk().filter(|_| ends)?;
        Some(match i32::from_ne_bytes(*code) {
            code if code < 0 => Err(Errno::from_raw(-code)),
            _ => Ok(()),
        })
    }

    fn flow(&self) -> Option<Flow> {
        (self.kind == NEW).then(|| codec::read(self.payload.get(FAMILY_HEADER..)?))?
    }
}

/// The messages in what was read at once.
struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let word = |at| Some(u32::from_ne_bytes(*self.0.get(at..)?.first_chunk()?));
        let half = |at| Some(u16::from_ne_bytes(*self.0.get(at..)?.first_chunk()?));
        let length = word(0)? as usize;
        let message = Message {
            kind: half(4)?,
            flags: half(6)?,
            sequence: word(8)?,
            payload: self.0.get(HEADER..length)?,
        };
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    }
}
