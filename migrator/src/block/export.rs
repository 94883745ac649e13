//! What a socket serves: a disk, or something that is only read.

use std::fmt::Debug;
use std::path::Path;
use std::sync::Arc;

use super::{Admitted, Disk, DiskError};

/// What is read, and never written.
pub trait ReadOnly: Debug + Send + Sync {
    /// What it is called in messages.
    fn path(&self) -> &Path;

    /// Its size in bytes.
    fn size(&self) -> u64;

    /// Whether these bytes can be read without waiting for anybody else.
    fn is_ready(&self, offset: u64, len: u64) -> bool;

    /// Fills `data` with the bytes from `offset` on; may wait for them.
    ///
    /// # Errors
    /// They are beyond the end, cannot be read, or nobody wants them any more ([`DiskError::Closed`]).
    fn read_at(&self, data: &mut [u8], offset: u64) -> Result<(), DiskError>;
}

/// What a socket serves.
#[derive(Clone, Debug)]
pub enum Export {
    /// A disk that is written.
    Disk(Arc<Disk>),
    /// What is only read.
    Image(Arc<dyn ReadOnly>),
}

impl From<Arc<Disk>> for Export {
    fn from(disk: Arc<Disk>) -> Self {
        Self::Disk(disk)
    }
}

impl Export {
    /// What it is called in messages.
    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Disk(disk) => disk.path(),
            Self::Image(image) => image.path(),
        }
    }

    pub(super) fn size(&self) -> u64 {
        match self {
            Self::Disk(disk) => disk.size(),
            Self::Image(image) => image.size(),
        }
    }

    pub(super) fn is_read_only(&self) -> bool {
        matches!(self, Self::Image(_))
    }

    /// Whether a read or a write does not wait for anything but the file's pages.
    pub(super) fn is_ready(&self, offset: u64, len: u64) -> bool {
        match self {
            Self::Disk(disk) => disk.is_free(),
            Self::Image(image) => image.is_ready(offset, len),
        }
    }

    /// Begins a request; only disks hold requests up.
    pub(super) fn admit(&self) -> Result<Option<Admitted<'_>>, DiskError> {
        match self {
            Self::Disk(disk) => disk.admit().map(Some),
            Self::Image(_) => Ok(None),
        }
    }

    pub(super) fn read_at(&self, data: &mut [u8], offset: u64) -> Result<(), DiskError> {
        match self {
            Self::Disk(disk) => disk.read_at(data, offset),
            Self::Image(image) => image.read_at(data, offset),
        }
    }

    /// The disk, for whoever changes it.
    pub(super) fn disk(&self) -> Result<&Disk, DiskError> {
        match self {
            Self::Disk(disk) => Ok(disk),
            Self::Image(_) => Err(DiskError::ReadOnly),
        }
    }

    /// Makes durable what was written, which in what is only read is nothing.
    pub(super) fn flush(&self) -> Result<(), DiskError> {
        match self {
            Self::Disk(disk) => disk.flush(),
            Self::Image(_) => Ok(()),
        }
    }
}
