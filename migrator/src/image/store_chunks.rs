//! An image's chunks, as the store gives them out and clears them away.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

use bytes::Bytes;

use super::chunks::{Chunk, Chunks, ImageExport, UseOrder};
use super::digest::Digest;
use super::holds::ImageHold;
use super::record::ImageRecord;
use super::store::{ImageStore, State};
use super::store_files::{ORDER, StoreError};

impl ImageStore {
    /// The image with these bytes ([`ImageRecord::erofs_digest`]), as a VM reads it; `path` is for messages.
    pub fn export(&self, digest: &Digest, path: PathBuf) -> Result<ImageExport, StoreError> {
        let (id, record) = self.by_bytes(digest)?;
        let order = self.order_of(id, &record);
        let chunks = Arc::clone(&self.chunks);
        Ok(ImageExport::new(record, chunks, order, path))
    }

    /// In which order the chunks of the image with these bytes were first read.
    pub fn order(&self, digest: &Digest) -> Result<Arc<UseOrder>, StoreError> {
        let (id, record) = self.by_bytes(digest)?;
        Ok(self.order_of(id, &record))
    }

    /// The chunks of an image that were read, in the order in which they first were; none if the image is not here.
    pub fn first_uses(&self, record: &ImageRecord) -> Vec<u32> {
        let order = self.order(&record.erofs_digest);
        order.map(|order| order.list()).unwrap_or_default()
    }

    fn order_of(&self, id: Digest, record: &ImageRecord) -> Arc<UseOrder> {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        let order = orders.entry(record.erofs_digest).or_insert_with(|| {
            let path = self.folder(id).join(ORDER);
            Arc::new(UseOrder::open(&path, record.chunks.len()))
        });
        Arc::clone(order)
    }

    /// Reads chunk `index` of the image with these bytes, and verifies it.
    pub fn read_chunk(&self, digest: &Digest, index: u32) -> Result<Bytes, StoreError> {
        let (_, record) = self.by_bytes(digest)?;
        let image = record.erofs_digest;
        if index as usize >= record.chunks.len() {
            return Err(StoreError::NoChunk { image, index });
        }
        match self.chunks.read(&record, index) {
            Chunk::Here(bytes) => Ok(bytes),
            Chunk::Missing | Chunk::Damaged => Err(StoreError::Damaged { image, index }),
            Chunk::Misfit => Err(StoreError::Misfit { index }),
        }
    }

    /// The chunks of all images.
    pub fn chunks(&self) -> &Arc<Chunks> {
        &self.chunks
    }

    /// Every image.
    pub fn records(&self) -> Vec<Arc<ImageRecord>> {
        self.state().images.values().cloned().collect()
    }

    /// The image with these bytes ([`ImageRecord::erofs_digest`]).
    pub fn record(&self, digest: &Digest) -> Result<Arc<ImageRecord>, StoreError> {
        self.by_bytes(digest).map(|(_, record)| record)
    }

    /// Makes an image one of the store's of which not every chunk needs to be here. It gets its name unless another image here has it.
    ///
    /// # Errors
    /// The record is not valid or does not fit a chunk that is here, or it cannot be written.
    pub fn adopt(&self, record: ImageRecord) -> Result<(ImageRecord, ImageHold), StoreError> {
        self.check(&record)?;
        self.commit(self.scratch()?, record, false)
    }

    /// Refuses a record that is not valid, or does not fit a chunk that is here.
    pub(super) fn check(&self, record: &ImageRecord) -> Result<(), StoreError> {
        record.validate()?;
        self.check_lengths(record)
    }

    /// Refuses a record that gives a chunk that is here another length than it has.
    pub(super) fn check_lengths(&self, record: &ImageRecord) -> Result<(), StoreError> {
        for (index, digest) in (0u32..).zip(&record.chunks) {
            let len = record.chunk_len(index) as u64;
            if self.chunks.len_of(digest).is_some_and(|found| found != len) {
                return Err(StoreError::Misfit { index });
            }
        }
        Ok(())
    }

    /// Removes all chunks that no image needs.
    pub(super) fn sweep_all(&self) {
        let state = self.state();
        let images = state.images.values();
        let needed = images.flat_map(|record| record.chunks.iter().copied());
        self.chunks.keep_only(&needed.collect());
    }

    /// The image's folder is gone: its chunks go that no other image needs.
    pub(super) fn drop_images(&self, state: &mut State, ids: &[Digest]) {
        let chunks = unshared(state, ids);
        for id in ids {
            if let Some(record) = state.images.remove(id) {
                let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
                orders.remove(&record.erofs_digest);
            }
        }
        self.chunks.remove(chunks.into_keys());
    }

    /// Removes those of these chunks that no image needs.
    pub(crate) fn sweep(&self, digests: &BTreeSet<Digest>) {
        // While no image can come or go.
        let state = self.state();
        let images = state.images.values();
        let needed: BTreeSet<&Digest> = images.flat_map(|record| &record.chunks).collect();
        let unneeded = digests.iter().filter(|digest| !needed.contains(digest));
        self.chunks.remove(unneeded.copied());
    }
}

/// The chunks that only these images need, with their lengths in bytes.
pub(super) fn unshared(state: &State, ids: &[Digest]) -> BTreeMap<Digest, u64> {
    let mut chunks = BTreeMap::new();
    for record in ids.iter().filter_map(|id| state.images.get(id)) {
        let lengths = (0u32..).zip(&record.chunks);
        chunks.extend(lengths.map(|(index, chunk)| (*chunk, record.chunk_len(index) as u64)));
    }
    let others = state.images.iter().filter(|(id, _)| !ids.contains(id));
    for chunk in others.flat_map(|(_, record)| &record.chunks) {
        chunks.remove(chunk);
    }
    chunks
}
