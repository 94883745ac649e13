//! Chunks on the disk.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use crate::image::digest::Digest;
use crate::image::record::MAX_CHUNK_SIZE;

/// Longest chunk, in bytes.
const MAX_CHUNK: u64 = MAX_CHUNK_SIZE as u64;
/// Folder of chunks that were not what their names say, for people to look at; emptied by `image gc`.
const BAD: &str = "bad";
/// What names of files that are not complete begin with.
const TMP: &str = ".tmp-";

/// Why a chunk is not stored.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {path}")]
pub struct ChunkError {
    /// What was being done.
    pub what: &'static str,
    /// With what.
    pub path: PathBuf,
    /// The error.
    pub source: io::Error,
}

impl ChunkError {
    /// Whether the disk is full.
    pub fn is_full(&self) -> bool {
        let kinds = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded];
        kinds.contains(&self.source.kind())
    }
}

/// What was found of a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// It is here, and is what it should be.
    Here(Bytes),
    /// It is not here.
    Missing,
    /// It was not what it should be, or could not be read; it is set aside.
    Damaged,
    /// It is here, and has another length than the image says: the image's record is wrong.
    Misfit,
}

/// The files. Which are there is known without looking.
#[derive(Debug)]
pub(super) struct ChunkFiles {
    root: PathBuf,
    state: Mutex<State>,
    next: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    present: HashSet<Digest>,
    /// Chunks that must not be removed, although no image may need them yet.
    pins: HashMap<Digest, usize>,
}

