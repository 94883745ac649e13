//! The kernel's tunnel between nodes: late frames of a departed pod go through it without coming to the service.
//!
//! One VXLAN device a node, in collect-metadata mode: the program at the gate says of each frame where it goes, the program on
//! the device says which TAP it goes to at the other end. The device is no port of the bridge, learns nothing and floods
//! nothing.
//!
//! Before a pod's frames go that way, [`probe()`] has sent a question of their full length to the other node's programs and
//! got its answer: so a tunnel that is off over there, a firewall, and a path that is too narrow are found out by no frame of
//! a pod. Without a tunnel the relay goes on.

mod onward;
mod probe;

use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

use migrator_ebpf::{Landing, Tunnel};
use serde::{Deserialize, Serialize};
use vm_runtime::units::MacAddress;

pub(crate) use probe::probe;

use super::error::{GateError, NetlinkError};
use super::gate::{Gates, SlotGate};
use super::netlink::{Netlink, VxlanError};

/// Name of the device: one a network namespace, as there is one service.
pub const TUNNEL_DEVICE: &str = "mvxlan";

/// What a tunnel adds to a packet: outer IPv4 (20) or IPv6 (40), UDP (8), VXLAN (8) and the inner Ethernet header (14); RFC 7348.
pub(crate) fn overhead(remote: IpAddr) -> u32 {
    match remote {
        IpAddr::V4(_) => 20 + 8 + 8 + 14,
        IpAddr::V6(_) => 40 + 8 + 8 + 14,
    }
}

/// The way to a node, for the programs.
pub(crate) fn lead(device: u32, vni: u32, remote: IpAddr) -> Tunnel {
    let mut bytes = [0; 16];
    let family = match remote.to_canonical() {
        IpAddr::V4(address) => {
            bytes[..4].copy_from_slice(&address.octets());
            4
        }
        IpAddr::V6(address) => {
            bytes = address.octets();
            6
        }
    };
    Tunnel {
        device,
        vni,
        family,
        remote: bytes,
    }
}

/// The tunnel that a node is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TunnelConfig {
    /// VXLAN network identifier, 24 bits; the same on every node.
    pub vni: u32,
    /// UDP port; the same on every node.
    pub port: u16,
    /// The longest packet that pods are sent, in bytes, if it is shorter than the bridge takes.
    pub mtu: Option<u32>,
}

/// Why late frames are not sent through a tunnel. They are relayed by the service.
#[derive(Debug, thiserror::Error)]
pub enum NoTunnel {
    /// The configuration has none.
    #[error("`tunnel` is off in this node's configuration")]
    Off,
    /// It could not be set up when the service started.
    #[error("this node has no tunnel: {0}")]
    Broken(String),
    /// A frame of the pod's would not fit whole.
    #[error(
        "the pod's MTU of {mtu} and {overhead} bytes of the tunnel need a path of {}, and the one to {remote} takes {path}: raise the MTU of the way there, or set `tunnel.mtu` if pods are sent nothing that long",
        mtu + overhead
    )]
    TooNarrow {
        /// The pod's.
        mtu: u32,
        /// The tunnel's.
        overhead: u32,
        /// The path's MTU.
        path: u32,
        /// The other node.
        remote: IpAddr,
    },
    /// The other node cannot be reached at all.
    #[error("cannot send to {remote} on UDP")]
    Path {
        /// The other node.
        remote: IpAddr,
        /// Why.
        source: std::io::Error,
    },
    /// Nothing came back.
    #[error(
        "{remote} does not answer on UDP port {port}: its tunnel is off, has another vni or port, a firewall is in between, or the way there takes no packets of {len} bytes"
    )]
    NoAnswer {
        /// The other node.
        remote: IpAddr,
        /// The tunnel's port.
        port: u16,
        /// Length of the outer packet that was sent.
        len: u32,
    },
    /// A link.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The port is gone, or does not forward.
    #[error(transparent)]
    Port(#[from] super::error::PortError),
}

