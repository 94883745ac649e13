//! The chunks of a node: in memory, on the disk, or to be fetched.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::cache::Cache;
use super::files::{Chunk, ChunkError, ChunkFiles, Pin};
use super::wants::{Asked, Come, Waiting, Wants};
use crate::image::digest::Digest;
use crate::image::record::ImageRecord;

/// Verified chunks that are kept in memory, in bytes, for all pods of the node: what their guests read at the same time, and the rest of a chunk
/// whose beginning was read. Guests keep what they have read themselves.
const CACHE: usize = 64 << 20;

/// What became of a chunk that came.
#[derive(Debug)]
pub enum Supplied {
    /// It is on the disk.
    Kept,
    /// Who waited for it has it; the disk does not take it.
    Passed(ChunkError),
    /// It is not what was asked for. Nothing has been done with it.
    Wrong {
        /// The digest of what came.
        found: Digest,
        /// Its length in bytes.
        len: usize,
    },
}

/// Why a chunk is not waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoChunk {
    /// Nobody wants it any more.
    #[error("nobody wants the chunk any more")]
    Over,
    /// The image has no such chunk, or with another length than the chunk of that digest has.
    #[error(
        "chunk {index} does not fit the image: its record is wrong, remove it and pull or import it again"
    )]
    Misfit {
        /// The chunk.
        index: u32,
    },
}

/// The chunks of a node. Shared by reference or [`Arc`]; calls block.
#[derive(Debug)]
pub struct Chunks {
    files: Arc<ChunkFiles>,
    cache: Mutex<Cache>,
    wants: Wants,
    lost: UnboundedSender<Digest>,
    /// Until somebody takes it.
    losing: Mutex<Option<UnboundedReceiver<Digest>>>,
}

impl Chunks {
    /// Opens the folder of chunks.
    ///
    /// # Errors
    /// It cannot be made or read.
    pub(crate) fn open(root: PathBuf) -> Result<Self, ChunkError> {
        let (lost, losing) = unbounded_channel();
        Ok(Self {
            files: Arc::new(ChunkFiles::open(root)?),
            cache: Mutex::new(Cache::new(CACHE)),
            wants: Wants::new(),
            lost,
            losing: Mutex::new(Some(losing)),
        })
    }

    fn cache(&self) -> std::sync::MutexGuard<'_, Cache> {
        // Bounded by its own count, which is right before and after each call.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads a chunk that is here, verified: from memory, where only verified ones are, or from the disk.
    pub fn read(&self, record: &ImageRecord, index: u32) -> Chunk {
        let Some(digest) = record.chunks.get(index as usize) else {
            return Chunk::Missing;
        };
        let len = record.chunk_len(index);
        if let Some(bytes) = self.cache().get(digest) {
            return match bytes.len() == len {
                true => Chunk::Here(bytes),
                false => Chunk::Misfit,
            };
        }
        let chunk = self.read_from_disk(digest, len);
        if let Chunk::Here(bytes) = &chunk {
            self.cache().put(*digest, bytes.clone());
        }
        chunk
    }

    /// Reads a chunk of whatever length it has, verified, if it is here.
    pub fn read_known(&self, digest: &Digest) -> Option<Bytes> {
        if let Some(bytes) = self.cache().get(digest) {
            return Some(bytes);
        }
        let len = usize::try_from(self.files.len_of(digest)?).ok()?;
        match self.read_from_disk(digest, len) {
            Chunk::Here(bytes) => Some(bytes),
            Chunk::Missing | Chunk::Damaged | Chunk::Misfit => None,
        }
    }

    /// Reads a chunk from the disk, verified, and leaves the memory alone.
    pub fn read_from_disk(&self, digest: &Digest, len: usize) -> Chunk {
        let chunk = self.files.read(digest, len);
        if matches!(chunk, Chunk::Damaged) {
            // Nobody fetches where there is no service.
            let _ = self.lost.send(*digest);
        }
        chunk
    }

    /// Reads a chunk; one that is not here is asked for and waited for, until `over` says that nobody wants it any more.
    ///
    /// # Errors
    /// See [`NoChunk`].
    pub fn wait(
        &self,
        record: &Arc<ImageRecord>,
        index: u32,
        over: &dyn Fn() -> bool,
    ) -> Result<Bytes, NoChunk> {
        let digest = record.chunks.get(index as usize);
        let digest = *digest.ok_or(NoChunk::Misfit { index })?;
        loop {
            match self.read(record, index) {
                Chunk::Here(bytes) => return Ok(bytes),
                Chunk::Misfit => return Err(NoChunk::Misfit { index }),
                Chunk::Missing | Chunk::Damaged => {}
            }
            let asked = Asked {
                record: Arc::clone(record),
                index,
            };
            let here = || self.files.has(&digest) || self.cache().has(&digest);
            match self.wants.wait(&asked, here, over) {
                Some(Come::Bytes(bytes)) => return Ok(bytes),
                Some(Come::Look) => {}
                None => return Err(NoChunk::Over),
            }
        }
    }

