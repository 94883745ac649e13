//! Pods whose guests lack pages when the service starts: their VMMs may answer only once pages come.

use std::sync::Arc;
use std::time::Duration;

use vm_runtime::units::Epoch;
use vm_runtime::vm::{AttachError, Vm};

use super::Reservation;
use super::actor::{self, Birth};
use super::attach::attach;
use super::disks::Origin;
use super::handle::{Facts, PodHandle, PodResources};
use crate::api::error::chain;
use crate::api::types::ContainerStatus;
use crate::daemon::node::Node;
use crate::network::Role;

/// How long a VMM that waits for a page is left alone before it is spoken to again.
const AGAIN: Duration = Duration::from_millis(200);

/// A pod that is granted to this node, and not found again yet. Its name and slot are taken.
#[derive(Debug)]
pub struct LackingPod {
    pub(super) reservation: Reservation,
    pub(super) facts: Facts,
    pub(super) epoch: Epoch,
    pub(super) containers: Vec<ContainerStatus>,
    pub(super) migration: String,
}

impl LackingPod {
    /// Waits until its VMM answers or is gone. `None`: gone, and the pod shows as failed.
    pub async fn find(self, node: &Arc<Node>) -> Option<(PodHandle, Arc<PodResources>)> {
        let name = self.facts.spec.name.clone();
        while let Err(error) = Vm::find(&self.facts.dir).await {
            if matches!(error, AttachError::Gone { .. }) {
                break;
            }
            tracing::info!(
                pod = name,
                error = chain(&error),
                "its VMM does not answer yet"
            );
            tokio::select! {
                () = node.shutdown.cancelled() => {
                    // Not removed: the next service finds it.
                    self.reservation.keep_for_ever();
                    return None;
                }
                () = tokio::time::sleep(AGAIN) => {}
            }
        }
        let found = attach(
            node,
            &self.facts,
            true,
            Role::Incoming,
            Origin::Found(self.epoch),
        )
        .await;
        let birth = match &found {
            Err(reason) => Birth::dead(reason),
            Ok(resources) => Birth::Migrating {
                resources: Arc::clone(resources),
                migration: self.migration,
                in_doubt: false,
            },
        };
        let containers = Some(self.containers);
        let handle = actor::spawn(
            node,
            self.reservation,
            self.facts,
            self.epoch,
            containers,
            birth,
        );
        found.ok().map(|resources| (handle, resources))
    }
}
