//! The pod's disks on shared storage, at the destination: they do not move, and become this node's at the grant.

use std::sync::Arc;

use vm_runtime::units::Epoch;

use super::steps::blocking;
use crate::api::error::chain;
use crate::daemon::node::Node;
use crate::pods::PodDisk;
use crate::wire::message::{Offer, Refuse, RefuseCode};

/// Whether each disk on shared storage is here as well, is the same, and is the source's to offer.
pub(super) async fn check(node: &Arc<Node>, offer: &Offer) -> Result<(), Refuse> {
    let writable = offer.vm.writable.clone();
    if writable.iter().all(|disk| disk.shared.is_none()) {
        return Ok(());
    }
    let storage = Arc::clone(&node.storage);
    let (from, pod, epoch) = (offer.source.clone(), offer.pod.name.clone(), offer.epoch);
    blocking(move || {
        let mut shared = writable
            .iter()
            .filter_map(|disk| Some((disk.shared.as_ref()?, disk.size)));
        shared.try_for_each(|(disk, size)| storage.check_offered(disk, size, &from, &pod, epoch))
    })
    .await
    .map_err(|reason| Refuse {
        code: RefuseCode::Disk,
        reason: format!("{}: {reason}", node.name()),
    })
}

/// The pod's disks on shared storage become this node's: the grant has come, and is journaled.
pub(super) async fn take(disks: Vec<Arc<PodDisk>>, epoch: Epoch) -> Result<(), String> {
    let (served, images): (Vec<_>, Vec<_>) =
        disks.into_iter().partition(|disk| disk.served().is_some());
    if !images.is_empty() {
        // QEMU gets the image by itself. The record names the source until it names this node: nobody else takes it in between.
        tokio::task::spawn_blocking(move || {
            for disk in images {
                if let Err(error) = disk.take(epoch) {
                    let error = chain(&*error);
                    tracing::error!(disk = disk.name, error, "it is not noted as this node's");
                }
            }
        });
    }
    if served.is_empty() {
        return Ok(());
    }
    blocking(move || {
        let mut served = served.iter();
        served.try_for_each(|disk| disk.take(epoch).map_err(|error| chain(&*error)))
    })
    .await
}

/// The source is not heard of although the grant came: what it may still send to shared disks is not written any more.
pub(super) async fn fence_source(disks: Vec<Arc<PodDisk>>) {
    let fenced = blocking(move || {
        let mut shared = disks.iter().filter_map(|disk| disk.shared());
        shared.try_for_each(|disk| disk.fence_source().map_err(|error| chain(&error)))
    });
    if let Err(reason) = fenced.await {
        tracing::error!(
            reason,
            "the source's clients are not blocklisted: the guest may wait until Ceph gives them up by itself"
        );
    }
}
