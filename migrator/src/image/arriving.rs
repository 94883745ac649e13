//! Images that came with a pod which may still turn back: what its service must know of them if it dies meanwhile.

use std::fs;
use std::io;
use std::time::SystemTime;

use super::digest::Digest;
use super::gc::unix_ms;
use super::holds::ImageHold;
use super::record::ImageRecord;
use super::store::{ImageStore, State};
use super::store_files::{ARRIVING, StoreError, write_synced};

impl ImageStore {
    /// As [`ImageStore::adopt`], for a pod that is on its way here: if the service ends before [`ImageStore::arrived`], the next one
    /// [releases](ImageStore::release_arriving) the image. One that is here already stays as it is.
    ///
    /// # Errors
    /// As [`ImageStore::adopt`].
    pub fn adopt_arriving(
        &self,
        record: ImageRecord,
    ) -> Result<(ImageRecord, ImageHold), StoreError> {
        self.check(&record)?;
        let scratch = self.scratch()?;
        write_synced(&scratch.path().join(ARRIVING), &[])?;
        self.commit(scratch, record, false)
    }

    /// The pod that brought the image has come: it stays.
    pub fn arrived(&self, record: &ImageRecord) {
        self.unmark(record.id());
    }

    /// Somebody wants the image for itself.
    pub(super) fn unmark(&self, id: Digest) {
        let path = self.folder(id).join(ARRIVING);
        if let Err(error) = fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "the image may go at the next start");
        }
    }

    /// Removes images whose pods have not come, and which nobody else uses or holds. For the start of the service, when its pods are
    /// known: `in_use` are their images, by [`ImageRecord::erofs_digest`]. The images that went.
    ///
    /// # Errors
    /// An image cannot be removed.
    pub fn release_arriving(
        &self,
        in_use: &[Digest],
        now: SystemTime,
    ) -> Result<Vec<ImageRecord>, StoreError> {
        let mut state = self.state();
        let (wanted, doomed): (Vec<Digest>, Vec<Digest>) = state
            .images
            .iter()
            // What is held is about to be used, or its pod is on its way.
            .filter(|(_, record)| !self.holds().has(&record.erofs_digest))
            .map(|(id, _)| *id)
            .filter(|id| self.folder(*id).join(ARRIVING).exists())
            .partition(|id| is_wanted(&state, id, in_use, now));
        wanted.into_iter().for_each(|id| self.unmark(id));
        let records = doomed.iter().filter_map(|id| state.images.get(id));
        let records = records.map(|record| ImageRecord::clone(record)).collect();
        self.remove_all(&mut state, &doomed)?;
        Ok(records)
    }
}

fn is_wanted(state: &State, id: &Digest, in_use: &[Digest], now: SystemTime) -> bool {
    let leased = state
        .leases
        .get(id)
        .is_some_and(|until| *until > unix_ms(now));
    let image = state.images.get(id);
    leased || image.is_some_and(|record| in_use.contains(&record.erofs_digest))
}
