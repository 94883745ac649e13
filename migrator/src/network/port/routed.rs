//! What a port does in a routed cluster, where nodes tell each other who has a pod.

use std::time::Duration;

use migrator_ebpf::Mode;
use tokio::time::{Instant, sleep};
use vm_runtime::units::Epoch;

use super::{Port, lock};
use crate::network::dataplane::Command;
use crate::network::endpoints::Claim;
use crate::network::error::PortError;

/// How often it is looked whether this node's own senders may take the new way.
const LOOK: Duration = Duration::from_millis(5);
/// For how long: after this the release does it.
const LOOK_LIMIT: Duration = Duration::from_secs(10);

impl Port {
    fn claim_in(&self, epoch: Epoch) -> Claim {
        let pod = &self.inner.pod;
        Claim {
            mac: pod.mac,
            v4: pod.v4,
            v6: pod.v6,
            epoch,
        }
    }

    /// This node has the pod in this epoch: its own senders' frames, and those of all other nodes, come here from now on. On a bridge the network
    /// learns by itself, and nothing is done.
    ///
    /// # Errors
    /// The programs' maps cannot be changed.
    pub fn claim(&self, epoch: Epoch) -> Result<(), PortError> {
        let Some(endpoints) = &self.inner.node.endpoints else {
            return Ok(());
        };
        endpoints.own(self.claim_in(epoch))?;
        *lock(&self.inner.claimed) = Some(epoch);
        Ok(())
    }

    /// Before [`forward`](Self::forward): the pod runs at another node, in an epoch that it was granted. The end of the log waits for every node that may
    /// have sent something here, for a second at most. On a bridge nothing is done.
    ///
    /// # Errors
    /// The port neither holds nor forwards, or the programs' maps cannot be changed.
    pub async fn left_for(&self, node: &str, epoch: Epoch) -> Result<(), PortError> {
        let Some(endpoints) = &self.inner.node.endpoints else {
            return Ok(());
        };
        let marks = endpoints.leave(self.claim_in(epoch), node)?;
        self.ask(|reply| Command::AwaitMarks(marks, reply)).await?
    }

    /// Once everything that still comes here goes on through the tunnel, the rest of the programs can do that without the gate, on the same device and lane: `steer`
    /// for this node's own senders, by the network's route, and `landing` for those of nodes that do not know yet.
    pub(super) fn own_senders_follow(&self) {
        let inner = &self.inner;
        if inner.node.endpoints.is_none() {
            return;
        }
        let (node, gate) = (inner.node.clone(), inner.gate.clone());
        let (pod, tap, index) = (inner.pod.clone(), inner.tap_name.clone(), inner.tap_index);
        let task = tokio::spawn(async move {
            let until = Instant::now() + LOOK_LIMIT;
            // In this mode a bucket that waits for nothing parks nothing any more.
            while gate.get().mode != Mode::Tunnel || gate.waiting() > 0 {
                if Instant::now() >= until {
                    return;
                }
                sleep(LOOK).await;
            }
            if let Err(error) = gate.forget_landing() {
                tracing::warn!(pod = pod.name, %error, "late frames go by way of the port that the pod has left");
            }
            if let Err(error) = node.disown(&tap, index, &pod).await {
                tracing::warn!(pod = pod.name, %error, "this node's own senders reach the pod by way of the port that it has left");
            }
        });
        *lock(&inner.leaver) = Some(task.abort_handle());
    }

    /// Before the gate is shut: what still comes for a pod that has left goes to where it is.
    pub(super) fn pass_on(&self) -> Result<(), PortError> {
        if self.inner.node.endpoints.is_some() {
            self.inner.gate.forget_landing()?;
        }
        Ok(())
    }

    /// The pod is no more, unless it has gone elsewhere, or has come back.
    pub(super) fn withdraw(&self) -> Result<(), PortError> {
        let claimed = lock(&self.inner.claimed).take();
        if let (Some(endpoints), Some(epoch)) = (&self.inner.node.endpoints, claimed) {
            endpoints.withdraw(self.inner.pod.mac, epoch)?;
        }
        Ok(())
    }
}
