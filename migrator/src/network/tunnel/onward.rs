//! The shorter way into the tunnel: the uplink's program puts the headers around a late frame itself.
//!
//! The kernel's own answer to where such a packet goes (`bpf_fib_lookup`) is given on routers only (`IN_DEV_FORWARD` in net/core/filter.c), and a node whose
//! pods are on a bridge need not be one. So the service looks the way up, has a question take it and waits for the answer, and
//! looks again while it is in use.

use std::net::IpAddr;
use std::time::Duration;

use migrator_ebpf::{Ends, Outer, Probe};
use tokio::time::Instant;
use vm_runtime::units::MacAddress;

use super::{NodeTunnel, TunnelConfig, overhead, probe};
use crate::network::error::GateError;
use crate::network::gate::SlotGate;
use crate::network::netlink::{Hop, Netlink, NoHop};
use crate::network::uplink::FastWay;

/// How long an answer is waited for: the kernel's tunnel has just got one.
const ANSWER_LIMIT: Duration = Duration::from_millis(200);
/// Ethernet's header.
const ETHERNET: u32 = 14;

/// Why the uplink's program does not send a departed pod's frames on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoWayOn {
    #[error("{0}")]
    Closed(String),
    #[error(transparent)]
    Hop(#[from] NoHop),
    #[error(
        "the driver of {0} takes no frames that XDP redirects to it; a veth does if its other end runs an XDP program, or has generic receive offload on (`ethtool -K DEVICE gro on`)"
    )]
    Driver(String),
    #[error("{name} takes packets of {mtu} bytes, and {needed} are needed")]
    TooNarrow { name: String, mtu: u32, needed: u32 },
    #[error("the addresses of the way to {0} are of two families")]
    Families(IpAddr),
    #[error("the kernel does not send a frame of {len} bytes by XDP")]
    Refused { len: usize, source: std::io::Error },
    #[error("{remote} does not answer to what XDP sends out of {name}")]
    NoAnswer { remote: IpAddr, name: String },
    #[error(transparent)]
    Gate(#[from] GateError),
}

impl NodeTunnel {
    /// Readies the shorter way for a slot whose kernel's tunnel was found to work. Without it the slot takes the kernel's.
    ///
    /// # Errors
    /// What was readied in vain cannot be taken back.
    pub(crate) async fn aim_on(
        &self,
        netlink: &Netlink,
        gate: &SlotGate,
        (mac, mtu): (MacAddress, u32),
        remote: IpAddr,
    ) -> Result<(), GateError> {
        let result = self.try_aim_on(netlink, gate, (mac, mtu), remote).await;
        let reason = result.err().map(|error| super::chain(&error));
        if let Some(reason) = &reason {
            tracing::info!(
                reason,
                "late frames take the kernel's tunnel, not XDP's shorter way into it"
            );
            gate.fast().forget_outer(gate.slot())?;
        }
        self.note_way_on(reason);
        Ok(())
    }

    async fn try_aim_on(
        &self,
        netlink: &Netlink,
        gate: &SlotGate,
        (mac, mtu): (MacAddress, u32),
        remote: IpAddr,
    ) -> Result<(), NoWayOn> {
        let Some(config) = self.config() else {
            return Ok(());
        };
        if let Some(why) = gate.fast().no_way_on() {
            return Err(NoWayOn::Closed(why));
        }
        let remote = remote.to_canonical();
        let longest = config.mtu.map_or(mtu, |longest| longest.min(mtu));
        let hop = netlink.hop(remote).await?;
        if !FastWay::takes_redirected(hop.device) {
            return Err(NoWayOn::Driver(hop.name));
        }
        let outer = headers(config, &hop, mtu, remote)?;
        if outer.frame_max < longest + ETHERNET {
            return Err(NoWayOn::TooNarrow {
                needed: longest + overhead(remote),
                name: hop.name,
                mtu: hop.mtu,
            });
        }
        gate.fast().set_outer(gate.slot(), outer)?;
        let question = Probe {
            slot: gate.slot(),
            number: probe::number(),
        };
        let mut frame = question.ask(mac.0).to_vec();
        let len = (longest + ETHERNET) as usize;
        frame.resize(len.max(frame.len()), 0);
        let until = Instant::now() + ANSWER_LIMIT;
        while Instant::now() < until {
            gate.ask_by_uplink(&frame)
                .map_err(|source| NoWayOn::Refused { len, source })?;
            if probe::is_answered(gate, question.number).await {
                return Ok(());
            }
        }
        Err(NoWayOn::NoAnswer {
            remote,
            name: hop.name,
        })
    }

    /// The way to the node may have changed: other headers, if so. What the kernel does not know now stays as it was. False: the slot takes the
    /// kernel's tunnel.
    pub(crate) async fn look_again(
        &self,
        netlink: &Netlink,
        gate: &SlotGate,
        mtu: u32,
        remote: IpAddr,
    ) -> bool {
        let (Some(config), true) = (self.config(), gate.fast().has_outer(gate.slot())) else {
            return false;
        };
        let remote = remote.to_canonical();
        let Ok(hop) = netlink.hop(remote).await else {
            return true;
        };
        if !FastWay::takes_redirected(hop.device) {
            return true;
        }
        let changed = headers(config, &hop, mtu, remote)
            .and_then(|outer| Ok(gate.fast().change_outer(gate.slot(), outer)?));
        match changed {
            Ok(true) => tracing::info!(device = hop.name, %remote, "late frames take another way"),
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, %remote, "the way of late frames is not renewed"),
        }
        true
    }
}

fn headers(config: TunnelConfig, hop: &Hop, mtu: u32, remote: IpAddr) -> Result<Outer, NoWayOn> {
    let ends = match (hop.source, remote) {
        (IpAddr::V4(from), IpAddr::V4(to)) => Ends::V4(from.octets(), to.octets()),
        (IpAddr::V6(from), IpAddr::V6(to)) => Ends::V6(from.octets(), to.octets()),
        _ => return Err(NoWayOn::Families(remote)),
    };
    let room = hop.mtu.saturating_sub(overhead(remote));
    Ok(Outer::new(
        hop.device,
        room.min(mtu) + ETHERNET,
        [hop.to.0, hop.from.0],
        ends,
        (config.vni, config.port),
    ))
}
