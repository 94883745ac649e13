//! What a port does where the pod arrives.

use tokio::sync::watch;

use super::{Port, lock};
use crate::network::announce::{SCHEDULE, announcement};
use crate::network::dataplane::Command;
use crate::network::error::PortError;
use crate::network::log::LogItem;
use crate::network::sys::PacketSocket;

impl Port {
    /// An item of the log came from the wire. It is injected as soon as its turn comes.
    ///
    /// # Errors
    /// The port is gone.
    pub fn log_input(&self, item: LogItem) -> Result<(), PortError> {
        if self.inner.tell(Command::Input(item)) {
            Ok(())
        } else {
            Err(self.gone())
        }
    }

    /// The connection that the log came over has ended. If the log had not, the source is waited for, within limits, before what came
    /// here directly is let past.
    pub fn source_is_away(&self) {
        self.inner.tell(Command::SourceAway);
    }

    /// The highest number that was injected, to acknowledge; stays 0 until [`open`](Self::open).
    pub fn acked(&self) -> watch::Receiver<u64> {
        self.inner.acked.clone()
    }

    /// At the grant, before the guest runs: the pod lives here. Its frames are parked behind the log,
    /// the bridge sends them here, the guest may send, and the network is told.
    ///
    /// # Errors
    /// The port is not incoming; or the bridge or uplink refused.
    pub async fn open(&self) -> Result<(), PortError> {
        self.ask(Command::Open).await??;
        self.reopen().await
    }

    /// As [`open`](Self::open), for a port that a former service has opened: it may have been killed before it told anybody.
    ///
    /// # Errors
    /// The bridge or uplink refused.
    pub async fn reopen(&self) -> Result<(), PortError> {
        self.own().await?;
        self.announce().await
    }

    async fn announce(&self) -> Result<(), PortError> {
        let pod = &self.inner.pod;
        // Where pods are routed, no switch learns of them, and no neighbour.
        if self.inner.node.config.ground.bridge().is_none() {
            return Ok(());
        }
        let uplink = self.inner.node.config.uplink.clone();
        let index = self.inner.node.netlink.require(&uplink).await?.index;
        let socket = PacketSocket::open(index).map_err(|source| PortError::Announce {
            pod: pod.name.clone(),
            uplink,
            source,
        })?;
        let frames = announcement(pod.mac, pod.v4, pod.v6);
        let send = move || {
            for frame in &frames {
                // A full uplink loses this one; the schedule has more.
                socket.send(frame);
            }
        };
        send();
        let began = tokio::time::Instant::now();
        let task = tokio::spawn(async move {
            for at in &SCHEDULE[1..] {
                tokio::time::sleep_until(began + *at).await;
                send();
            }
        });
        *lock(&self.inner.announcer) = Some(task.abort_handle());
        Ok(())
    }

    /// After the guest runs: waits for the end of the log (50 ms at most, counted if it does not
    /// come), queues the frames that came here directly behind it, and opens the gate.
    ///
    /// # Errors
    /// The port was not opened.
    pub async fn settle(&self) -> Result<(), PortError> {
        self.ask(Command::Settle).await??;
        self.keep_flows();
        if self.park_dropped().await? > 0 {
            // Buckets that wait for a lost frame would keep their flows on the slow way.
            self.resync(false);
        }
        Ok(())
    }

    /// Gives the migration up before the grant: nothing is left on this node.
    ///
    /// # Errors
    /// A device or pin could not be removed; calling again tries again.
    pub async fn discard(&self) -> Result<(), PortError> {
        self.inner.quiet();
        self.undo_flows().await;
        self.remove().await
    }
}
