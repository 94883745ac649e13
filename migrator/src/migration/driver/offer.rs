//! What a source offers: the pod, the VM, and what the destination has to have for them.

use std::sync::Arc;

use vm_runtime::spec::DiskSpec;
use vm_runtime::units::Epoch;

use super::Options;
use super::steps::blocking;
use crate::api::error::chain;
use crate::daemon::node::Node;
use crate::pods::disks::PodDisk;
use crate::pods::{PodHandle, PodResources};
use crate::wire::id::MigrationId;
use crate::wire::message::{DiskOffer, ImageOffer, ImagesLater, Offer, OfferOptions};

/// What the destination is asked to take.
pub(super) async fn offer(
    node: &Arc<Node>,
    pod: &PodHandle,
    resources: &PodResources,
    migration: MigrationId,
    options: Options,
) -> Result<Offer, String> {
    let epoch: Epoch = pod.view().epoch;
    let images = Arc::clone(&node.images);
    let disks = resources.vm_spec.disks.clone();
    let images = blocking(move || {
        disks
            .iter()
            .map(|disk| {
                let record = images
                    .resolve(&disk.image_digest)
                    .map_err(|error| chain(&error))?;
                let record = json(&record)?;
                Ok(ImageOffer { record })
            })
            .collect::<Result<Vec<_>, String>>()
    })
    .await?;
    Ok(Offer {
        migration,
        epoch: epoch.next(),
        source: node.name().to_owned(),
        pod: resources.spec.clone(),
        vm: resources.vm_spec.clone(),
        ram: resources.vm_spec.memory,
        // Not the node's: the pod may have been upgraded, or not yet.
        qemu_version: resources.vm.record().qemu.version_text(),
        options: OfferOptions {
            verify: options.verify,
        },
        record: json(&pod.record())?,
        images,
        routed: super::checks::routed(node),
        disks: writable_disks(resources).await?,
        images_later: None,
    })
}

/// In which order the pod's images were read, for a destination that may run it before it has them.
pub(super) async fn images_later(
    node: &Arc<Node>,
    resources: &PodResources,
) -> Result<ImagesLater, String> {
    let images = Arc::clone(&node.images);
    let disks = resources.vm_spec.disks.clone();
    blocking(move || {
        let order = |disk: &DiskSpec| {
            let digest = disk.image_digest.parse().ok()?;
            Some(images.order(&digest).ok()?.list())
        };
        let order = disks.iter().map(|disk| order(disk).unwrap_or_default());
        Ok(ImagesLater {
            order: order.collect(),
        })
    })
    .await
}

/// The pod's writable disks that move; those on shared storage are in the VM's specification.
async fn writable_disks(resources: &PodResources) -> Result<Vec<DiskOffer>, String> {
    let disks = resources.disks.clone();
    blocking(move || {
        let offer = |pod: &Arc<PodDisk>| {
            let disk = pod.local()?;
            let allocated = disk.allocated_bytes().map_err(|error| chain(&error));
            Some(allocated.map(|allocated| DiskOffer {
                name: pod.name.clone(),
                size: disk.size(),
                allocated,
            }))
        };
        disks.iter().filter_map(offer).collect()
    })
    .await
}

/// `7.2.22`.
pub(super) fn version((major, minor, micro): (u32, u32, u32)) -> String {
    format!("{major}.{minor}.{micro}")
}

fn json(value: &impl serde::Serialize) -> Result<String, String> {
    serde_json::to_string(value).map_err(|error| chain(&error))
}