    /// Whether a chunk is in memory or on the disk.
    pub fn has(&self, digest: &Digest) -> bool {
        self.files.has(digest)
    }

    /// The length of a chunk's file, if there is one.
    pub(in crate::image) fn len_of(&self, digest: &Digest) -> Option<u64> {
        self.files.len_of(digest)
    }

    /// Takes a chunk from elsewhere: verified here, whoever brings it.
    pub fn supply(&self, record: &ImageRecord, index: u32, bytes: &Bytes) -> Supplied {
        let len = record.chunk_len(index);
        let found = Digest::of(bytes);
        if bytes.len() != len || record.chunks.get(index as usize) != Some(&found) {
            let len = bytes.len();
            return Supplied::Wrong { found, len };
        }
        self.wants.come(&found, bytes, || {
            self.cache().put(found, bytes.clone());
        });
        match self.files.put(&found, bytes) {
            Ok(()) => Supplied::Kept,
            Err(error) => Supplied::Passed(error),
        }
    }

    /// Stores a chunk made here.
    pub(in crate::image) fn put(&self, digest: &Digest, bytes: &[u8]) -> Result<(), ChunkError> {
        self.files.put(digest, bytes)?;
        if self.wants.is_wanted(digest) {
            let bytes = Bytes::copy_from_slice(bytes);
            self.wants.come(digest, &bytes, || ());
        }
        Ok(())
    }

    /// Keeps chunks from being removed, also such as are not here yet.
    pub(in crate::image) fn pin(&self, digests: Vec<Digest>) -> Pin {
        self.files.pin(digests)
    }

    /// Indices of the chunks that are not here.
    pub fn missing(&self, record: &ImageRecord) -> Vec<u32> {
        let missing = self.files.missing(record.chunks.iter());
        let indices = (0u32..).zip(missing).filter(|(_, missing)| *missing);
        indices.map(|(index, _)| index).collect()
    }

    /// Bytes of the image that are here.
    pub fn bytes_here(&self, record: &ImageRecord) -> u64 {
        let missing = self.missing(record);
        let lacking = missing.iter().map(|index| record.chunk_len(*index) as u64);
        record.erofs_size - lacking.sum::<u64>()
    }

    /// Bytes of chunks that are not here; of chunks with equal bytes only the first counts.
    pub fn bytes_to_come(&self, record: &ImageRecord) -> u64 {
        let mut seen = HashSet::new();
        let missing = self.missing(record).into_iter();
        missing
            .filter(|index| seen.insert(record.chunks[*index as usize]))
            .map(|index| record.chunk_len(index) as u64)
            .sum()
    }

    pub(in crate::image) fn remove(&self, digests: impl IntoIterator<Item = Digest>) -> usize {
        self.files.remove(digests)
    }

    pub(in crate::image) fn keep_only(&self, needed: &HashSet<Digest>) -> usize {
        self.files.keep_only(needed)
    }

    pub(in crate::image) fn clear_bad(&self) -> io::Result<()> {
        self.files.clear_bad()
    }

    /// Makes everything that was stored durable.
    pub(crate) fn sync(&self) -> Result<(), ChunkError> {
        self.files.sync()
    }

    /// The folder of the files.
    pub fn root(&self) -> &Path {
        self.files.root()
    }

    /// What is asked for, in order, for whoever fetches; once.
    pub(crate) fn asking(&self) -> Option<UnboundedReceiver<Asked>> {
        self.wants.asking()
    }

    /// Chunks that were here and are not any more, because they were damaged, for whoever fills images; once.
    pub(crate) fn losing(&self) -> Option<UnboundedReceiver<Digest>> {
        let mut losing = self.losing.lock().unwrap_or_else(PoisonError::into_inner);
        losing.take()
    }

    pub(crate) fn is_wanted(&self, digest: &Digest) -> bool {
        self.wants.is_wanted(digest)
    }

    /// Says why a chunk that somebody waits for does not come.
    pub(crate) fn explain(&self, digest: &Digest, problem: String) {
        self.wants.explain(digest, problem);
    }

    /// The image's chunks that somebody waits for.
    pub fn waiting(&self, record: &ImageRecord) -> Vec<Waiting> {
        self.wants.waiting(|digest| record.chunks.contains(digest))
    }

    /// Has readers look whether they are still wanted.
    pub(super) fn nudge(&self) {
        self.wants.nudge();
    }
}
