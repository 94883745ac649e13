//! The network of one node: what its pods stand on, its uplink, the programs, and the slots.

mod attach;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use migrator_ebpf::{Gate, Mode};
use vm_runtime::units::MacAddress;

use super::allowance::{Allowance, ParkLimits};
use super::conntrack;
use super::endpoints::Endpoints;
use super::error::{AttachError, GateError, NetlinkError, OpenError};
use super::gate::{Gates, keep_settled};
use super::ground::{Ground, MTU_MIN, bridge_of};
use super::landing::Landing;
use super::netlink::Netlink;
use super::port::Ports;
use super::spool::Spool;
use super::tunnel::{NodeTunnel, TunnelConfig, TunnelInfo};
use super::uplink::{self, UplinkPath, XdpChoice};

/// Where a node's network is.
#[derive(Clone, Debug)]
pub struct NodeNetConfig {
    /// What pods' TAPs are put on.
    pub ground: Ground,
    /// The device towards the other nodes: the bridge's port that announcements leave by, or where routed packets come and go.
    pub uplink: String,
    /// Whether frames may go from the uplink straight to a pod.
    pub xdp: XdpChoice,
    /// Folder of the node's own BPF file system; mounted if it is none yet.
    pub bpffs: PathBuf,
    /// Folder for the packets of pods that are being moved, made when needed: they outlive a service that is killed.
    pub spool_dir: PathBuf,
    /// The tunnel that late frames of a departed pod go through; without one the service relays them. Where pods are routed, there must be
    /// one: it leads to the pods of the other nodes.
    pub tunnel: Option<TunnelConfig>,
    /// What is kept of those packets at most.
    pub park: ParkLimits,
    /// How long this node goes on translating a flow of a pod that has left, at most.
    pub bound_limit: Duration,
    /// The other nodes, where pods are routed.
    pub cluster: Option<Cluster>,
}

/// The nodes of a routed cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// This node's name.
    pub name: String,
    /// The others, by name: where their tunnels are.
    pub peers: BTreeMap<String, IpAddr>,
}

/// The pod's side of its one interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodNetId {
    /// The pod's name, for messages.
    pub name: String,
    /// Its MAC address.
    pub mac: MacAddress,
    /// Its IPv4 address.
    pub v4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub v6: Option<Ipv6Addr>,
}

/// How a pod comes to this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// It runs here: the gate starts open.
    Local,
    /// It is on its way here: the gate starts shut.
    Incoming,
}

/// The devices of a pod whose VMM lives on while the service was away.
#[derive(Debug)]
pub struct ExistingDevices {
    /// A descriptor of its TAP.
    pub tap: OwnedFd,
    /// A descriptor of its park.
    pub park: OwnedFd,
}

impl ExistingDevices {
    /// More descriptors of the same devices.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        Ok(Self {
            tap: self.tap.try_clone()?,
            park: self.park.try_clone()?,
        })
    }
}

/// The devices of a new pod in its slot, which nothing reaches yet.
#[derive(Debug)]
pub struct NewDevices {
    slot: u16,
    devices: ExistingDevices,
}

impl NewDevices {
    /// Descriptors of them, for the VMM.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn share(&self) -> std::io::Result<ExistingDevices> {
        self.devices.try_clone()
    }
}

#[derive(Debug)]
pub(crate) struct NodeInner {
    pub(crate) config: NodeNetConfig,
    pub(crate) netlink: Netlink,
    pub(crate) gates: Arc<Gates>,
    pub(crate) tunnel: NodeTunnel,
    pub(crate) ports: Arc<Ports>,
    pub(crate) allowance: Arc<Allowance>,
    /// Which pod is where, in a routed cluster.
    pub(crate) endpoints: Option<Arc<Endpoints>>,
    uplink: UplinkPath,
    /// The longest packet of pods, where they are routed. On a bridge it is the bridge's.
    routed_mtu: Option<u32>,
}

impl NodeInner {
    /// The longest packet that a pod sends or gets, in bytes.
    async fn mtu(&self) -> Result<u32, NetlinkError> {
        match (self.routed_mtu, self.config.ground.bridge()) {
            (None, Some(bridge)) => Ok(self.netlink.require(bridge).await?.mtu),
            (mtu, _) => Ok(mtu.unwrap_or(MTU_MIN)),
        }
    }

    /// Frames for the pod are sent to its TAP from here on. Again is fine.
    pub(crate) async fn own(
        &self,
        tap: &str,
        index: u32,
        pod: &PodNetId,
    ) -> Result<(), NetlinkError> {
        let ground = &self.config.ground;
        ground.own(&self.netlink, (tap, index), pod).await
    }

    /// No longer. Again is fine.
    pub(crate) async fn disown(
        &self,
        tap: &str,
        index: u32,
        pod: &PodNetId,
    ) -> Result<(), NetlinkError> {
        let ground = &self.config.ground;
        ground.disown(&self.netlink, (tap, index), pod).await
    }

    /// What is kept of the packets of the pod in a slot.
    pub(crate) fn spool(&self, slot: u16) -> Spool {
        Spool::new(&self.config.spool_dir, slot)
    }

    /// Where packets of the pod in a slot land.
    pub(crate) fn landing(&self, slot: u16) -> Landing {
        Landing::new(&self.config.spool_dir, slot)
    }

    /// Nothing is kept of the packets of the pod in a slot any more.
    pub(crate) fn forget_packets(&self, slot: u16) {
        self.spool(slot).remove();
        self.landing(slot).remove();
    }
}

