//! Interfaces, addresses and routes, by rtnetlink: the guest has no tools.

use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use guest_agent::protocol::message::Interface;

use crate::boot::set_sysctl;
use crate::netlink::{
    default_route, link_address, link_mtu, link_up, neighbour, netlink, new_address,
};

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