/// Keeps chunks from being removed until it is dropped.
#[derive(Debug)]
pub struct Pin {
    files: Arc<ChunkFiles>,
    digests: Vec<Digest>,
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ChunkError {
    let path = path.to_owned();
    move |source| ChunkError { what, path, source }
}

impl ChunkFiles {
    /// Opens the folder, made if missing, and removes what a crash left by half.
    pub(super) fn open(root: PathBuf) -> Result<Self, ChunkError> {
        let bad = root.join(BAD);
        fs::create_dir_all(&bad).map_err(failed("make", &bad))?;
        let mut present = HashSet::new();
        for entry in fs::read_dir(&root).map_err(failed("read", &root))? {
            let path = entry.map_err(failed("read", &root))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(TMP) {
                fs::remove_file(&path).map_err(failed("remove", &path))?;
            } else if name.len() == 2 {
                for file in fs::read_dir(&path).map_err(failed("read", &path))? {
                    let name = file.map_err(failed("read", &path))?.file_name();
                    let digest = name.to_str().and_then(|name| Digest::from_hex(name).ok());
                    present.extend(digest);
                }
            }
        }
        let pins = HashMap::new();
        Ok(Self {
            root,
            state: Mutex::new(State { present, pins }),
            next: AtomicU64::new(0),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A set and counters, each changed at once: a panic leaves them whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        let hex = digest.hex();
        self.root.join(&hex[..2]).join(hex)
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn has(&self, digest: &Digest) -> bool {
        self.lock().present.contains(digest)
    }

    pub(super) fn len_of(&self, digest: &Digest) -> Option<u64> {
        let here = self.has(digest);
        let found = here.then(|| fs::metadata(self.path(digest)).ok()).flatten();
        found.map(|metadata| metadata.len())
    }

    /// Of each, whether it is missing.
    pub(super) fn missing<'a>(&self, digests: impl Iterator<Item = &'a Digest>) -> Vec<bool> {
        let state = self.lock();
        digests
            .map(|digest| !state.present.contains(digest))
            .collect()
    }

    pub(super) fn pin(self: &Arc<Self>, digests: Vec<Digest>) -> Pin {
        let mut state = self.lock();
        for digest in &digests {
            *state.pins.entry(*digest).or_default() += 1;
        }
        drop(state);
        Pin {
            files: Arc::clone(self),
            digests,
        }
    }

    /// Reads a chunk of `len` bytes and verifies it.
    pub(super) fn read(&self, digest: &Digest, len: usize) -> Chunk {
        if !self.has(digest) {
            return Chunk::Missing;
        }
        let path = self.path(digest);
        let read = || -> io::Result<Vec<u8>> {
            let file = File::open(&path)?;
            let mut bytes = Vec::with_capacity(len + 1);
            // More than a chunk may have, so that a longer file shows.
            file.take(MAX_CHUNK + 1).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let reason = match read() {
            Ok(bytes) if Digest::of(&bytes) == *digest => {
                return match bytes.len() == len {
                    true => Chunk::Here(bytes.into()),
                    false => Chunk::Misfit,
                };
            }
            Ok(_) => "its bytes are not those of its digest".to_owned(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.lock().present.remove(digest);
                "its file is gone".to_owned()
            }
            Err(error) => error.to_string(),
        };
        self.set_aside(digest, &path, &reason);
        Chunk::Damaged
    }

    fn set_aside(&self, digest: &Digest, path: &Path, reason: &str) {
        tracing::error!(
            chunk = %digest, reason,
            "a chunk of an image is damaged on this node's disk: it is set aside, and fetched again when somebody has it"
        );
        let mut state = self.lock();
        state.present.remove(digest);
        let aside = self.root.join(BAD).join(digest.hex());
        match fs::rename(path, &aside) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // Not in the set any more: it is not used again, and overwritten when it comes anew.
            Err(error) => tracing::warn!(path = %path.display(), %error, "it stays where it is"),
        }
    }

    /// Stores a chunk whose bytes have been verified. One that is here is left as it is.
    pub(super) fn put(&self, digest: &Digest, bytes: &[u8]) -> Result<(), ChunkError> {
        if self.has(digest) {
            return Ok(());
        }
        let path = self.path(digest);
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let scratch = self.root.join(format!("{TMP}{number}"));
        let folder = path.parent().unwrap_or(&self.root);
        let written = fs::create_dir_all(folder)
            .and_then(|()| File::create(&scratch)?.write_all(bytes))
            .map_err(failed("write", &scratch));
        if let Err(error) = written {
            // It may not be there.
            let _ = fs::remove_file(&scratch);
            return Err(error);
        }
        // Under the lock, so that nobody removes it between the two.
        let mut state = self.lock();
        fs::rename(&scratch, &path).map_err(failed("make", &path))?;
        state.present.insert(*digest);
        Ok(())
    }

    /// Removes chunks that no image needs, unless they are pinned; how many went.
    pub(super) fn remove(&self, digests: impl IntoIterator<Item = Digest>) -> usize {
        let mut removed = 0;
        for digest in digests {
            let mut state = self.lock();
            if state.pins.contains_key(&digest) || !state.present.remove(&digest) {
                continue;
            }
            let path = self.path(&digest);
            match fs::remove_file(&path) {
                Ok(()) => removed += 1,
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "a chunk is not removed")
                }
            }
        }
        removed
    }

    /// Removes all chunks but these.
    pub(super) fn keep_only(&self, needed: &HashSet<Digest>) -> usize {
        let here: Vec<Digest> = self.lock().present.iter().copied().collect();
        self.remove(here.into_iter().filter(|digest| !needed.contains(digest)))
    }

    /// Removes what was set aside.
    pub(super) fn clear_bad(&self) -> io::Result<()> {
        for entry in fs::read_dir(self.root.join(BAD))? {
            fs::remove_file(entry?.path())?;
        }
        Ok(())
    }

    /// Makes what was put durable.
    pub(super) fn sync(&self) -> Result<(), ChunkError> {
        // One call for thousands of files: fsync(2) of each would commit the file system's journal as often.
        File::open(&self.root)
            .and_then(|folder| Ok(nix::unistd::syncfs(folder)?))
            .map_err(failed("sync", &self.root))
    }
}

impl Pin {
    /// Keeps one more.
    pub(in crate::image) fn add(&mut self, digest: Digest) {
        *self.files.lock().pins.entry(digest).or_default() += 1;
        self.digests.push(digest);
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut state = self.files.lock();
        for digest in &self.digests {
            if let Some(count) = state.pins.get_mut(digest) {
                *count -= 1;
                if *count == 0 {
                    state.pins.remove(digest);
                }
            }
        }
    }
}
