//! An image that comes from another node: chunks by digest, only the missing ones, each verified.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use nix::errno::Errno;
use nix::sys::statvfs::statvfs;

use super::chunks::{Pin, Supplied};
use super::digest::Digest;
use super::record::{BadRecord, ImageRecord};
use super::store::{ImageStore, StoreError};

/// Why an image is not taken over. Dropping the [`Incoming`] leaves nothing behind.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// What the peer says of the image contradicts itself.
    #[error("the peer's record of the image is not valid")]
    Record(#[from] BadRecord),
    /// Not enough room.
    #[error("the disk of {folder} has no room for {size} more bytes of the image")]
    DiskFull {
        /// The store's folder.
        folder: PathBuf,
        /// Bytes needed.
        size: u64,
        /// The error.
        source: io::Error,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A chunk that the image does not have.
    #[error("the peer sent a chunk ({0}) that the image does not have")]
    Unknown(String),
    /// A chunk whose bytes are not those of its digest.
    #[error("chunk {index} from the peer is damaged: it hashes to {found}, not {expected}")]
    Damaged {
        /// Which chunk.
        index: u32,
        /// As computed.
        found: Digest,
        /// As the record says.
        expected: Digest,
    },
    /// Finished too early.
    #[error("{0} chunks of the image have not arrived")]
    Incomplete(u32),
}

/// An image under way, of which all is to come before it is used. Chunks may be placed from several threads at once.
#[derive(Debug)]
pub struct Incoming {
    store: Arc<ImageStore>,
    record: ImageRecord,
    /// Where each distinct chunk goes.
    places: HashMap<Digest, u32>,
    /// Until the image is the store's.
    pin: Option<Pin>,
}

impl Incoming {
    /// Starts taking over the image `record` of a peer. Looks whether there is room, and returns the chunks that no image here has: of chunks with
    /// equal bytes only the first.
    pub fn begin(
        store: &Arc<ImageStore>,
        record: ImageRecord,
    ) -> Result<(Self, Vec<u32>), HandoverError> {
        record.validate()?;
        let mut places: HashMap<Digest, u32> = HashMap::new();
        for (index, digest) in (0u32..).zip(&record.chunks) {
            places.entry(*digest).or_insert(index);
        }
        let pin = store.chunks().pin(places.keys().copied().collect());
        store.check_lengths(&record)?;
        let incoming = Self {
            store: Arc::clone(store),
            record,
            places,
            pin: Some(pin),
        };
        let missing = incoming.missing();
        let lengths = missing
            .iter()
            .map(|index| incoming.record.chunk_len(*index) as u64);
        let needed = lengths.sum();
        if room(store.root()) < needed {
            return Err(incoming.disk_full(needed, Errno::ENOSPC.into()));
        }
        Ok((incoming, missing))
    }

    /// The image's record.
    pub fn record(&self) -> &ImageRecord {
        &self.record
    }

    /// The chunks still missing: of chunks with equal bytes only the first.
    pub fn missing(&self) -> Vec<u32> {
        let missing = self.store.chunks().missing(&self.record).into_iter();
        missing
            .filter(|index| self.places[&self.record.chunks[*index as usize]] == *index)
            .collect()
    }

    /// [`Incoming::missing`], by digest.
    pub fn missing_digests(&self) -> Vec<Digest> {
        let missing = self.missing().into_iter();
        missing
            .map(|index| self.record.chunks[index as usize])
            .collect()
    }

    /// Whether the chunk is one of the image.
    pub fn has(&self, digest: &Digest) -> bool {
        self.places.contains_key(digest)
    }

    /// Verifies chunk `index` and stores it. A chunk that is there already is left as it is.
    pub fn place(&self, index: u32, bytes: &Bytes) -> Result<(), HandoverError> {
        let expected = *self
            .record
            .chunks
            .get(index as usize)
            .ok_or_else(|| HandoverError::Unknown(index.to_string()))?;
        match self.store.chunks().supply(&self.record, index, bytes) {
            Supplied::Kept => Ok(()),
            Supplied::Wrong { found, .. } => Err(HandoverError::Damaged {
                index,
                found,
                expected,
            }),
            Supplied::Passed(error) if error.is_full() => {
                Err(self.disk_full(bytes.len() as u64, error.source))
            }
            Supplied::Passed(error) => Err(StoreError::from(error).into()),
        }
    }

    /// [`Incoming::place`] for a chunk known by its digest.
    pub fn place_digest(&self, digest: &Digest, bytes: &Bytes) -> Result<(), HandoverError> {
        let index = self.places.get(digest);
        let index = index.ok_or_else(|| HandoverError::Unknown(digest.to_string()))?;
        self.place(*index, bytes)
    }

    /// Makes the image one of the store's, durably. It gets its name unless another image here has it.
    pub fn finish(mut self) -> Result<ImageRecord, HandoverError> {
        let missing = self.store.chunks().missing(&self.record).len();
        if missing > 0 {
            return Err(HandoverError::Incomplete(missing as u32));
        }
        if !self.store.has(&self.record) {
            self.store.chunks().sync().map_err(StoreError::from)?;
            let scratch = self.store.scratch()?;
            self.store.commit(scratch, self.record.clone(), false)?;
        }
        self.pin = None;
        Ok(self.record.clone())
    }

    fn disk_full(&self, size: u64, source: io::Error) -> HandoverError {
        HandoverError::DiskFull {
            folder: self.store.root().to_owned(),
            size,
            source,
        }
    }
}

impl Drop for Incoming {
    /// What came for an image that does not become the store's goes again.
    fn drop(&mut self) {
        if let Some(pin) = self.pin.take() {
            drop(pin);
            self.store.sweep(&self.places.keys().copied().collect());
        }
    }
}

/// Refuses an image of which `missing` bytes are to follow its pod, where they and `spare` bytes for others have no room.
///
/// # Errors
/// [`HandoverError::DiskFull`].
pub fn check_room(store: &ImageStore, missing: u64, spare: u64) -> Result<(), HandoverError> {
    if missing == 0 || room(store.root()) >= missing.saturating_add(spare) {
        return Ok(());
    }
    Err(HandoverError::DiskFull {
        folder: store.root().to_owned(),
        size: missing,
        source: io::Error::from(io::ErrorKind::StorageFull),
    })
}

/// Bytes that are free on the file system of `folder`; where that is not known, what comes will show.
fn room(folder: &Path) -> u64 {
    statvfs(folder).map_or(u64::MAX, |stat| {
        stat.blocks_available().saturating_mul(stat.fragment_size())
    })
}
