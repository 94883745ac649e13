//! What a port does where the pod leaves.

use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedSender;

use super::Port;
use crate::network::dataplane::Command;
use crate::network::error::PortError;
use crate::network::grace;
use crate::network::ledger::Ledger;
use crate::network::log::LogItem;

impl Port {
    /// Parks every frame for the pod from now on, and streams what is parked to `sink`, numbered. When
    /// this returns, no frame is on its way into the TAP any more. The log is kept until it is
    /// acknowledged, and at least until [`forward`](Self::forward).
    ///
    /// On a port that a former service left holding: attaches the sink, and sends it what is kept.
    ///
    /// # Errors
    /// The pod does not live here, or the kernel has no grace period: then the gate holds all the
    /// same, and [`rollback`](Self::rollback) opens it.
    pub async fn hold(&self, sink: UnboundedSender<LogItem>) -> Result<(), PortError> {
        self.inner.quiet();
        self.ask(|reply| Command::Hold(sink, reply)).await??;
        match tokio::task::spawn_blocking(grace::grace_period).await {
            Ok(result) => result.map_err(PortError::GracePeriod),
            Err(_) => Err(self.gone()),
        }
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

    /// Takes the pod off this node's network. After [`forward`](Self::forward), what is still parked
    /// goes to the sink first; the caller keeps the wire open until it is acknowledged. Returns the
    /// final ledger.
    ///
    /// # Errors
    /// A device or pin could not be removed; calling again tries again.
    pub async fn release(&self) -> Result<Ledger, PortError> {
        self.inner.quiet();
        let netlink = &self.inner.node.netlink;
        let tap = self.inner.tap_index;
        // First the entry: frames for the pod alone then take the way that the bridge has learned. When
        // the last one is through, only group frames come, whose copy counts at the other node.
        netlink
            .disown_address(&self.inner.tap_name, tap, self.inner.pod.mac)
            .await?;
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
        self.remove().await?;
        Ok(ledger.unwrap_or_default())
    }
}

/// Until no frame is on its way that saw the network as it was.
async fn wait_for_frames() {
    if let Ok(Err(error)) = tokio::task::spawn_blocking(grace::grace_period).await {
        tracing::warn!(%error, "no grace period: a frame on its way may be lost");
    }
}
