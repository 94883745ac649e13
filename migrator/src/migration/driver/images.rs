//! A pod's images at the destination: here already, handed over before the grant, or to follow.

use std::collections::HashSet;
use std::sync::Arc;

use tokio::sync::mpsc;
use vm_runtime::spec::DiskSpec;

use super::prepare::Chunk;
use super::steps::blocking;
use crate::api::error::chain;
use crate::api::images::in_use;
use crate::daemon::node::Node;
use crate::image::{Digest, ImageHold, ImageRecord, ImageStore, Incoming, check_room};
use crate::supply::{Counted, ROOM_LEFT};
use crate::wire::lists::ImageList;
use crate::wire::message::{ImageOffer, ImageWant, ImagesMoved, Offer};

/// The part of an image that is fetched before its guest resumes: the beginning of the order of use. Less than a twentieth, so that with the chunk that
/// a VMM reads by itself it stays below that.
const HEAD_DIVISOR: u64 = 32;

/// The images of a pod that is on its way here.
#[derive(Debug, Default)]
pub(super) struct Images {
    /// Those that must be complete before the grant. Dropping them removes what has come.
    incoming: Vec<Incoming>,
    /// Those that may follow.
    later: Vec<Arc<ImageRecord>>,
    /// Of these, those that nobody here knew before.
    adopted: Vec<(ImageRecord, ImageHold)>,
    figures: ImagesMoved,
    /// What had come of each image before.
    fetched: Vec<(Digest, u64)>,
    /// Filling waits while the pod arrives.
    arriving: Option<Counted>,
}

/// What the offer says of one image.
struct Offered {
    digest: Digest,
    record: ImageRecord,
    order: Option<Vec<u32>>,
}

/// Reads the offer's images. Their lists are with it, or in their records.
fn offered(offer: &Offer, lists: Vec<ImageList>) -> Result<Vec<Offered>, String> {
    let disks = &offer.vm.disks;
    if offer.images.len() != disks.len() {
        return Err("the offer has not one image a disk".to_owned());
    }
    let follow = offer.lists.as_ref();
    if follow.is_some() && lists.len() != disks.len() {
        return Err("the offer has not one list an image".to_owned());
    }
    let mut lists = lists.into_iter();
    let one = |(index, (image, disk)): (usize, (&ImageOffer, &DiskSpec))| {
        let mut record: ImageRecord = serde_json::from_str(&image.record)
            .map_err(|error| format!("the record of image {index} cannot be read: {error}"))?;
        let ImageList { chunks, order } = lists.next().unwrap_or_default();
        if follow.is_some() {
            record.chunks = chunks.into_iter().map(Digest).collect();
        }
        if record.erofs_digest.to_string() != disk.image_digest {
            return Err(format!("image {index} is not the one that its disk names"));
        }
        Ok(Offered {
            digest: record.erofs_digest,
            record,
            order: follow.is_some_and(|lists| lists.later).then_some(order),
        })
    };
    offer
        .images
        .iter()
        .zip(disks)
        .enumerate()
        .map(one)
        .collect()
}

/// Which chunks of which images are wanted before the grant. Images that may follow become the store's at once.
pub(super) async fn take_in(
    node: &Arc<Node>,
    offer: &Offer,
    lists: Vec<ImageList>,
) -> Result<(Images, Vec<ImageWant>), String> {
    let offered = offered(offer, lists)?;
    let store = Arc::clone(&node.images);
    let (mut images, wants) = blocking(move || sort(&store, offered)).await?;
    let fetched = images.later.iter();
    images.fetched = fetched
        .map(|record| {
            (
                record.erofs_digest,
                node.supply.fetched(&record.erofs_digest),
            )
        })
        .collect();
    if !images.later.is_empty() {
        images.arriving = Some(node.supply.arriving());
        for record in &images.later {
            node.supply.fill(record);
            let (supply, record) = (node.supply.clone(), Arc::clone(record));
            let shutdown = node.shutdown.clone();
            node.tasks.spawn(async move {
                let budget = record.erofs_size / HEAD_DIVISOR;
                tokio::select! {
                    () = supply.head(&record, budget) => {}
                    () = shutdown.cancelled() => {}
                }
            });
        }
    }
    Ok((images, wants))
}

