//! An image that comes from another node: chunks by digest, only the missing ones, each verified.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use tempfile::TempDir;

use super::digest::Digest;
use super::record::{BadRecord, ImageRecord};
use super::store::{ImageStore, StoreError};
use super::store_files::EROFS;

/// Why an image is not taken over. Dropping the [`Incoming`] leaves nothing behind.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// What the peer says of the image contradicts itself.
    #[error("the peer's record of the image is not valid")]
    Record(#[from] BadRecord),
    /// Not enough room.
    #[error("the disk of {folder} has no room for the image's {size} bytes")]
    DiskFull {
        /// The store's folder.
        folder: PathBuf,
        /// Bytes needed.
        size: u64,
        /// The error.
        source: io::Error,
    },
    /// The file system.
    #[error("cannot {what} the incoming image")]
    Io {
        /// What was being done.
        what: &'static str,
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

/// An image under way. Chunks may be placed from several threads at once.
#[derive(Debug)]
pub struct Incoming {
    store: Arc<ImageStore>,
    record: ImageRecord,
    /// `None` if the image was here before.
    target: Option<(TempDir, File)>,
    /// Where each distinct chunk goes.
    places: HashMap<Digest, Vec<u32>>,
    state: Mutex<Present>,
}

#[derive(Debug)]
struct Present {
    chunks: Vec<bool>,
    missing: u32,
}

impl Incoming {
    /// Starts taking over the image `record` of a peer. Reserves the disk space, takes from images that are here
    /// what they have in common, and returns the chunks still missing: of chunks with equal bytes only the
    /// first, placing it fills them all.
    pub fn begin(
        store: &Arc<ImageStore>,
        record: ImageRecord,
    ) -> Result<(Self, Vec<u32>), HandoverError> {
        record.validate()?;
        let known = store.has(&record);
        let mut places: HashMap<Digest, Vec<u32>> = HashMap::new();
        for (index, digest) in (0u32..).zip(&record.chunks) {
            places.entry(*digest).or_default().push(index);
        }
        let count = record.chunks.len();
        let target = if known {
            None
        } else {
            Some(reserve(store, record.erofs_size)?)
        };
        let incoming = Self {
            store: store.clone(),
            state: Mutex::new(Present {
                chunks: vec![known; count],
                missing: if known { 0 } else { count as u32 },
            }),
            record,
            target,
            places,
        };
        if !known {
            incoming.take_local()?;
        }
        let missing = incoming.missing();
        Ok((incoming, missing))
    }

    /// The image's record.
    pub fn record(&self) -> &ImageRecord {
        &self.record
    }

    /// The chunks still missing: of chunks with equal bytes only the first.
    pub fn missing(&self) -> Vec<u32> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let first = |index: &u32| {
            let digest = &self.record.chunks[*index as usize];
            self.places[digest].first() == Some(index)
        };
        (0u32..)
            .zip(&state.chunks)
            .filter(|(_, present)| !**present)
            .map(|(index, _)| index)
            .filter(first)
            .collect()
    }

    /// Verifies chunk `index` and writes it. A chunk that is there already is left as it is.
    pub fn place(&self, index: u32, bytes: &[u8]) -> Result<(), HandoverError> {
        let expected = *self
            .record
            .chunks
            .get(index as usize)
            .ok_or_else(|| HandoverError::Unknown(index.to_string()))?;
        let found = Digest::of(bytes);
        if found != expected || !self.fits(&expected, bytes) {
            return Err(HandoverError::Damaged {
                index,
                found,
                expected,
            });
        }
        self.write(expected, bytes)
    }

    /// [`Incoming::place`] for a chunk known by its digest.
    pub fn place_digest(&self, digest: &Digest, bytes: &[u8]) -> Result<(), HandoverError> {
        let index = self.places.get(digest).and_then(|places| places.first());
        let index = index.ok_or_else(|| HandoverError::Unknown(digest.to_string()))?;
        self.place(*index, bytes)
    }

    /// Makes the image one of the store's, durably. It gets its name unless another image here has it.
    pub fn finish(self) -> Result<ImageRecord, HandoverError> {
        let missing = self
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .missing;
        if missing > 0 {
            return Err(HandoverError::Incomplete(missing));
        }
        let Some((scratch, file)) = self.target else {
            return Ok(self.record);
        };
        file.sync_all().map_err(|source| HandoverError::Io {
            what: "write",
            source,
        })?;
        Ok(self.store.commit(scratch, self.record, false)?.0)
    }

    /// Whether the bytes have the length of every place they go to: a record may claim that the short last
    /// chunk equals a whole one.
    fn fits(&self, digest: &Digest, bytes: &[u8]) -> bool {
        let fits = |index: &u32| self.record.chunk_len(*index) == bytes.len();
        self.places[digest].iter().all(fits)
    }

    /// Writes verified bytes to every place that has them.
    fn write(&self, digest: Digest, bytes: &[u8]) -> Result<(), HandoverError> {
        let Some((_, file)) = &self.target else {
            return Ok(());
        };
        for &index in &self.places[&digest] {
            // Two threads that write the same chunk write the same bytes.
            file.write_all_at(bytes, self.record.chunk_offset(index))
                .map_err(|source| HandoverError::Io {
                    what: "write",
                    source,
                })?;
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            if !std::mem::replace(&mut state.chunks[index as usize], true) {
                state.missing -= 1;
            }
        }
        Ok(())
    }

    /// Copies what other images of this node have in common with this one.
    fn take_local(&self) -> Result<(), HandoverError> {
        let mut taken = std::collections::HashSet::new();
        for (id, local) in self.store.snapshot() {
            for (index, digest) in (0u32..).zip(&local.chunks) {
                if !self.places.contains_key(digest) || !taken.insert(*digest) {
                    continue;
                }
                // Removed meanwhile, or damaged on the disk: the peer has it as well.
                if let Ok(bytes) = self.store.local_chunk(id, &local, index)
                    && self.fits(digest, &bytes)
                {
                    self.write(*digest, &bytes)?;
                }
            }
        }
        Ok(())
    }
}

/// A file with its blocks allocated, so that a full disk is known before anything is sent.
fn reserve(store: &ImageStore, size: u64) -> Result<(TempDir, File), HandoverError> {
    let io = |source| HandoverError::Io {
        what: "make the file of",
        source,
    };
    let scratch = store.scratch()?;
    let file = File::options()
        .create_new(true)
        .read(true)
        .write(true)
        .open(scratch.path().join(EROFS))
        .map_err(io)?;
    let length = i64::try_from(size).map_err(|e| io(io::Error::other(e)))?;
    match fallocate(&file, FallocateFlags::empty(), 0, length) {
        Ok(()) => {}
        Err(Errno::EOPNOTSUPP) => file.set_len(size).map_err(io)?,
        Err(errno @ (Errno::ENOSPC | Errno::EDQUOT)) => {
            return Err(HandoverError::DiskFull {
                folder: store.root().to_owned(),
                size,
                source: errno.into(),
            });
        }
        Err(errno) => return Err(io(errno.into())),
    }
    Ok((scratch, file))
}
