//! What pods' TAPs stand on: the node's bridge, or its routes.
//!
//! On a bridge, the forwarding entry for a pod's MAC says that the pod is here. Where pods are routed, a route and a neighbour entry
//! for each of its addresses do. Both come and go at the same moments: [`Ground::own`] and [`Ground::disown`].
//!
//! ```text
//!   here        10.77.0.10/32   dev mt0                                      neighbour 10.77.0.10  -> the pod's MAC
//!   elsewhere   10.77.0.0/24    via 169.254.1.1 dev mvxlan onlink            neighbour 169.254.1.1 -> ee:ee:ee:ee:ee:ee
//! ```
//!
//! All neighbour entries are permanent, those of the guest for its gateway as well, and no TAP has an address: neither ARP nor neighbour discovery
//! stands between a packet and the gate, and the kernel sends nothing of its own into a TAP.

mod sysctls;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use vm_runtime::units::MacAddress;

use super::error::{GroundError, NetlinkError};
use super::netlink::{Link, Netlink};
use super::networks::PodNetworks;
use super::node::PodNetId;
use super::tunnel::{TUNNEL_DEVICE, TunnelConfig, overhead};

pub use sysctls::{Setting, routing as routing_settings};

/// Each pod's gateway where pods are routed. Link-local (RFC 3927): it is on every TAP of every node, and nowhere else.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The same of IPv6 (RFC 4291).
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// The gateway's MAC address.
pub const GATEWAY_MAC: MacAddress = MacAddress(migrator_ebpf::GATEWAY_MAC);

/// The shortest MTU that has IPv6 (RFC 8200): below it the kernel takes IPv6 off a device.
pub(crate) const MTU_MIN: u32 = 1280;

/// What pods' TAPs are put on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ground {
    /// The bridge of this name.
    Bridge(String),
    /// Routes; the networks of all pods of the cluster lead to the other nodes.
    Routed(PodNetworks),
}

impl Ground {
    /// The bridge, if there is one.
    pub fn bridge(&self) -> Option<&str> {
        match self {
            Self::Bridge(bridge) => Some(bridge),
            Self::Routed(_) => None,
        }
    }

    /// Makes the node a router for its pods: settings, and the routes of what is elsewhere. Returns the longest packet of pods, in bytes.
    /// On a bridge there is nothing to do, and the bridge's is the longest.
    pub(crate) async fn prepare(
        &self,
        netlink: &Netlink,
        (uplink, tunnel, config): (&str, Option<u32>, Option<TunnelConfig>),
    ) -> Result<Option<u32>, GroundError> {
        let Self::Routed(pods) = self else {
            return Ok(None);
        };
        let Some(tunnel) = tunnel else {
            return Err(GroundError::NoTunnel);
        };
        let has = netlink.require(uplink).await?.mtu;
        let mtu = longest(uplink, has, config.and_then(|config| config.mtu))?;
        for device in [uplink, TUNNEL_DEVICE] {
            for set in sysctls::set(&sysctls::routing(device, pods.has_ipv6()))? {
                tracing::info!(setting = set.wanted(), "set, for {}", set.purpose());
            }
        }
        // Its MAC stays its own: VXLAN takes a frame from the device's own address for one that went in a circle, and what nodes send each other
        // comes from the gateway's (`vxlan_set_mac` in drivers/net/vxlan).
        netlink.set_mtu(TUNNEL_DEVICE, tunnel, mtu).await?;
        netlink.keep_networks(TUNNEL_DEVICE, tunnel, pods).await?;
        for network in pods.iter() {
            let gateway = match network.is_ipv4() {
                true => IpAddr::V4(GATEWAY_V4),
                false => IpAddr::V6(GATEWAY_V6),
            };
            netlink
                .add_neighbour(TUNNEL_DEVICE, tunnel, gateway, GATEWAY_MAC)
                .await?;
            netlink
                .add_network(TUNNEL_DEVICE, tunnel, network, gateway)
                .await?;
        }
        Ok(Some(mtu))
    }

