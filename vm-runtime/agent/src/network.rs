//! Addresses and routes by rtnetlink, in messages of our own: the guest has no tools.
//!
//! Layouts: linux/rtnetlink.h, linux/if_addr.h; all integers are in the machine's byte order.

use std::fs;
use std::io::IoSliceMut;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use anyhow::{Context, Result, bail};
use guest_agent::protocol::message::Interface;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recvmsg, sendto, socket,
};

use crate::boot::set_sysctl;

/// The loopback interface's index in every network namespace: it is the first that is made (linux/net/core/dev.c).
const LOOPBACK: u32 = 1;

/// Brings the loopback interface up, if that has not been done.
pub(crate) fn loopback() -> Result<()> {
    if !links_known().is_empty() {
        return Ok(());
    }
    netlink()?.call(link_up(LOOPBACK)).context("bringing lo up")
}

/// Gives one interface its addresses and routes, ready for use at once.
pub(crate) fn configure(interface: &Interface) -> Result<()> {
    let link = find(interface.mac)?;
    let Link { name, index, .. } = &link;
    let index = *index;
    if !link.ready {
        plain(name)?;
    }
    let netlink = netlink()?;
    if let Some(mtu) = interface.mtu {
        netlink
            .call(link_mtu(index, mtu))
            .with_context(|| format!("setting the MTU of {name} to {mtu}"))?;
    }
    let mut addresses = interface.addresses.iter();
    own_addresses(name, addresses.any(|(address, _)| address.is_ipv6()))?;
    if !link.ready {
        netlink
            .call(link_up(index))
            .with_context(|| format!("bringing {name} up"))?;
    }
    for (address, mac) in &interface.neighbours {
        netlink
            .call(neighbour(index, *address, *mac))
            .with_context(|| format!("entering {address} as a neighbour on {name}"))?;
    }
    for (address, prefix) in &interface.addresses {
        netlink
            .call(new_address(index, *address, *prefix))
            .with_context(|| format!("adding {address}/{prefix} to {name}"))?;
    }
    for gateway in &interface.gateways {
        netlink
            .call(default_route(index, *gateway))
            .with_context(|| format!("adding the default route by {gateway}"))?;
    }
    Ok(())
}

/// A network interface, as sysfs shows it.
#[derive(Clone, Debug)]
struct Link {
    name: String,
    index: u32,
    mac: String,
    /// It is up, and lacks only its addresses.
    ready: bool,
}

/// What a template has looked up for the guests that start from it: for them these files are in no cache, and slow to read.
static LINKS: Mutex<Vec<Link>> = Mutex::new(Vec::new());

fn links_known() -> MutexGuard<'static, Vec<Link>> {
    LINKS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Looks the guest's interfaces up, and brings them up, for guests that start from this one.
pub(crate) fn prepare() -> Result<()> {
    loopback()?;
    let mut links = links()?;
    let netlink = netlink()?;
    for link in links.iter_mut().filter(|link| link.index != LOOPBACK) {
        plain(&link.name)?;
        // It has another MAC address later.
        own_addresses(&link.name, false)?;
        netlink
            .call(link_up(link.index))
            .with_context(|| format!("bringing {} up", link.name))?;
        link.ready = true;
    }
    *links_known() = links;
    Ok(())
}

/// An interface's addresses are there at once, and come from nobody but the host.
fn plain(name: &str) -> Result<()> {
    for (key, value) in [
        ("accept_dad", "0"),
        ("dad_transmits", "0"),
        ("accept_ra", "0"),
    ] {
        set_sysctl(&format!("net.ipv6.conf.{name}.{key}"), value)?;
    }
    Ok(())
}

/// Whether an interface that is up has link-local addresses, which the kernel makes from its MAC address.
fn own_addresses(name: &str, wanted: bool) -> Result<()> {
    /// `IN6_ADDR_GEN_MODE_EUI64`, `IN6_ADDR_GEN_MODE_NONE` (linux/if_link.h).
    const MODES: [&str; 2] = ["0", "1"];
    let mode = MODES[usize::from(!wanted)];
    set_sysctl(&format!("net.ipv6.conf.{name}.addr_gen_mode"), mode)
}

/// Gives the device with the address `old` the address `new`.
pub(crate) fn readdress(old: [u8; 6], new: [u8; 6]) -> Result<()> {
    let link = find(old)?;
    netlink()?
        .call(link_address(link.index, new))
        .with_context(|| format!("setting the MAC address of {}", link.name))?;
    let mut known = links_known();
    for known in known.iter_mut().filter(|known| known.index == link.index) {
        known.mac = text(new);
    }
    Ok(())
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|b| format!("{b:02x}")).join(":")
}

fn find(mac: [u8; 6]) -> Result<Link> {
    let wanted = text(mac);
    let known = links_known();
    if let Some(link) = known.iter().find(|link| link.mac == wanted) {
        return Ok(link.clone());
    }
    let link = links()?.into_iter().find(|link| link.mac == wanted);
    link.with_context(|| format!("the VM has no network interface with the MAC {wanted}"))
}

fn links() -> Result<Vec<Link>> {
    let mut links = Vec::new();
    for entry in fs::read_dir("/sys/class/net").context("listing the network interfaces")? {
        let entry = entry.context("listing the network interfaces")?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let address = fs::read_to_string(entry.path().join("address")).unwrap_or_default();
        links.push(Link {
            index: interface_index(&name)?,
            mac: address.trim_end().to_owned(),
            name,
            ready: false,
        });
    }
    Ok(links)
}

fn interface_index(name: &str) -> Result<u32> {
    let path = format!("/sys/class/net/{name}/ifindex");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    text.trim_end()
        .parse()
        .with_context(|| format!("reading {path}"))
}

/// A request: its type, its flags beyond REQUEST and ACK, and what follows the header.
struct Message {
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
fn link_up(index: u32) -> Message {
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
fn link_mtu(index: u32, mtu: u32) -> Message {
    link_attribute(index, libc::IFLA_MTU, &mtu.to_ne_bytes())
}

/// The same with nothing but the address.
fn link_address(index: u32, mac: [u8; 6]) -> Message {
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
fn neighbour(index: u32, address: IpAddr, mac: [u8; 6]) -> Message {
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
fn new_address(index: u32, address: IpAddr, prefix: u8) -> Message {
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
fn default_route(index: u32, gateway: IpAddr) -> Message {
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

struct Netlink {
    socket: OwnedFd,
    sequence: AtomicU32,
}

/// The agent's one socket; a template's is open already.
fn netlink() -> Result<&'static Netlink> {
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

    fn call(&self, message: Message) -> Result<()> {
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