fn sort(
    store: &Arc<ImageStore>,
    offered: Vec<Offered>,
) -> Result<(Images, Vec<ImageWant>), String> {
    let (mut images, mut wants) = (Images::default(), Vec::new());
    // Of all images that may follow.
    let mut to_come = 0;
    for (
        index,
        Offered {
            digest,
            record,
            order,
        },
    ) in (0u32..).zip(offered)
    {
        record.validate().map_err(|error| chain(&error))?;
        let size = record.erofs_size;
        images.figures.size += size;
        images.figures.here += store.chunks().bytes_here(&record);
        let known = store.record(&digest).ok();
        let complete = |record: &ImageRecord| store.chunks().missing(record).is_empty();
        match (known, order) {
            (Some(known), _) if complete(&known) => {}
            (known, Some(order)) => {
                to_come += store.chunks().bytes_to_come(&record);
                check_room(store, to_come, ROOM_LEFT).map_err(|error| chain(&error))?;
                let record = match known {
                    Some(known) => known,
                    None => {
                        images.adopted.push(
                            store
                                .adopt_arriving(record)
                                .map_err(|error| chain(&error))?,
                        );
                        store.record(&digest).map_err(|error| chain(&error))?
                    }
                };
                let used = store.order(&digest).map_err(|error| chain(&error))?;
                used.add(&order, record.chunks.len());
                images.later.push(record);
            }
            (_, None) => {
                let (incoming, chunks) =
                    Incoming::begin(store, record).map_err(|error| chain(&error))?;
                if chunks.is_empty() {
                    incoming.finish().map_err(|error| chain(&error))?;
                    continue;
                }
                let lengths = chunks
                    .iter()
                    .map(|index| incoming.record().chunk_len(*index));
                images.figures.before_resume += lengths.sum::<usize>() as u64;
                images.incoming.push(incoming);
                wants.push(ImageWant {
                    image: index,
                    chunks,
                });
            }
        }
    }
    Ok((images, wants))
}

impl Images {
    /// Takes chunks until every image that must be complete is.
    pub(super) async fn receive(
        incoming: Vec<Incoming>,
        mut chunks: mpsc::Receiver<Chunk>,
    ) -> Result<(), String> {
        let mut images = incoming;
        let mut missing: HashSet<Digest> = HashSet::new();
        loop {
            if missing.is_empty() {
                // Looked at anew: one that was there may have been found damaged.
                missing.extend(images.iter().flat_map(Incoming::missing_digests));
            }
            if missing.is_empty() {
                break;
            }
            let Some(Chunk { digest, raw }) = chunks.recv().await else {
                return Err("the data connections ended before the images were complete".to_owned());
            };
            let digest = Digest(digest);
            images = blocking(move || {
                let mut placed = false;
                for image in images.iter().filter(|image| image.has(&digest)) {
                    image
                        .place_digest(&digest, &raw)
                        .map_err(|error| chain(&error))?;
                    placed = true;
                }
                match placed {
                    true => Ok(images),
                    false => Err(format!(
                        "the source sent a chunk that nobody asked for: {digest}"
                    )),
                }
            })
            .await?;
            missing.remove(&digest);
        }
        blocking(move || {
            for image in images {
                image.finish().map_err(|error| chain(&error))?;
            }
            Ok(())
        })
        .await
    }

    /// Those that must be complete before the grant.
    pub(super) fn take_incoming(&mut self) -> Vec<Incoming> {
        std::mem::take(&mut self.incoming)
    }

    /// What keeps filling back while the pod arrives.
    pub(super) fn take_arriving(&mut self) -> Option<Counted> {
        self.arriving.take()
    }

    /// The pod is about to be granted: its images stay, also if the service dies. Nobody waits for that.
    pub(super) fn arrived(&self, node: &Node) {
        for (record, _) in &self.adopted {
            let (store, record) = (Arc::clone(&node.images), record.clone());
            node.tasks.spawn_blocking(move || store.arrived(&record));
        }
    }

    /// The guest resumes now: what has come so far.
    pub(super) fn resumed(&mut self, node: &Node) {
        for (image, before) in self.fetched.drain(..) {
            self.figures.before_resume += node.supply.fetched(&image).saturating_sub(before);
        }
    }

    /// For the source's report.
    pub(super) fn figures(&self) -> ImagesMoved {
        self.figures
    }

    /// The pod does not come: what nobody here knew before goes again. Call it when nothing of the pod is left.
    pub(super) async fn give_up(mut self, node: &Arc<Node>) {
        self.incoming.clear();
        let node = Arc::clone(node);
        let adopted = self.adopted;
        let removed = blocking(move || {
            for (record, hold) in adopted {
                drop(hold);
                let used: Vec<Digest> = in_use(&node).into_iter().map(|(image, _)| image).collect();
                // Somebody else may use it by now.
                if let Err(error) = node.images.remove(&record.id().to_string(), &used) {
                    node.images.arrived(&record);
                    tracing::info!(
                        image = record.name,
                        error = chain(&error),
                        "the image stays"
                    );
                }
            }
            Ok(())
        });
        if let Err(reason) = removed.await {
            tracing::warn!(reason, "images of a pod that does not come are left behind");
        }
    }
}