/// A node's tunnel, for `GET /v1/node`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelInfo {
    /// `vxlan` or `off`.
    pub kind: String,
    /// Its device, if it is up.
    pub device: Option<String>,
    /// VXLAN network identifier.
    pub vni: u32,
    /// UDP port.
    pub port: u16,
    /// Frames that its device has lost, on their way out (there was no route) or in (its queue was full), and what the device did not take that
    /// the uplink's program sends by.
    pub dropped: u64,
    /// Why late frames were relayed by the service instead, the last time that they were.
    pub problem: Option<String>,
    /// Why small late frames took the kernel's device, and not the uplink's program straight into the tunnel: from the start on, or the last time that
    /// it was tried. None: they take the program.
    #[serde(default)]
    pub xdp_problem: Option<String>,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Off,
    Broken(TunnelConfig),
    Up { config: TunnelConfig, index: u32 },
}

/// This node's end of the tunnel.
#[derive(Debug)]
pub(crate) struct NodeTunnel {
    state: State,
    problem: Mutex<Option<String>>,
    no_way_on: Mutex<Option<String>>,
}

impl NodeTunnel {
    /// Brings the device up, or takes over the one of a former service; takes it away if there is to be none. What fails costs
    /// the tunnel only. `routed`: the device is also the way to the pods of other nodes.
    pub(crate) async fn open(
        netlink: &Netlink,
        gates: &Gates,
        config: Option<TunnelConfig>,
        routed: bool,
    ) -> Result<Self, NetlinkError> {
        let Some(config) = config else {
            // Whatever forwards through it was told before this call.
            if let Err(error) = gates.detach_landing() {
                tracing::warn!(%error, "the program of the tunnel stays");
            }
            netlink.delete_vxlan(TUNNEL_DEVICE).await?;
            return Ok(Self::new(State::Off, None));
        };
        match Self::raise(netlink, gates, config, routed).await {
            Ok(index) => Ok(Self::new(State::Up { config, index }, None)),
            Err(reason) => {
                tracing::warn!(
                    reason,
                    "no tunnel: late frames of departed pods are relayed by the service"
                );
                Ok(Self::new(State::Broken(config), Some(reason)))
            }
        }
    }

    async fn raise(
        netlink: &Netlink,
        gates: &Gates,
        config: TunnelConfig,
        routed: bool,
    ) -> Result<u32, String> {
        let raised = netlink.raise_vxlan(TUNNEL_DEVICE, config.port).await;
        let (index, is_new) = raised.map_err(|error: VxlanError| chain(&error))?;
        gates
            .attach_landing(TUNNEL_DEVICE, is_new)
            .map_err(|error| chain(&error))?;
        if routed {
            gates
                .attach_steer(TUNNEL_DEVICE, is_new)
                .map_err(|error| chain(&error))?;
        }
        Ok(index)
    }

    fn new(state: State, problem: Option<String>) -> Self {
        Self {
            state,
            problem: Mutex::new(problem),
            no_way_on: Mutex::default(),
        }
    }

    fn config(&self) -> Option<TunnelConfig> {
        match self.state {
            State::Up { config, .. } => Some(config),
            State::Off | State::Broken(_) => None,
        }
    }

    /// What came of trying the shorter way.
    fn note_way_on(&self, problem: Option<String>) {
        *self
            .no_way_on
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = problem;
    }

    /// Interface index of the device that a former service has left and this one will go on with.
    pub(crate) async fn kept(
        netlink: &Netlink,
        config: Option<TunnelConfig>,
    ) -> Result<Option<u32>, NetlinkError> {
        match config {
            Some(config) => netlink.kept_vxlan(TUNNEL_DEVICE, config.port).await,
            None => Ok(None),
        }
    }

    /// Interface index of the device, if there is one.
    pub(crate) fn device(&self) -> Option<u32> {
        match self.state {
            State::Up { index, .. } => Some(index),
            State::Off | State::Broken(_) => None,
        }
    }

