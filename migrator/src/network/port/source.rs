//! What a port does where the pod leaves.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migrator_ebpf::Mode;
use tokio::sync::mpsc::UnboundedSender;

use super::{NodeInner, Port, lock};
use crate::network::dataplane::Command;
use crate::network::error::PortError;
use crate::network::grace;
use crate::network::ledger::Ledger;
use crate::network::log::LogItem;
use crate::network::tunnel::NoTunnel;

impl Port {
    /// Parks every frame for the pod from now on, and streams what is parked to `sink`, numbered. When
    /// this returns, no frame is on its way into the TAP any more. The log is kept until it is
    /// acknowledged, and at least until [`forward`](Self::forward).
    ///
    /// On a port that a former service left holding: attaches the sink, and sends it what is kept.
    ///
    /// Dropped before it returns, it holds all the same, now or soon: see [`stage_by_now`](Self::stage_by_now).
    ///
    /// # Errors
    /// The pod does not live here, or the kernel has no grace period: then the gate holds all the
    /// same, and [`rollback`](Self::rollback) opens it.
    pub async fn hold(&self, sink: UnboundedSender<LogItem>) -> Result<(), PortError> {
        self.inner.quiet();
        self.leave_when_announced();
        self.ask(|reply| Command::Hold(sink, reply)).await??;
        match tokio::task::spawn_blocking(grace::grace_period).await {
            Ok(result) => result.map_err(PortError::GracePeriod),
            Err(_) => Err(self.gone()),
        }
    }

    /// Once another node has announced the pod, and the network sends nothing here any more by what it knew before, what this
    /// node's own bridge has for the pod takes the new way as well: out of the uplink. The end of the log then comes behind all of it.
    ///
    /// The bridge's entry for the pod stays: a late frame that comes in by the uplink, from whoever has not learned, must
    /// reach the gate, and a bridge does not send a frame back out of the port that it came from.
    fn leave_when_announced(&self) {
        let inner = &self.inner;
        if inner.node.config.ground.bridge().is_none() {
            return;
        }
        let (node, commands) = (Arc::clone(&inner.node), inner.commands.clone());
        let (wake, echoed) = (Arc::clone(&inner.wake), Arc::clone(&inner.echoed));
        let tap = inner.tap_index;
        // One of an earlier hold, if nobody waited for it any more, says nothing of this one.
        std::pin::pin!(echoed.notified()).as_mut().enable();
        let task = tokio::spawn(async move {
            echoed.notified().await;
            if let Err(reason) = send_out(&node, tap).await {
                // They are forwarded until the release.
                tracing::warn!(
                    reason,
                    "this node's own pods go on sending by way of one that has gone"
                );
            }
            wait_for_frames().await;
            // As `Inner::tell`; a thread that has ended needs no telling.
            let _ = commands.send(Command::End);
            let _ = wake.write(1);
        });
        *lock(&inner.leaver) = Some(task.abort_handle());
    }

    /// Sends everything that is not acknowledged to another sink: the connection was made anew.
    ///
    /// # Errors
    /// The port neither holds nor forwards.
    pub async fn resend(&self, sink: UnboundedSender<LogItem>) -> Result<(), PortError> {
        self.ask(|reply| Command::Resend(sink, reply)).await?
    }

    /// Waits until the guest has drained its TAP, so that little is left as residue. False: it has not
    /// within `limit`.
    pub async fn drain_tap(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        self.ask(|reply| Command::DrainTap(until, reply))
            .await
            .unwrap_or(false)
    }

    /// After the VM has stopped: reads what is left in its TAP into the log, before everything that
    /// was parked, and closes that part with [`LogKind::ResidueEnd`](crate::network::LogKind::ResidueEnd). From
    /// here on nothing leaves the guest on this node. Returns the number of frames.
    ///
    /// # Errors
    /// The port does not hold, or the TAP cannot be read.
    pub async fn residue(&self) -> Result<u64, PortError> {
        self.ask(Command::Residue).await?
    }

    /// The destination has injected everything up to `seq`.
    pub fn ack(&self, seq: u64) {
        self.inner.tell(Command::Ack(seq));
    }

