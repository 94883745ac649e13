//! Routes and neighbours of pods that are on no bridge.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
    RouteType,
};
use rtnetlink::{LinkUnspec, RouteMessageBuilder};
use vm_runtime::units::MacAddress;

use super::{Netlink, is_errno, quiet};
use crate::network::error::NetlinkError;
use crate::network::networks::{PodNetwork, PodNetworks};

/// Who made a route (linux/rtnetlink.h `rtm_protocol`): a number that neither the kernel nor a routing daemon has, so they leave it alone, and so
/// that this service knows its own.
const PROTOCOL: RouteProtocol = RouteProtocol::Other(77);

/// linux/rtnetlink.h and errno: there is no such route.
const ESRCH: i32 = libc::ESRCH;

impl Netlink {
    /// Prepares the TAP of a pod that is routed: a long queue, the gateway's MAC, no addresses, up.
    pub(crate) async fn raise_routed_tap(
        &self,
        name: &str,
        gateway: MacAddress,
        mtu: u32,
    ) -> Result<(), NetlinkError> {
        let link = self.require(name).await?;
        self.make_silent(name, link.index).await?;
        let mut settings = quiet(link.index, mtu);
        // To set what it has already would do harm: the kernel forgets a device's neighbours with each change of its address.
        if link.mac != gateway {
            settings = settings.address(gateway.0.to_vec());
        }
        self.set(name, settings.up().build()).await
    }

    /// The longest packet that the kernel sends out of a device whole.
    pub(crate) async fn set_mtu(
        &self,
        name: &str,
        index: u32,
        mtu: u32,
    ) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(index).mtu(mtu).build();
        self.set(name, message).await
    }

    /// An address is at this MAC, for good: nobody is asked.
    pub(crate) async fn add_neighbour(
        &self,
        name: &str,
        index: u32,
        address: IpAddr,
        mac: MacAddress,
    ) -> Result<(), NetlinkError> {
        let neighbours = self.handle.neighbours();
        let request = neighbours.add(index, address).link_layer_address(&mac.0);
        request
            .replace()
            .execute()
            .await
            .map_err(|source| NetlinkError::new("enter a neighbour on", name, source))
    }

    /// Packets for one address go out of a device.
    pub(crate) async fn add_host(
        &self,
        name: &str,
        index: u32,
        address: IpAddr,
    ) -> Result<(), NetlinkError> {
        self.add_route(name, host(index, address)).await
    }

    /// No longer; a route that is gone already is fine.
    pub(crate) async fn remove_host(
        &self,
        name: &str,
        index: u32,
        address: IpAddr,
    ) -> Result<(), NetlinkError> {
        self.remove_route(name, host(index, address)).await
    }

    /// Packets for a network go to a neighbour on a device.
    pub(crate) async fn add_network(
        &self,
        name: &str,
        index: u32,
        network: PodNetwork,
        gateway: IpAddr,
    ) -> Result<(), NetlinkError> {
        let mut message = route(
            index,
            network.address(),
            network.prefix(),
            RouteScope::Universe,
        );
        // The gateway is in no network of the device's.
        message.header.flags |= RouteFlags::Onlink;
        let gateway = RouteAttribute::Gateway(address_of(gateway));
        message.attributes.push(gateway);
        self.add_route(name, message).await
    }

    /// Removes the routes of a former service out of this device, but those of `networks`.
    pub(crate) async fn keep_networks(
        &self,
        name: &str,
        index: u32,
        networks: &PodNetworks,
    ) -> Result<(), NetlinkError> {
        for family in [
            RouteMessageBuilder::<Ipv4Addr>::new().build(),
            RouteMessageBuilder::<Ipv6Addr>::new().build(),
        ] {
            let ask = || self.handle.route().get(family.clone()).execute();
            let routes = self.dump(ask).await;
            let routes =
                routes.map_err(|source| NetlinkError::new("read the routes of", name, source))?;
            for old in routes {
                let is_kept = destination(&old).is_some_and(|(to, prefix)| {
                    networks
                        .iter()
                        .any(|n| (n.address(), n.prefix()) == (to, prefix))
                });
                if is_ours(&old, index) && !is_kept {
                    self.remove_route(name, old).await?;
                }
            }
        }
        Ok(())
    }

    async fn add_route(&self, name: &str, message: RouteMessage) -> Result<(), NetlinkError> {
        let request = self.handle.route().add(message).replace().execute();
        request
            .await
            .map_err(|source| NetlinkError::new("add a route out of", name, source))
    }

    async fn remove_route(&self, name: &str, message: RouteMessage) -> Result<(), NetlinkError> {
        match self.handle.route().del(message).execute().await {
            Ok(()) => Ok(()),
            Err(error) if is_errno(&error, &[ESRCH, libc::ENODEV, libc::ENOENT]) => Ok(()),
            Err(source) => Err(NetlinkError::new("remove a route out of", name, source)),
        }
    }
}

fn host(index: u32, address: IpAddr) -> RouteMessage {
    let prefix = if address.is_ipv4() { 32 } else { 128 };
    route(index, address, prefix, RouteScope::Link)
}

fn route(index: u32, to: IpAddr, prefix: u8, scope: RouteScope) -> RouteMessage {
    let mut message = match to {
        IpAddr::V4(to) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(to, prefix)
            .scope(scope)
            .build(),
        // IPv6 has no scopes (RTM_NEWROUTE takes them and forgets them).
        IpAddr::V6(to) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(to, prefix)
            .build(),
    };
    message.header.protocol = PROTOCOL;
    message.header.kind = RouteType::Unicast;
    message.attributes.push(RouteAttribute::Oif(index));
    message
}

fn address_of(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(address) => RouteAddress::Inet(address),
        IpAddr::V6(address) => RouteAddress::Inet6(address),
    }
}

fn destination(message: &RouteMessage) -> Option<(IpAddr, u8)> {
    let to = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(to)) => Some(IpAddr::V4(*to)),
            RouteAttribute::Destination(RouteAddress::Inet6(to)) => Some(IpAddr::V6(*to)),
            _ => None,
        })?;
    Some((to, message.header.destination_prefix_length))
}

fn is_ours(message: &RouteMessage, index: u32) -> bool {
    message.header.protocol == PROTOCOL
        && message.header.table == RouteHeader::RT_TABLE_MAIN
        && message.attributes.contains(&RouteAttribute::Oif(index))
}
