//! A blob under way: appended to, hashed as it grows, verified at its end.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use sha2::{Digest as _, Sha256};

use super::content::{Content, ContentError};
use super::digest::Digest;
use super::store_files::io_error;

/// A blob under way. Dropped before its end, it keeps what it has.
#[derive(Debug)]
pub(crate) struct Partial {
    content: Arc<Content>,
    file: File,
    path: PathBuf,
    digest: Digest,
    size: u64,
    hash: Sha256,
    length: u64,
}

impl Partial {
    /// Opens the file at `path`, and hashes what an earlier try left in it.
    pub(super) fn begin(
        content: Arc<Content>,
        path: PathBuf,
        digest: Digest,
        size: u64,
    ) -> Result<Self, ContentError> {
        let file = File::options()
            .create(true)
            .read(true)
            .append(true)
            .open(&path)
            .map_err(io_error("open", &path))?;
        let mut partial = Self {
            content,
            file,
            path,
            digest,
            size,
            hash: Sha256::new(),
            length: 0,
        };
        if partial.length_on_disk()? > size {
            partial.restart()?;
        }
        partial.rehash()?;
        partial.reserve()?;
        Ok(partial)
    }

    /// Bytes that are here.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Whether all bytes are here.
    pub(crate) fn is_full(&self) -> bool {
        self.length == self.size
    }

    /// Adds bytes at the end.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> Result<(), ContentError> {
        if self.length + bytes.len() as u64 > self.size {
            return Err(ContentError::TooLong {
                digest: self.digest,
                size: self.size,
            });
        }
        if let Err(source) = self.file.write_all(bytes) {
            return Err(self.failed("write", source));
        }
        self.hash.update(bytes);
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Forgets what is here.
    pub(crate) fn restart(&mut self) -> Result<(), ContentError> {
        self.file
            .set_len(0)
            .map_err(io_error("truncate", &self.path))?;
        self.hash = Sha256::new();
        self.length = 0;
        self.reserve()
    }

    /// Verifies the whole and makes it a blob. One that is not what it must be is removed.
    pub(crate) fn finish(mut self) -> Result<(), ContentError> {
        let found = Digest(std::mem::take(&mut self.hash).finalize().into());
        if found != self.digest || !self.is_full() {
            self.discard();
            return Err(ContentError::Tampered {
                expected: self.digest,
                found,
            });
        }
        if let Err(source) = self.file.sync_all() {
            return Err(self.failed("write", source));
        }
        Ok(self.content.adopt(&self.path, self.digest)?)
    }

    fn discard(&self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a damaged blob");
        }
    }

    fn length_on_disk(&self) -> Result<u64, ContentError> {
        let metadata = self.file.metadata();
        Ok(metadata.map_err(io_error("read", &self.path))?.len())
    }

    /// Hashes what is there already.
    fn rehash(&mut self) -> Result<(), ContentError> {
        let mut file = File::open(&self.path).map_err(io_error("open", &self.path))?;
        let mut buffer = vec![0u8; 256 << 10];
        loop {
            match file
                .read(&mut buffer)
                .map_err(io_error("read", &self.path))?
            {
                0 => return Ok(()),
                n => {
                    self.hash.update(&buffer[..n]);
                    self.length += n as u64;
                }
            }
        }
    }

    /// Reserves the room for all of it: a full disk shows before anything is fetched.
    fn reserve(&self) -> Result<(), ContentError> {
        let Ok(size) = i64::try_from(self.size) else {
            return Err(self.failed("reserve", Errno::EFBIG.into()));
        };
        if size == 0 {
            return Ok(());
        }
        match fallocate(&self.file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, size) {
            // A file system that cannot reserve: it shows while it is written.
            Ok(()) | Err(Errno::EOPNOTSUPP) => Ok(()),
            Err(errno) => Err(self.failed("reserve", errno.into())),
        }
    }

    /// The error of a write. A full disk gets back what this blob took.
    fn failed(&self, what: &'static str, source: io::Error) -> ContentError {
        let (digest, size) = (self.digest, self.size);
        let error = self.content.failed(what, &self.path, digest, size, source);
        if matches!(error, ContentError::DiskFull { .. }) {
            self.discard();
        }
        error
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // What was reserved behind the last byte goes back. If that fails, it is reserved, not wrong.
        if !self.is_full() {
            let _ = self.file.set_len(self.length);
        }
    }
}
