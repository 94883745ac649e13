//! What goes wrong with a disk.

use std::io;
use std::path::PathBuf;

use vm_runtime::units::Bytes;

use super::granule::{GRANULE, MAX_SIZE};

/// Why a disk cannot be made, opened or used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file cannot be made, opened or asked.
    #[error("cannot {verb} the disk {}", path.display())]
    File {
        /// What was tried.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The size is none that a disk can have.
    #[error(
        "a disk of {size} bytes: give it 1 MiB to {}, in steps of {} KiB", Bytes(MAX_SIZE), GRANULE >> 10
    )]
    Size {
        /// Bytes.
        size: u64,
    },
    /// Beyond the disk's end.
    #[error("{len} bytes at {offset} are beyond the end of a disk of {size} bytes")]
    Range {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
        /// The disk's size.
        size: u64,
    },
    /// The file refused.
    #[error("cannot {verb} {len} bytes at {offset} of the disk")]
    Io {
        /// What was tried.
        verb: &'static str,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
        /// Why not.
        source: io::Error,
    },
    /// It is not there to be written.
    #[error("an image is only read")]
    ReadOnly,
    /// The disk was closed: it is served no more here.
    #[error("the disk is closed")]
    Closed,
    /// Another node writes to it as yet.
    #[error("the disk is another node's as yet")]
    NotHere,
    /// Requests did not end in time.
    #[error("{under_way} requests to the disk did not end in time")]
    Busy {
        /// How many are left.
        under_way: u64,
    },
}

impl DiskError {
    /// The kernel's error number, where there is one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::File { source, .. } | Self::Io { source, .. } => source.raw_os_error(),
            Self::Size { .. }
            | Self::Range { .. }
            | Self::ReadOnly
            | Self::Closed
            | Self::NotHere
            | Self::Busy { .. } => None,
        }
    }

    /// Whether the file system that the disk is on is full.
    pub fn is_full(&self) -> bool {
        matches!(self.errno(), Some(libc::ENOSPC | libc::EDQUOT))
    }
}
