//! Which images have their layers kept, and which blobs therefore stay.

use std::collections::BTreeSet;

use super::content::ContentError;
use super::digest::Digest;
use super::layout::Blobs;
use super::manifest;
use super::oci::MAX_JSON;
use super::store::{ImageStore, StoreError};

/// Why an image cannot leave the store as it came.
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    /// The image.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its layers went when it was imported.
    #[error("the layers of image `{0}` are not kept")]
    NotKept(String),
    /// A blob is damaged or gone.
    #[error(transparent)]
    Content(#[from] ContentError),
}

impl ImageStore {
    /// The blobs of an image whose layers are kept.
    pub(crate) fn kept(&self, reference: &str) -> Result<Blobs, KeptError> {
        let record = self.resolve(reference)?;
        let not_kept = || KeptError::NotKept(reference.to_owned());
        let blobs = self
            .blobs_of(record.manifest_digest)?
            .ok_or_else(not_kept)?;
        if blobs.all().all(|digest| self.content().has(digest)) {
            Ok(blobs)
        } else {
            Err(not_kept())
        }
    }

    /// What a kept manifest names; `None` if it is not kept.
    fn blobs_of(&self, digest: Digest) -> Result<Option<Blobs>, ContentError> {
        let content = self.content();
        if !content.has(digest) {
            return Ok(None);
        }
        let bytes = content.read(digest, MAX_JSON)?;
        let read = manifest::own_type(&bytes).and_then(|own| manifest::image(&bytes, &own));
        // Only manifests that could be read were kept.
        let Ok(image) = read else {
            return Ok(None);
        };
        Ok(Some(Blobs {
            manifest: digest,
            manifest_size: bytes.len() as u64,
            blobs: image.blobs().iter().map(|blob| blob.digest).collect(),
            media_type: image.media_type,
        }))
    }

    /// The blobs of all images whose layers are kept, but for those that are about to go.
    pub(super) fn needed_blobs(&self, doomed: &[Digest]) -> BTreeSet<Digest> {
        let mut needed = BTreeSet::new();
        let images = self.records().into_iter();
        for record in images.filter(|record| !doomed.contains(&record.id())) {
            match self.blobs_of(record.manifest_digest) {
                Ok(blobs) => needed.extend(blobs.iter().flat_map(Blobs::all)),
                Err(error) => {
                    tracing::warn!(image = record.name, %error, "its layers cannot be kept");
                }
            }
        }
        needed
    }

    /// Lets go of the blobs of an image that are kept for nothing else.
    pub(crate) fn forget(&self, blobs: &Blobs) -> Result<(), StoreError> {
        self.content().release(&[blobs.manifest])?;
        let needed = self.needed_blobs(&[]);
        let free: Vec<Digest> = blobs
            .blobs
            .iter()
            .copied()
            .filter(|digest| !needed.contains(digest))
            .collect();
        self.content().release(&free)
    }
}