    /// Prepares a pod's TAP, and sets it up. It has its gate already.
    pub(crate) async fn raise_tap(
        &self,
        netlink: &Netlink,
        tap: &str,
        (mac, mtu): (MacAddress, u32),
    ) -> Result<(), GroundError> {
        match self {
            Self::Bridge(bridge) => {
                let bridge = netlink.require(bridge).await?;
                Ok(netlink.raise_tap(tap, bridge, mac).await?)
            }
            Self::Routed(pods) => {
                // Before it is up: what a guest advertises must not become this node's route.
                sysctls::set(&sysctls::routing(tap, pods.has_ipv6()))?;
                sysctls::set(&sysctls::guarded(tap))?;
                Ok(netlink.raise_routed_tap(tap, GATEWAY_MAC, mtu).await?)
            }
        }
    }

    /// Frames for the pod are sent to its TAP from here on.
    pub(crate) async fn own(
        &self,
        netlink: &Netlink,
        (tap, index): (&str, u32),
        pod: &PodNetId,
    ) -> Result<(), NetlinkError> {
        match self {
            Self::Bridge(_) => netlink.own_address(tap, index, pod.mac).await,
            Self::Routed(_) => {
                for address in pod.addresses() {
                    // The neighbour first: a packet that the route brings finds it.
                    netlink.add_neighbour(tap, index, address, pod.mac).await?;
                    netlink.add_host(tap, index, address).await?;
                }
                Ok(())
            }
        }
    }

    /// No longer. What is sent to the pod from here on leaves the node.
    pub(crate) async fn disown(
        &self,
        netlink: &Netlink,
        (tap, index): (&str, u32),
        pod: &PodNetId,
    ) -> Result<(), NetlinkError> {
        match self {
            Self::Bridge(_) => netlink.disown_address(tap, index, pod.mac).await,
            Self::Routed(_) => {
                // The neighbour entries go with the TAP: a packet that found the route just before still needs them.
                for address in pod.addresses() {
                    netlink.remove_host(tap, index, address).await?;
                }
                Ok(())
            }
        }
    }
}

/// The longest packet of pods that fits through the tunnel, with an uplink that has this MTU: what is told, or else what fits whichever way the
/// other nodes are reached. The tunnel's own bytes are 50 by IPv4, 70 by IPv6.
fn longest(uplink: &str, has: u32, told: Option<u32>) -> Result<u32, GroundError> {
    let (by_v4, by_v6) = (overhead(GATEWAY_V4.into()), overhead(GATEWAY_V6.into()));
    let (mtu, needs) = match told {
        Some(mtu) => (mtu, mtu + by_v4),
        None => (has.saturating_sub(by_v6), has),
    };
    if mtu < MTU_MIN || has < needs {
        let mtu = mtu.max(MTU_MIN);
        return Err(GroundError::TooNarrow {
            mtu,
            needs: mtu + by_v4,
            uplink: uplink.to_owned(),
            has,
        });
    }
    Ok(mtu)
}

impl PodNetId {
    /// Its addresses.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        let v4 = self.v4.map(IpAddr::V4);
        v4.into_iter().chain(self.v6.map(IpAddr::V6))
    }
}

/// The bridge as it is; `None` where pods are routed.
pub(crate) async fn bridge_of(
    ground: &Ground,
    netlink: &Netlink,
) -> Result<Option<Link>, NetlinkError> {
    match ground.bridge() {
        Some(bridge) => netlink.require(bridge).await.map(Some),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_of_pods_fit_the_tunnel() {
        assert_eq!(longest("eth0", 1500, None).unwrap(), 1430);
        assert_eq!(longest("eth0", 1500, Some(1450)).unwrap(), 1450);
        assert_eq!(longest("eth0", 9000, Some(1500)).unwrap(), 1500);
        let text = longest("eth0", 1500, Some(1500)).unwrap_err().to_string();
        for part in ["1500", "1550", "`eth0`", "tunnel.mtu"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        // Less than IPv6 needs.
        assert!(longest("eth0", 1300, None).is_err());
    }
}
