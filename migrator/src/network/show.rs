//! What there is of the network, for people: one pod's port, and the node's own part.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use migrator_ebpf::{ABI, Counter, MAX_SLOTS};
use serde::{Deserialize, Serialize};
use vm_runtime::units::MacAddress;

use super::dataplane::{Backlog, Command};
use super::endpoints::ClusterFacts;
use super::error::{NetlinkError, PortError};
use super::gate::{HookFacts, MapFacts, ProgramFacts};
use super::ground::{Ground, bridge_of};
use super::ledger::{Ledger, book};
use super::netlink::Link;
use super::networks::PodNetworks;
use super::node::NodeNetwork;
use super::port::Port;

/// A link of this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkFacts {
    /// Its name.
    pub name: String,
    /// Its interface index.
    pub index: u32,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it is up.
    pub up: bool,
}

/// A queue between the kernel and a reader.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueFacts {
    /// The device.
    #[serde(flatten)]
    pub link: LinkFacts,
    /// Frames that it takes; those that come to a full one are lost.
    pub length: u32,
    /// Whether it has any now.
    pub waits: bool,
    /// Frames that found it full, since the device was made. Of the TAP's, the service has tried some again: the books know.
    pub dropped: u64,
}

/// One counter of the programs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CounterFacts {
    /// Its name.
    pub name: String,
    /// Frames, since the pod is on this node.
    pub frames: u64,
    /// What it counts.
    pub meaning: String,
}

/// The gate's word.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GateFacts {
    /// `shut`, `local`, `hold` or `forward`.
    pub mode: String,
    /// Whether the guest may send.
    pub may_send: bool,
    /// Grows with each flip.
    pub epoch: u32,
    /// The slot that the word names.
    pub slot: u16,
    /// When it was last flipped, in milliseconds of Unix time; absent: not since this service began.
    pub flipped_unix_ms: Option<u64>,
}

/// What waits, in frames and bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitFacts {
    /// In the service.
    #[serde(flatten)]
    pub backlog: Backlog,
    /// Frames in the park's queue.
    pub park_frames: u64,
    /// Frames that flows wait for before they go straight to the TAP again.
    pub flow_frames: u64,
}

/// One pod on this node's network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortFacts {
    /// The pod.
    pub pod: String,
    /// Its slot, which names its links.
    pub slot: u16,
    /// Its MAC address.
    pub mac: MacAddress,
    /// Its IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
    /// Where it stands: `local`, `holding`, `rolling back`, `forwarding`, `incoming`, `opened`, `settling`.
    pub stage: String,
    /// Its gate.
    pub gate: GateFacts,
    /// Whether somebody watches its frames.
    pub traced: bool,
    /// What the programs have counted.
    pub counters: Vec<CounterFacts>,
    /// The books since the last migration began, or since the pod is here.
    pub ledger: Ledger,
    /// Whether each frame is booked once.
    pub balances: bool,
    /// Where the programs see its frames.
    pub hooks: Vec<HookFacts>,
    /// What the guest reads.
    pub tap: QueueFacts,
    /// What the service reads while the guest cannot.
    pub park: QueueFacts,
    /// What waits.
    pub waits: WaitFacts,
    /// Its entries of connection tracking on this node; absent if the kernel does not tell, and where all pods are told of at once.
    #[serde(default)]
    pub conntrack: Option<ConntrackFacts>,
}

/// A pod's entries of connection tracking.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConntrackFacts {
    /// All of them.
    pub entries: u64,
    /// Those whose translation needs this node.
    pub bound: u64,
    /// Flows that are translated at a node that the pod has left, and led there. They have no entry here.
    #[serde(default)]
    pub elsewhere: u64,
}

/// The node's own part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFacts {
    /// The bridge that pods are ports of; none where they are routed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bridge: Option<LinkFacts>,
    /// The networks of all pods of the cluster, where pods are routed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub routed: Option<PodNetworks>,
    /// The device towards the other nodes.
    pub uplink: LinkFacts,
    /// Version of the pinned maps' layout.
    pub abi: u32,
    /// Where they are pinned.
    pub pins: std::path::PathBuf,
    /// The programs.
    pub programs: Vec<ProgramFacts>,
    /// The pinned maps.
    pub maps: Vec<MapFacts>,
    /// Pods that the maps have room for.
    pub slots: u32,
    /// Flows of pods that have left which this node goes on translating, by the pod's address; without those that have none.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub bound_flows: BTreeMap<IpAddr, u64>,
    /// The other nodes and the pods of all, where pods are routed.
    #[serde(default)]
    pub cluster: Option<ClusterFacts>,
}