    /// Frames for this pod that come out of the tunnel go to its TAP.
    pub(crate) fn land(
        &self,
        gates: &Gates,
        mac: MacAddress,
        slot: u16,
        tap: u32,
    ) -> Result<(), GateError> {
        let State::Up { config, .. } = self.state else {
            return Ok(());
        };
        let landing = Landing {
            tap,
            vni: config.vni,
            slot,
            spare: 0,
        };
        gates.land(mac, landing)
    }

    /// The tunnel and its device.
    pub(crate) fn way(&self) -> Result<(TunnelConfig, u32), NoTunnel> {
        match self.state {
            State::Off => Err(NoTunnel::Off),
            State::Broken(_) => Err(NoTunnel::Broken(self.problem().unwrap_or_default())),
            State::Up { config, index } => Ok((config, index)),
        }
    }

    /// Finds out whether the frames of a pod of this MTU get through the tunnel to another node; what says where they go.
    pub(crate) async fn aim(
        &self,
        gate: &SlotGate,
        mac: MacAddress,
        mtu: u32,
        remote: IpAddr,
    ) -> Result<Tunnel, NoTunnel> {
        let (config, index) = self.way()?;
        let remote = remote.to_canonical();
        let mtu = config.mtu.map_or(mtu, |longest| longest.min(mtu));
        probe(gate, config, (mac, mtu), remote).await?;
        Ok(lead(index, config.vni, remote))
    }

    /// Remembers why the relay is used. Says so in the log, once for each reason.
    pub(crate) fn complain(&self, pod: &str, error: &NoTunnel) {
        // What is turned off, or over already, is no trouble.
        if matches!(error, NoTunnel::Off | NoTunnel::Port(_)) {
            return;
        }
        let reason = chain(error);
        let mut problem = self.problem.lock().unwrap_or_else(PoisonError::into_inner);
        if problem.as_ref() != Some(&reason) {
            tracing::warn!(
                pod,
                reason,
                "late frames are relayed by the service, not sent through the tunnel"
            );
            *problem = Some(reason);
        }
    }

    fn problem(&self) -> Option<String> {
        self.problem
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// For whoever asks about the node.
    pub(crate) async fn info(&self, netlink: &Netlink, gates: &Gates) -> TunnelInfo {
        let (kind, device, config) = match self.state {
            State::Off => (
                "off",
                None,
                TunnelConfig {
                    vni: 0,
                    port: 0,
                    mtu: None,
                },
            ),
            State::Broken(config) => ("vxlan", None, config),
            State::Up { config, .. } => ("vxlan", Some(TUNNEL_DEVICE.to_owned()), config),
        };
        let dropped = match &device {
            Some(name) => netlink
                .require(name)
                .await
                .map_or(0, |link| link.tx_dropped + link.other_drops),
            None => 0,
        };
        let dropped = dropped + gates.lost_on_the_way_on();
        let tried = self
            .no_way_on
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        TunnelInfo {
            kind: kind.to_owned(),
            device,
            vni: config.vni,
            port: config.port,
            dropped,
            problem: self.problem(),
            xdp_problem: gates.fast.no_way_on().or(tried),
        }
    }
}

pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_overhead_is_that_of_rfc_7348() {
        assert_eq!(overhead("10.0.0.1".parse().unwrap()), 50);
        assert_eq!(overhead("fd00::1".parse().unwrap()), 70);
    }

    #[test]
    fn a_path_that_is_too_narrow_is_named_with_what_it_needs() {
        let error = NoTunnel::TooNarrow {
            mtu: 1500,
            overhead: 50,
            path: 1500,
            remote: "10.0.0.1".parse().unwrap(),
        };
        let text = error.to_string();
        assert!(text.contains("a path of 1550"), "{text}");
        assert!(text.contains("takes 1500"), "{text}");
    }
}
