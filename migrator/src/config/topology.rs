//! The key `topology`: `bridge`, or a section.

use std::net::{IpAddr, SocketAddr};

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::{Config, Tunnel};
use crate::network::{PodNetwork, PodNetworks};

/// How pods are on the nodes' network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Topology {
    /// On the node's layer 2: ports of its bridge.
    #[default]
    Bridge,
    /// Each one a route: /32 and /128, the same on whichever node it runs.
    Routed {
        /// The networks of all pods of the cluster, the same on every node.
        pods: PodNetworks,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Routed,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Section {
    kind: Kind,
    pods: Vec<PodNetwork>,
}

impl<'de> Deserialize<'de> for Topology {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct BridgeOrSection;
        impl<'de> Visitor<'de> for BridgeOrSection {
            type Value = Topology;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(
                    "`bridge`, or a section like { kind: routed, pods: [10.77.0.0/24, \"fd77::/64\"] }",
                )
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Topology, E> {
                match text {
                    "bridge" => Ok(Topology::Bridge),
                    _ => Err(E::invalid_value(serde::de::Unexpected::Str(text), &self)),
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Topology, A::Error> {
                let section = Section::deserialize(MapAccessDeserializer::new(map))?;
                let Kind::Routed = section.kind;
                let pods = PodNetworks::try_from(section.pods)
                    .map_err(|error| A::Error::custom(format!("`pods` {error}")))?;
                Ok(Topology::Routed { pods })
            }
        }
        deserializer.deserialize_any(BridgeOrSection)
    }
}

/// The keys that depend on the topology.
pub(super) fn check(config: &Config) -> Result<(), (&'static str, String)> {
    match &config.topology {
        Topology::Bridge => match &config.bridge {
            None => Err((
                "bridge",
                "is missing: name the bridge that pods are to be ports of, or set `topology`"
                    .to_owned(),
            )),
            Some(bridge) if *bridge == config.uplink => Err((
                "uplink",
                "must be a port of the bridge, not the bridge itself".to_owned(),
            )),
            Some(_) => Ok(()),
        },
        Topology::Routed { pods } => {
            if let Some(bridge) = &config.bridge {
                let problem = format!(
                    "is `{bridge}`, and in the routed topology pods are ports of none: remove this key"
                );
                return Err(("bridge", problem));
            }
            if config.tunnel == Tunnel::Off {
                let problem = "is off, and in the routed topology nodes send pods' packets to each other through it: set it, such as { kind: vxlan, vni: 7077 }, the same on every node";
                return Err(("tunnel", problem.to_owned()));
            }
            underlay(config, pods)
        }
    }
}

/// What nodes send each other must not go the way of what they send pods: into the tunnel.
fn underlay(config: &Config, pods: &PodNetworks) -> Result<(), (&'static str, String)> {
    let within = |address: SocketAddr| {
        let address: IpAddr = address.ip().to_canonical();
        pods.of(address).map(|network| (address, network))
    };
    let own = [Some(config.listen), config.advertise]
        .into_iter()
        .flatten()
        .find_map(within);
    if let Some((address, network)) = own {
        let problem = format!(
            "names {network}, and this node's own address {address} is in it: nodes need addresses beside the pods'"
        );
        return Err(("topology.pods", problem));
    }
    for (peer, address) in &config.peers {
        if let Some((address, network)) = within(*address) {
            let problem = format!(
                "names {network}, and node {peer} is at {address} in it: nodes need addresses beside the pods'"
            );
            return Err(("topology.pods", problem));
        }
    }
    Ok(())
}
