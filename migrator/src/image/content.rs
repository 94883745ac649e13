//! Blobs of images as registries have them: those that a pull fetches, and those that are kept for a push.
//!
//! ```text
//! images/content/blobs/<hex>     complete and verified
//! images/content/partial/<hex>   as far as it came; verified when complete
//! ```
//!
//! A partial blob outlives a break and a restart: the next pull goes on behind its last byte. What a crash made of
//! it does not matter, because all of it is hashed before it becomes a blob.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use super::digest::{Digest, HashingReader};
use super::partial::Partial;
use super::store_files::{StoreError, TMP, io_error, sync_folder};

/// The content's folder in the store.
pub(super) const CONTENT: &str = "content";

const BLOBS: &str = "blobs";
const PARTIAL: &str = "partial";

/// How old a partial blob must be before it is cleared away: until then somebody may go on with it.
pub(super) const PARTIAL_KEPT: Duration = Duration::from_secs(24 * 3600);

/// Why a blob is not complete.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// Its bytes are others than its digest says.
    #[error("blob {expected} is not what it must be: its bytes hash to {found}")]
    Tampered {
        /// As asked for.
        expected: Digest,
        /// As computed.
        found: Digest,
    },
    /// More bytes than its size says.
    #[error("blob {digest} is longer than the {size} bytes that its manifest says")]
    TooLong {
        /// The blob.
        digest: Digest,
        /// As in the manifest.
        size: u64,
    },
    /// No room.
    #[error("the disk of {folder} has no room for the {size} bytes of blob {digest}")]
    DiskFull {
        /// The content's folder.
        folder: PathBuf,
        /// The blob.
        digest: Digest,
        /// Its size.
        size: u64,
        /// The error.
        source: io::Error,
    },
    /// The file system.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The blobs of a store.
#[derive(Debug)]
pub(crate) struct Content {
    root: PathBuf,
    /// Where files are made that nobody goes on with.
    scratch: PathBuf,
    users: Mutex<HashMap<Digest, usize>>,
}

/// Keeps blobs from being cleared away until it is dropped.
#[derive(Debug)]
pub(crate) struct InUse {
    content: Arc<Content>,
    digests: Vec<Digest>,
}

impl Drop for InUse {
    fn drop(&mut self) {
        let mut users = self.content.users();
        for digest in &self.digests {
            if let Some(count) = users.get_mut(digest) {
                *count -= 1;
                if *count == 0 {
                    users.remove(digest);
                }
            }
        }
    }
}