/// The network of this node. Cheap to clone. Every call belongs into the network namespace that
/// [`open`](Self::open) was called in, and into a tokio runtime.
#[derive(Clone, Debug)]
pub struct NodeNetwork {
    inner: Arc<NodeInner>,
}

/// Name of the TAP of a slot.
pub fn tap_name(slot: u16) -> String {
    format!("mt{slot}")
}

/// Name of the park of a slot.
pub fn park_name(slot: u16) -> String {
    format!("mp{slot}")
}

impl NodeNetwork {
    /// Loads the programs, over what a former service has pinned, and clears what it pinned for pods
    /// whose devices are gone.
    ///
    /// # Errors
    /// The bridge or the uplink is missing, the kernel does not take the programs, or the node cannot be a router where it is to be one.
    pub async fn open(config: NodeNetConfig) -> Result<Self, OpenError> {
        let netlink = Netlink::open().map_err(OpenError::Socket)?;
        let bridge = bridge_of(&config.ground, &netlink).await?;
        let uplink = netlink.require(&config.uplink).await?;
        let gates = Arc::new(Gates::open(&config.bpffs, uplink.rx_queues)?);
        let path = gates.start_fast_way(config.xdp, &config.uplink, uplink, bridge);
        if path == UplinkPath::Xdp {
            tokio::spawn(uplink::keep(Arc::downgrade(&gates)));
        }
        tokio::spawn(keep_settled(Arc::downgrade(&gates)));
        for slot in gates.pinned_slots() {
            if netlink.link(&tap_name(slot)).await?.is_none() {
                gates.detach(slot, None)?;
                Spool::new(&config.spool_dir, slot).remove();
                Landing::new(&config.spool_dir, slot).remove();
            }
        }
        // Before a device goes away, and once more if the one that was kept does not work.
        leave_lost_tunnels(&gates, NodeTunnel::kept(&netlink, config.tunnel).await?)?;
        let routed = config.cluster.is_some();
        let tunnel = NodeTunnel::open(&netlink, &gates, config.tunnel, routed).await?;
        leave_lost_tunnels(&gates, tunnel.device())?;
        let way = tunnel.way().ok();
        gates.set_own_vni(way.map_or(0, |(config, _)| config.vni));
        gates.keep_leads(way.map(|(_, device)| device));
        let endpoints = endpoints(&gates, &tunnel, &config)?;
        let ways = (config.uplink.as_str(), tunnel.device(), config.tunnel);
        let routed_mtu = config.ground.prepare(&netlink, ways).await?;
        let inner = NodeInner {
            allowance: Allowance::new(config.park),
            config,
            netlink,
            gates,
            tunnel,
            endpoints,
            ports: Arc::default(),
            uplink: path,
            routed_mtu,
        };
        let inner = Arc::new(inner);
        tokio::spawn(conntrack::keep(Arc::downgrade(&inner)));
        Ok(Self { inner })
    }

    /// The tunnel, and why it was not used.
    pub async fn tunnel_info(&self) -> TunnelInfo {
        let inner = &self.inner;
        inner.tunnel.info(&inner.netlink, &inner.gates).await
    }

    /// Which pod is at which node, in a routed cluster.
    pub fn endpoints(&self) -> Option<&Arc<Endpoints>> {
        self.inner.endpoints.as_ref()
    }

    pub(crate) fn inner(&self) -> &NodeInner {
        &self.inner
    }

    /// The way that frames take from the uplink to a pod.
    pub fn uplink(&self) -> &UplinkPath {
        &self.inner.uplink
    }

    /// The longest packet of pods in bytes, where they are routed. On a bridge it is the bridge's.
    pub fn routed_mtu(&self) -> Option<u32> {
        self.inner.routed_mtu
    }

    /// Slots that hold pinned state of a pod whose TAP exists.
    pub fn slots(&self) -> Vec<u16> {
        self.inner.gates.pinned_slots()
    }

    /// Removes what a slot has pinned, and its devices. For a pod that is not attached.
    ///
    /// # Errors
    /// A pin or a device could not be removed.
    pub async fn forget(&self, slot: u16) -> Result<(), AttachError> {
        self.inner.gates.detach(slot, None)?;
        self.inner.forget_packets(slot);
        self.inner.netlink.delete(&tap_name(slot)).await?;
        self.inner.netlink.delete(&park_name(slot)).await?;
        Ok(())
    }
}

/// The endpoint table, where pods are routed.
fn endpoints(
    gates: &Arc<Gates>,
    tunnel: &NodeTunnel,
    config: &NodeNetConfig,
) -> Result<Option<Arc<Endpoints>>, GateError> {
    let (Some(cluster), Ground::Routed(pods), Some(device), Some(tunnel)) = (
        &config.cluster,
        &config.ground,
        tunnel.device(),
        config.tunnel,
    ) else {
        gates.leave_cluster()?;
        return Ok(None);
    };
    let way = (device, tunnel.vni);
    let endpoints = Endpoints::open(gates, cluster, pods, way)?;
    Ok(Some(Arc::new(endpoints)))
}

/// A former service's slots may lead into a device that is no more: their frames are relayed again.
fn leave_lost_tunnels(gates: &Arc<Gates>, device: Option<u32>) -> Result<(), GateError> {
    for slot in gates.pinned_slots() {
        let gate = gates.slot(slot);
        let word = gate.get();
        if word.mode == Mode::Tunnel && device != Some(gate.tunnel_device()?) {
            gate.set(Gate {
                mode: Mode::Forward,
                epoch: word.epoch.wrapping_add(1),
                ..word
            });
        }
    }
    Ok(())
}
