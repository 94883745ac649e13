//! The endpoint table, for people.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use migrator_ebpf::HERE;
use serde::{Deserialize, Serialize};
use vm_runtime::units::MacAddress;

use super::{Endpoints, lock};
use crate::network::error::GateError;

/// A pod of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointFacts {
    /// Its MAC address.
    pub mac: MacAddress,
    /// Its IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
    /// The node where it is.
    pub at: String,
    /// Its epoch there.
    pub epoch: u64,
    /// Of a pod of this node: the nodes that know it here, in this epoch.
    pub known_by: Vec<String>,
}

/// Another node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerFacts {
    /// Its name.
    pub name: String,
    /// Where frames for its pods are sent.
    pub address: Option<IpAddr>,
    /// Whether it takes what this node tells.
    pub up: bool,
    /// Whether this node is told by it.
    pub tells: bool,
    /// Why it is not up, the last time that it was tried.
    pub problem: Option<String>,
}

/// A counter of the programs of the tunnel's device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SteeredFacts {
    /// Its name.
    pub name: String,
    /// Frames.
    pub frames: u64,
}

/// What a node of a routed cluster knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterFacts {
    /// The other nodes.
    pub peers: Vec<PeerFacts>,
    /// The pods, by MAC address.
    pub endpoints: Vec<EndpointFacts>,
    /// What became of frames that the kernel has routed to other nodes' pods, since the node began.
    pub steered: Vec<SteeredFacts>,
}

impl Endpoints {
    /// Everything about it at this moment.
    ///
    /// # Errors
    /// The counters cannot be read.
    pub(crate) fn facts(&self) -> Result<ClusterFacts, GateError> {
        let steered = self.gates.steered()?;
        let state = lock(&self.state);
        let name_of = |node: u16| match node {
            HERE => self.name.clone(),
            _ => {
                let mut numbers = self.numbers.iter();
                let name = numbers.find_map(|(name, number)| (*number == node).then_some(name));
                name.cloned().unwrap_or_else(|| format!("node {node}"))
            }
        };
        let endpoint = |pod: &super::Pod| EndpointFacts {
            mac: pod.claim.mac,
            ipv4: pod.claim.v4,
            ipv6: pod.claim.v6,
            at: name_of(pod.node),
            epoch: pod.claim.epoch.0,
            known_by: state
                .peers
                .iter()
                .filter(|(_, peer)| {
                    pod.node == HERE && peer.acked.get(&pod.claim.mac) == Some(&pod.claim.epoch)
                })
                .map(|(name, _)| name.clone())
                .collect(),
        };
        Ok(ClusterFacts {
            peers: state
                .peers
                .iter()
                .map(|(name, peer)| PeerFacts {
                    name: name.clone(),
                    address: peer.address,
                    up: peer.listens,
                    tells: peer.tells > 0,
                    problem: peer.problem.clone(),
                })
                .collect(),
            endpoints: state.table.pods().map(endpoint).collect(),
            steered: steered
                .into_iter()
                .map(|(counter, frames)| SteeredFacts {
                    name: counter.name().to_owned(),
                    frames,
                })
                .collect(),
        })
    }
}