impl Content {
    /// Opens the content below the store's folder.
    pub(super) fn open(store: &Path) -> Result<Self, StoreError> {
        let root = store.join(CONTENT);
        for folder in [BLOBS, PARTIAL].map(|name| root.join(name)) {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&folder)
                .map_err(io_error("make", &folder))?;
        }
        Ok(Self {
            root,
            scratch: store.to_owned(),
            users: Mutex::default(),
        })
    }

    fn users(&self) -> MutexGuard<'_, HashMap<Digest, usize>> {
        // Counters, each changed at once: a panic leaves them whole.
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that these blobs are needed.
    pub(crate) fn hold(self: &Arc<Self>, digests: impl IntoIterator<Item = Digest>) -> InUse {
        let digests: Vec<Digest> = digests.into_iter().collect();
        let mut users = self.users();
        for digest in &digests {
            *users.entry(*digest).or_default() += 1;
        }
        drop(users);
        InUse {
            content: Arc::clone(self),
            digests,
        }
    }

    /// Where a blob is, or would be.
    pub(crate) fn path(&self, digest: Digest) -> PathBuf {
        self.root.join(BLOBS).join(digest.hex())
    }

    /// Whether the blob is here in full.
    pub(crate) fn has(&self, digest: Digest) -> bool {
        self.path(digest).is_file()
    }

    /// Reads a blob of at most `limit` bytes and verifies it.
    pub(crate) fn read(&self, digest: Digest, limit: u64) -> Result<Vec<u8>, ContentError> {
        let path = self.path(digest);
        let mut bytes = Vec::new();
        File::open(&path)
            .and_then(|file| file.take(limit + 1).read_to_end(&mut bytes))
            .map_err(io_error("read", &path))?;
        if bytes.len() as u64 > limit {
            return Err(ContentError::TooLong {
                digest,
                size: limit,
            });
        }
        match Digest::of(&bytes) {
            found if found == digest => Ok(bytes),
            found => Err(ContentError::Tampered {
                expected: digest,
                found,
            }),
        }
    }

    /// Stores a blob that comes from this machine. Unlike a partial one, several may do so at a time.
    pub(crate) fn put(
        &self,
        digest: Digest,
        size: u64,
        from: impl Read,
    ) -> Result<(), ContentError> {
        if self.has(digest) {
            return Ok(());
        }
        let target = self.path(digest);
        let failed = |source: io::Error| self.failed("write", &target, digest, size, source);
        let mut file = tempfile::Builder::new()
            .prefix(TMP)
            .tempfile_in(&self.scratch)
            .map_err(failed)?;
        let mut from = HashingReader::new(from.take(size.saturating_add(1)));
        io::copy(&mut from, &mut file).map_err(failed)?;
        let (found, length) = from.finish();
        if length > size {
            return Err(ContentError::TooLong { digest, size });
        }
        if found != digest {
            return Err(ContentError::Tampered {
                expected: digest,
                found,
            });
        }
        file.as_file().sync_all().map_err(failed)?;
        file.persist(&target).map_err(|error| failed(error.error))?;
        Ok(sync_folder(&self.root.join(BLOBS))?)
    }

    /// Takes over the file of a blob that is complete and verified.
    pub(super) fn adopt(&self, from: &Path, digest: Digest) -> Result<(), StoreError> {
        let target = self.path(digest);
        fs::rename(from, &target).map_err(io_error("make", &target))?;
        sync_folder(&self.root.join(BLOBS))
    }

    /// The error of a write.
    pub(super) fn failed(
        &self,
        what: &'static str,
        path: &Path,
        digest: Digest,
        size: u64,
        source: io::Error,
    ) -> ContentError {
        let full = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded];
        if full.contains(&source.kind()) {
            return ContentError::DiskFull {
                folder: self.root.clone(),
                digest,
                size,
                source,
            };
        }
        io_error(what, path)(source).into()
    }

    /// Begins a blob, or goes on with what is there of it.
    pub(crate) fn begin(
        self: &Arc<Self>,
        digest: Digest,
        size: u64,
    ) -> Result<Partial, ContentError> {
        let path = self.root.join(PARTIAL).join(digest.hex());
        Partial::begin(Arc::clone(self), path, digest, size)
    }

    /// Blobs that are neither `needed` nor in use, and partial blobs that nobody went on with: names for a listing, sizes,
    /// and paths.
    pub(super) fn unneeded(
        &self,
        needed: &BTreeSet<Digest>,
        now: SystemTime,
    ) -> Result<Vec<(Digest, u64)>, StoreError> {
        let mut found = Vec::new();
        self.walk(needed, now, |digest, size, _| {
            found.push((digest, size));
            Ok(())
        })?;
        Ok(found)
    }

    /// Removes what [`Content::unneeded`] lists.
    pub(super) fn clear(
        &self,
        needed: &BTreeSet<Digest>,
        now: SystemTime,
    ) -> Result<Vec<(Digest, u64)>, StoreError> {
        let mut removed = Vec::new();
        self.walk(needed, now, |digest, size, path| {
            match fs::remove_file(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                result => result.map_err(io_error("remove", path))?,
            }
            removed.push((digest, size));
            Ok(())
        })?;
        Ok(removed)
    }

    fn walk(
        &self,
        needed: &BTreeSet<Digest>,
        now: SystemTime,
        mut each: impl FnMut(Digest, u64, &Path) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        for folder in [BLOBS, PARTIAL] {
            let path = self.root.join(folder);
            for entry in fs::read_dir(&path).map_err(io_error("read", &path))? {
                let entry = entry.map_err(io_error("read", &path))?;
                let path = entry.path();
                let name = entry.file_name();
                let Some(digest) = name.to_str().and_then(|name| Digest::from_hex(name).ok())
                else {
                    continue;
                };
                let Ok(metadata) = entry.metadata() else {
                    // A pull has just finished it.
                    continue;
                };
                if folder == PARTIAL {
                    let age = metadata
                        .modified()
                        .ok()
                        .and_then(|at| now.duration_since(at).ok());
                    if age.is_none_or(|age| age < PARTIAL_KEPT) {
                        continue;
                    }
                }
                // Held while it is removed: a pull that wants the blob waits, and then misses it.
                let users = self.users();
                if users.contains_key(&digest) || (folder == BLOBS && needed.contains(&digest)) {
                    continue;
                }
                each(digest, metadata.len(), &path)?;
            }
        }
        Ok(())
    }

    /// Removes blobs that only a pull needed which has ended.
    pub(crate) fn release(&self, digests: &[Digest]) -> Result<(), StoreError> {
        for digest in digests {
            let users = self.users();
            if users.contains_key(digest) {
                continue;
            }
            let path = self.path(*digest);
            match fs::remove_file(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => result.map_err(io_error("remove", &path))?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
