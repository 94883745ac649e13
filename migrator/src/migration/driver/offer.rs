//! What a source offers: the pod, the VM, and what the destination has to have for them.

use std::sync::Arc;

use vm_runtime::spec::DiskSpec;
use vm_runtime::units::Epoch;

use super::Options;
use super::steps::blocking;
use crate::api::error::chain;
use crate::daemon::node::Node;
use crate::image::{Digest, ImageRecord};
use crate::pods::disks::PodDisk;
use crate::pods::{PodHandle, PodResources};
use crate::wire::codec;
use crate::wire::frame::Lane;
use crate::wire::id::MigrationId;
use crate::wire::lists::{self, ImageList};
use crate::wire::message::{
    Control, DiskOffer, ImageLists, ImageOffer, ListPiece, Offer, OfferOptions,
};
use crate::wire::preamble::VERSION_CHUNKS;

/// What the destination is asked to take, with the lists of its images.
pub(super) async fn offer(
    node: &Arc<Node>,
    pod: &PodHandle,
    resources: &PodResources,
    migration: MigrationId,
    options: Options,
) -> Result<(Offer, Vec<ImageList>), String> {
    let epoch: Epoch = pod.view().epoch;
    let images = Arc::clone(&node.images);
    let disks = resources.vm_spec.disks.clone();
    let images = blocking(move || {
        let one = |disk: &DiskSpec| {
            let mut record = images
                .resolve(&disk.image_digest)
                .map_err(|error| chain(&error))?;
            let chunks = std::mem::take(&mut record.chunks);
            let list = ImageList {
                chunks: chunks.into_iter().map(|digest| digest.0).collect(),
                order: images.first_uses(&record),
            };
            let record = json(&record)?;
            Ok((ImageOffer { record }, list))
        };
        disks.iter().map(one).collect::<Result<Vec<_>, String>>()
    })
    .await?;
    let (images, lists) = images.into_iter().unzip();
    let offer = Offer {
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
        lists: None,
    };
    Ok((offer, lists))
}

/// Puts the images' lists where a destination that speaks `version` looks for them; what follows the offer. `later`: it may run the pod before
/// it has its images.
///
/// # Errors
/// They are too long, or the offer is with them.
pub(super) fn with_lists(
    offer: &mut Offer,
    mut lists: Vec<ImageList>,
    later: bool,
    version: u16,
    to: &str,
) -> Result<Vec<ListPiece>, String> {
    let pieces = if version >= VERSION_CHUNKS {
        if !later {
            lists.iter_mut().for_each(|list| list.order.clear());
        }
        let lengths = lists::lengths(&lists).map_err(|error| chain(&error))?;
        offer.lists = Some(ImageLists { later, lengths });
        lists::cut(&lists)
    } else {
        for (image, list) in offer.images.iter_mut().zip(lists) {
            let mut record: ImageRecord = serde_json::from_str(&image.record)
                .map_err(|error| format!("an image's record cannot be read: {error}"))?;
            record.chunks = list.chunks.into_iter().map(Digest).collect();
            image.record = json(&record)?;
        }
        Vec::new()
    };
    let message = Control::from(offer.clone());
    if codec::size(&message) > Lane::Control.max_frame() {
        let pod = &offer.pod.name;
        return Err(match version >= VERSION_CHUNKS {
            true => format!(
                "the specification of {pod} and the configuration of its images are more than one message of 1 MiB holds: shorten them"
            ),
            false => format!(
                "the images of {pod} are too large to be listed in one message, and {to} speaks version {version} of the protocol, which takes \
                 no more: upgrade migrator on {to}, or choose another node"
            ),
        });
    }
    Ok(pieces)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::golden;
    use crate::wire::preamble::VERSION_MAX;

    fn offered(chunks: usize) -> (Offer, Vec<ImageList>) {
        let mut offer = golden::offer();
        let record = ImageRecord {
            name: "web:1".to_owned(),
            manifest_digest: Digest::of(b"web"),
            config: Default::default(),
            erofs_size: 0,
            chunk_size: 0,
            chunks: Vec::new(),
            erofs_digest: Digest::of(b"bytes"),
        };
        offer.images[0].record = json(&record).unwrap();
        let list = ImageList {
            chunks: vec![[7; 32]; chunks],
            order: vec![0],
        };
        (offer, vec![list])
    }

    #[test]
    fn lists_follow_the_offer_or_are_in_its_records_as_the_destination_knows_them() {
        let (mut offer, lists) = offered(3);
        let pieces = with_lists(&mut offer, lists.clone(), true, VERSION_MAX, "b").unwrap();
        assert_eq!(pieces[0].0.len(), 3 * 32 + 4);
        assert!(offer.lists.is_some_and(|lists| lists.later));
        let (mut offer, _) = offered(3);
        let pieces = with_lists(&mut offer, lists.clone(), false, VERSION_MAX, "b").unwrap();
        assert_eq!(
            pieces[0].0.len(),
            3 * 32,
            "who waits for all needs no order"
        );
        let (mut offer, _) = offered(3);
        let pieces = with_lists(&mut offer, lists, false, VERSION_CHUNKS - 1, "b").unwrap();
        assert!(pieces.is_empty() && offer.lists.is_none());
        let record: ImageRecord = serde_json::from_str(&offer.images[0].record).unwrap();
        assert_eq!(record.chunks, [Digest([7; 32]); 3]);
    }

    #[test]
    fn images_that_are_too_large_for_an_older_destination_are_refused_before_anything_is_begun() {
        // 5 GiB.
        let (mut offer, lists) = offered(20_480);
        let begun = with_lists(&mut offer, lists.clone(), true, VERSION_MAX, "b");
        assert_eq!(begun.unwrap().len(), 2);
        let (mut offer, _) = offered(0);
        let refused = with_lists(&mut offer, lists, true, VERSION_CHUNKS - 1, "b").unwrap_err();
        for word in ["web", "version 3", "upgrade migrator on b"] {
            assert!(refused.contains(word), "{refused}");
        }
        let (mut offer, lists) = offered(lists::MAX_CHUNKS as usize + 1);
        let refused = with_lists(&mut offer, lists, true, VERSION_MAX, "b").unwrap_err();
        assert!(refused.contains("64 GiB"), "{refused}");
    }
}