fn link(name: &str, link: Link) -> LinkFacts {
    LinkFacts {
        name: name.to_owned(),
        index: link.index,
        mtu: link.mtu,
        up: link.up,
    }
}

impl Port {
    /// Everything about it at this moment; under traffic the parts are read one after the other.
    ///
    /// # Errors
    /// The port is gone.
    pub async fn facts(&self) -> Result<PortFacts, PortError> {
        let (tally, backlog) = self.ask(Command::Backlog).await?;
        let inner = &self.inner;
        let netlink = &inner.node.netlink;
        let park = netlink.require(&inner.park_name).await?;
        let tap = netlink.require(&inner.tap_name).await?;
        let row = inner.gate.counters()?;
        let ledger = book(&row, &tally, park.tx_dropped, tap.tx_dropped);
        let queue = |name: &str, device: Link, waits| QueueFacts {
            link: link(name, device),
            length: device.queue,
            waits,
            dropped: device.tx_dropped,
        };
        let word = inner.gate.get();
        let waits = WaitFacts {
            backlog,
            park_frames: ledger.held.saturating_sub(tally.held),
            flow_frames: inner.gate.waiting(),
        };
        let ledger = self.since_base(ledger);
        Ok(PortFacts {
            pod: inner.pod.name.clone(),
            slot: self.slot(),
            mac: inner.pod.mac,
            ipv4: inner.pod.v4,
            ipv6: inner.pod.v6,
            stage: self.stage().to_string(),
            gate: GateFacts {
                mode: word.mode.name().to_owned(),
                may_send: word.may_send,
                epoch: word.epoch,
                slot: word.slot,
                flipped_unix_ms: inner.gate.flipped_unix_ms(),
            },
            traced: inner.gate.is_watched(),
            counters: Counter::ALL
                .into_iter()
                .map(|counter| CounterFacts {
                    name: counter.name().to_owned(),
                    frames: row.get(counter),
                    meaning: counter.meaning().to_owned(),
                })
                .collect(),
            ledger,
            balances: ledger.balances(),
            hooks: inner.gate.hooks(&inner.tap_name),
            tap: queue(&inner.tap_name, tap, backlog.tap_waits),
            park: queue(&inner.park_name, park, backlog.park_waits),
            waits,
            conntrack: None,
        })
    }

    /// The pod's entries of connection tracking. The kernel looks through its whole table for them, so this is not a part of
    /// [`facts`](Self::facts).
    pub async fn conntrack_facts(&self) -> Option<ConntrackFacts> {
        // It is for people: a kernel that does not tell is no error.
        let flows = self.flows().await.ok()?;
        Some(ConntrackFacts {
            entries: (flows.free.len() + flows.bound.len()) as u64,
            bound: flows.bound.len() as u64,
            elsewhere: self.flows_elsewhere().len() as u64,
        })
    }
}

impl NodeNetwork {
    /// The node's own part at this moment.
    ///
    /// # Errors
    /// The bridge or the uplink is gone.
    pub async fn facts(&self) -> Result<NodeFacts, NetlinkError> {
        let inner = self.inner();
        let config = &inner.config;
        let bridge = bridge_of(&config.ground, &inner.netlink).await?;
        let uplink = inner.netlink.require(&config.uplink).await?;
        let (bridge, routed) = match (&config.ground, bridge) {
            (Ground::Bridge(name), Some(found)) => (Some(link(name, found)), None),
            (Ground::Routed(pods), _) => (None, Some(pods.clone())),
            (Ground::Bridge(_), None) => (None, None),
        };
        Ok(NodeFacts {
            bridge,
            routed,
            uplink: link(&config.uplink, uplink),
            abi: ABI,
            pins: inner.gates.dir().to_owned(),
            programs: inner.gates.program_facts(),
            maps: inner.gates.map_facts(),
            slots: MAX_SLOTS,
            bound_flows: self.homes(),
            cluster: match inner.endpoints.as_ref().map(|endpoints| endpoints.facts()) {
                Some(Ok(facts)) => Some(facts),
                Some(Err(error)) => {
                    tracing::warn!(%error, "the endpoint table cannot be shown");
                    None
                }
                None => None,
            },
        })
    }
}
