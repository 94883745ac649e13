//! The next step on the way to another node, as far as the link layer: what a program needs that sends a packet by itself.

use std::net::IpAddr;

use futures::TryStreamExt;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use rtnetlink::RouteMessageBuilder;
use vm_runtime::units::MacAddress;

use super::{Netlink, filters_vlans, read_link};
use crate::network::error::NetlinkError;

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hop {
    /// The device that packets leave by: never a bridge, but its port.
    pub(crate) device: u32,
    /// Its name.
    pub(crate) name: String,
    /// The longest packet that it takes.
    pub(crate) mtu: u32,
    /// The node's own MAC address there.
    pub(crate) from: MacAddress,
    /// The neighbour's.
    pub(crate) to: MacAddress,
    /// The node's own address that packets come from.
    pub(crate) source: IpAddr,
}

/// Why none is known.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoHop {
    #[error("the route to {0} leads to no single neighbour")]
    Route(IpAddr),
    #[error("the link-layer address of {0} is not known now")]
    Neighbour(IpAddr),
    #[error("the bridge {bridge} does not know now which port the way to {remote} is behind")]
    Port { bridge: String, remote: IpAddr },
    #[error("the bridge {0} filters VLANs, which this would go past")]
    Vlans(String),
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
}

/// A device, as a packet that leaves sees it.
struct Way {
    name: String,
    mac: MacAddress,
    mtu: u32,
    is_bridge: bool,
    filters_vlans: bool,
}

impl Netlink {
    /// Looks the step up. Whatever the kernel does not know at this moment is an error: nobody is asked.
    pub(crate) async fn hop(&self, remote: IpAddr) -> Result<Hop, NoHop> {
        let route = self.route_to(remote).await?;
        let no_route = || NoHop::Route(remote);
        let (device, source) = (out_of(&route), source(&route));
        let (Some(device), Some(source), RouteType::Unicast) = (device, source, route.header.kind)
        else {
            return Err(no_route());
        };
        let next = gateway(&route).unwrap_or(remote);
        let to = self.neighbour(device, next).await?;
        let way = self.way(device).await?;
        let hop = Hop {
            device,
            name: way.name,
            mtu: way.mtu,
            from: way.mac,
            to,
            source,
        };
        if !way.is_bridge {
            return Ok(hop);
        }
        if way.filters_vlans {
            return Err(NoHop::Vlans(hop.name));
        }
        let Some(port) = self.port_to(device, to).await? else {
            let bridge = hop.name;
            return Err(NoHop::Port { bridge, remote });
        };
        let way = self.way(port).await?;
        Ok(Hop {
            device: port,
            name: way.name,
            mtu: hop.mtu.min(way.mtu),
            ..hop
        })
    }

    async fn route_to(&self, remote: IpAddr) -> Result<RouteMessage, NoHop> {
        let prefix = if remote.is_ipv4() { 32 } else { 128 };
        let message = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(remote, prefix)
            .map_err(|_| NoHop::Route(remote))?
            .build();
        let mut found = self.handle.route().get(message).execute();
        let route = found.try_next().await.map_err(|source| {
            NetlinkError::new("read the route to", &remote.to_string(), source)
        })?;
        route.ok_or(NoHop::Route(remote))
    }

    async fn neighbour(&self, device: u32, address: IpAddr) -> Result<MacAddress, NoHop> {
        let (family, wanted) = match address {
            IpAddr::V4(address) => (AddressFamily::Inet, NeighbourAddress::Inet(address)),
            IpAddr::V6(address) => (AddressFamily::Inet6, NeighbourAddress::Inet6(address)),
        };
        let wanted = NeighbourAttribute::Destination(wanted);
        let found = self.neighbours_of(family, address).await?;
        found
            .iter()
            .filter(|entry| entry.header.ifindex == device && is_valid(entry))
            .find(|entry| entry.attributes.contains(&wanted))
            .and_then(mac)
            .ok_or(NoHop::Neighbour(address))
    }

    /// The bridge's port that it sends frames for `mac` to.
    async fn port_to(&self, bridge: u32, mac: MacAddress) -> Result<Option<u32>, NoHop> {
        let found = self.neighbours_of(AddressFamily::Bridge, mac).await?;
        let (mac, of) = (
            NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()),
            NeighbourAttribute::Controller(bridge),
        );
        Ok(found
            .iter()
            .filter(|entry| entry.header.ifindex != bridge)
            .find(|entry| entry.attributes.contains(&mac) && entry.attributes.contains(&of))
            .map(|entry| entry.header.ifindex))
    }

    async fn neighbours_of(
        &self,
        family: AddressFamily,
        whose: impl ToString,
    ) -> Result<Vec<NeighbourMessage>, NetlinkError> {
        let ask = || {
            let request = self.handle.neighbours().get();
            request.set_address_family(family).execute()
        };
        self.dump(ask).await.map_err(|source| {
            NetlinkError::new("read the neighbours for", &whose.to_string(), source)
        })
    }

    async fn way(&self, device: u32) -> Result<Way, NetlinkError> {
        let what = format!("device {device}");
        let mut found = self.handle.link().get().match_index(device).execute();
        let message = found
            .try_next()
            .await
            .map_err(|source| NetlinkError::new("read the link", &what, source))?
            .ok_or(NetlinkError::Missing(what))?;
        let link = read_link(&message);
        let mut way = Way {
            name: String::new(),
            mac: link.mac,
            mtu: link.mtu,
            is_bridge: false,
            filters_vlans: false,
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => way.name.clone_from(name),
                LinkAttribute::LinkInfo(info) => {
                    way.is_bridge = info.contains(&LinkInfo::Kind(InfoKind::Bridge));
                    way.filters_vlans = filters_vlans(info);
                }
                _ => {}
            }
        }
        Ok(way)
    }
}

fn is_valid(entry: &NeighbourMessage) -> bool {
    // include/net/neighbour.h `NUD_VALID`.
    matches!(
        entry.header.state,
        NeighbourState::Permanent
            | NeighbourState::Noarp
            | NeighbourState::Reachable
            | NeighbourState::Probe
            | NeighbourState::Stale
            | NeighbourState::Delay
    )
}

fn mac(entry: &NeighbourMessage) -> Option<MacAddress> {
    entry
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(mac) => {
                mac.as_slice().try_into().ok().map(MacAddress)
            }
            _ => None,
        })
}

fn address(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

fn out_of(route: &RouteMessage) -> Option<u32> {
    route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => Some(*index),
            _ => None,
        })
}

fn source(route: &RouteMessage) -> Option<IpAddr> {
    route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::PrefSource(source) => address(source),
            _ => None,
        })
}

/// None: the destination is the neighbour.
fn gateway(route: &RouteMessage) -> Option<IpAddr> {
    use netlink_packet_route::route::RouteVia;
    route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Gateway(gateway) => address(gateway),
            RouteAttribute::Via(RouteVia::Inet(gateway)) => Some(IpAddr::V4(*gateway)),
            RouteAttribute::Via(RouteVia::Inet6(gateway)) => Some(IpAddr::V6(*gateway)),
            _ => None,
        })
}