    /// Gives the migration up: residue and log go back into the pod's own TAP, in order and before
    /// anything newer, then the gate opens. Returns as soon as the guest may send again; the rest
    /// happens by itself as the guest reads (wait for it with [`reached`](Self::reached) `Local`).
    ///
    /// # Errors
    /// The port does not hold.
    pub async fn rollback(&self) -> Result<(), PortError> {
        if let Some(leaver) = lock(&self.inner.leaver).take() {
            leaver.abort();
        }
        // Nobody else runs the pod, whatever was announced.
        if let Err(error) = self.inner.node.gates.send_out(self.inner.tap_index, 0) {
            tracing::warn!(%error, "this node's own pods may not reach one that has come back");
        }
        self.ask(Command::Rollback).await??;
        if self.park_dropped().await? > 0 {
            // Buckets that wait for a lost frame would keep their flows on the slow way.
            self.resync(false);
        }
        Ok(())
    }

    /// The guest runs at the destination: from now on acknowledged frames are freed, and late ones
    /// relayed.
    ///
    /// # Errors
    /// The port does not hold.
    pub async fn forward(&self) -> Result<(), PortError> {
        self.ask(Command::Forward).await?
    }

    /// After [`forward`](Self::forward): late frames of a flow go through the tunnel to the node at `remote`, as soon as it has
    /// everything that went before them, and has left the order of the old way and the new behind. Until then, and if this fails,
    /// they are relayed; the reason is in the log and in [`NodeNetwork::tunnel_info`](crate::network::NodeNetwork::tunnel_info).
    ///
    /// # Errors
    /// See [`NoTunnel`]. Nothing is changed then.
    pub async fn tunnel_to(&self, remote: IpAddr) -> Result<(), NoTunnel> {
        let result = self.try_tunnel_to(remote).await;
        if let Err(error) = &result {
            self.inner.node.tunnel.complain(&self.inner.pod.name, error);
        }
        result
    }

    async fn try_tunnel_to(&self, remote: IpAddr) -> Result<(), NoTunnel> {
        let inner = &self.inner;
        // It goes on as a former service has left it.
        let netlink = &inner.node.netlink;
        let mtu = netlink.require(&inner.tap_name).await?.mtu;
        if inner.gate.get().mode == Mode::Tunnel {
            self.own_senders_follow();
            self.look_after(mtu, remote);
            return Ok(());
        }
        let tunnel = &inner.node.tunnel;
        let (gate, pod) = (&inner.gate, (inner.pod.mac, mtu));
        let aimed = tunnel.aim(gate, inner.pod.mac, mtu, remote).await?;
        let readied = tunnel.aim_on(netlink, gate, pod, remote).await;
        readied.map_err(PortError::from)?;
        self.ask(|reply| Command::Tunnel(aimed, reply)).await??;
        self.look_after(mtu, remote);
        self.own_senders_follow();
        Ok(())
    }

    /// Takes the pod off this node's network. After [`forward`](Self::forward), what is still parked
    /// goes to the sink first; the caller keeps the wire open until it is acknowledged. Returns the
    /// final ledger.
    ///
    /// # Errors
    /// A device or pin could not be removed; calling again tries again.
    pub async fn release(&self) -> Result<Ledger, PortError> {
        self.inner.quiet();
        let inner = &self.inner;
        // First the entry: frames for the pod alone then take the way that the bridge has learned, or its network's route. When
        // the last one is through, only group frames come, whose copy counts at the other node.
        let (node, pod) = (&inner.node, &inner.pod);
        self.pass_on()?;
        node.disown(&inner.tap_name, inner.tap_index, pod).await?;
        wait_for_frames().await;
        match self.ask(Command::Shut).await {
            Ok(()) | Err(PortError::Gone(_)) => wait_for_frames().await,
            Err(error) => return Err(error),
        }
        let ledger = match self.ask(Command::Drain).await {
            Ok(tally) => Some(self.book(tally).await?),
            Err(PortError::Gone(_)) => None,
            Err(error) => return Err(error),
        };
        self.fade_flows().await;
        self.remove().await?;
        Ok(ledger.unwrap_or_default())
    }
}

/// What the node's own bridge has for the pod behind this TAP goes out of the uplink.
async fn send_out(node: &NodeInner, tap: u32) -> Result<(), String> {
    let uplink = node.netlink.require(&node.config.uplink).await;
    let uplink = uplink.map_err(|error| error.to_string())?.index;
    let sent = node.gates.send_out(tap, uplink);
    sent.map_err(|error| error.to_string())
}

/// Until no frame is on its way that saw the network as it was.
async fn wait_for_frames() {
    if let Ok(Err(error)) = tokio::task::spawn_blocking(grace::grace_period).await {
        tracing::warn!(%error, "no grace period: a frame on its way may be lost");
    }
}
