//! Clearing away what nobody needs: images without a pod, a user-to-be or a lease, and blobs without an image.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::digest::Digest;
use super::record::ImageRecord;
use super::store::{ImageStore, State};
use super::store_chunks::unshared;
use super::store_files::{StoreError, io_error};

/// Until when images are kept, in milliseconds of Unix time, by [`ImageRecord::id`].
pub(super) type Leases = BTreeMap<Digest, u64>;

/// What was cleared away, or would be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Garbage {
    /// Images, under the first of their names.
    pub images: Vec<ImageRecord>,
    /// Bytes of chunks that only these images needed.
    pub chunk_bytes: u64,
    /// Blobs of registries, with their sizes in bytes.
    pub blobs: Vec<(Digest, u64)>,
}

impl Garbage {
    /// Bytes on the disk.
    pub fn bytes(&self) -> u64 {
        self.chunk_bytes + self.blobs.iter().map(|(_, size)| *size).sum::<u64>()
    }
}

pub(super) fn unix_ms(time: SystemTime) -> u64 {
    millis(time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO))
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl ImageStore {
    /// Keeps an image from [`ImageStore::collect`] for `time` from `now` on, instead of what its lease was; no time ends
    /// the lease. When it ends, in milliseconds of Unix time.
    pub fn lease(
        &self,
        reference: &str,
        now: SystemTime,
        time: Duration,
    ) -> Result<Option<u64>, StoreError> {
        let mut state = self.state();
        let (id, _) = self.find(&state, reference)?;
        self.set_lease(&mut state, id, now, time)
    }

    /// As [`ImageStore::lease`], but never shortens a lease.
    pub(crate) fn lease_at_least(
        &self,
        record: &ImageRecord,
        now: SystemTime,
        time: Duration,
    ) -> Result<(), StoreError> {
        let mut state = self.state();
        let id = record.id();
        let until = unix_ms(now).saturating_add(millis(time));
        if time.is_zero() || state.leases.get(&id).is_some_and(|lease| *lease >= until) {
            return Ok(());
        }
        self.set_lease(&mut state, id, now, time).map(drop)
    }

    fn set_lease(
        &self,
        state: &mut State,
        id: Digest,
        now: SystemTime,
        time: Duration,
    ) -> Result<Option<u64>, StoreError> {
        let until = unix_ms(now).saturating_add(millis(time));
        let until = (!time.is_zero()).then_some(until);
        let mut leases = state.leases.clone();
        leases.retain(|_, until| *until > unix_ms(now));
        match until {
            Some(until) => drop(leases.insert(id, until)),
            None => drop(leases.remove(&id)),
        }
        self.write_leases(&leases)?;
        state.leases = leases;
        Ok(until)
    }

    /// When the lease of an image ends, if it has one that has not.
    pub fn leased_until(&self, record: &ImageRecord, now: SystemTime) -> Option<u64> {
        let leases = &self.state().leases;
        leases
            .get(&record.id())
            .copied()
            .filter(|until| *until > unix_ms(now))
    }

    /// Removes the images that nobody needs, then the blobs that no image needs; with `dry_run`, only says which.
    ///
    /// `in_use` tells the images of pods by [`ImageRecord::erofs_digest`]. It is asked while no image can be
    /// found or made, so that none slips through.
    pub fn collect(
        &self,
        in_use: impl FnOnce() -> Vec<Digest>,
        now: SystemTime,
        dry_run: bool,
    ) -> Result<Garbage, StoreError> {
        let mut state = self.state();
        // Holds before pods: who lets go of a hold has registered the pod.
        let held: BTreeSet<Digest> = state
            .images
            .values()
            .map(|record| record.erofs_digest)
            .filter(|digest| self.holds().has(digest))
            .collect();
        let used = in_use();
        let doomed: Vec<Digest> = state
            .images
            .iter()
            .filter(|(id, record)| {
                let leased = state
                    .leases
                    .get(id)
                    .is_some_and(|until| *until > unix_ms(now));
                let digest = &record.erofs_digest;
                !leased && !held.contains(digest) && !used.contains(digest)
            })
            .map(|(id, _)| *id)
            .collect();
        let images = doomed.iter().filter_map(|id| named(&state, id)).collect();
        let chunks = unshared(&state, &doomed).into_iter();
        let here = chunks.filter(|(digest, _)| self.chunks().has(digest));
        let chunk_bytes = here.map(|(_, len)| len).sum();
        if !dry_run {
            self.remove_all(&mut state, &doomed)?;
            let cleared = self.chunks().clear_bad();
            cleared.map_err(io_error("clear", self.chunks().root()))?;
        }
        drop(state);
        let needed = self.needed_blobs(&doomed);
        let blobs = match dry_run {
            true => self.content().unneeded(&needed, now)?,
            false => self.content().clear(&needed, now)?,
        };
        Ok(Garbage {
            images,
            chunk_bytes,
            blobs,
        })
    }

    pub(super) fn remove_all(
        &self,
        state: &mut State,
        doomed: &[Digest],
    ) -> Result<(), StoreError> {
        if doomed.is_empty() {
            return Ok(());
        }
        let mut names = state.names.clone();
        names.retain(|_, id| !doomed.contains(id));
        self.write_names(&names)?;
        state.names = names;
        // The files go when it is dropped.
        let scratch = self.scratch()?;
        for id in doomed {
            let folder = self.folder(*id);
            fs::rename(&folder, scratch.path().join(id.hex()))
                .map_err(io_error("remove", &folder))?;
        }
        self.sync_root()?;
        self.drop_images(state, doomed);
        Ok(())
    }
}

/// The image under its first name.
fn named(state: &State, id: &Digest) -> Option<ImageRecord> {
    let record = ImageRecord::clone(state.images.get(id)?);
    let name = state.names.iter().find(|(_, named)| *named == id);
    Some(match name {
        Some((name, _)) => ImageRecord {
            name: name.clone(),
            ..record
        },
        None => record,
    })
}
