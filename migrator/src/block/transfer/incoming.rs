//! The disks of a pod that comes, at the destination.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::block::{Disk, DiskError};
use crate::wire::bulk::{Blocks, Place};

/// What goes wrong at the destination.
#[derive(Debug, thiserror::Error)]
pub enum IncomingError {
    /// A file cannot be written or made durable.
    #[error("a disk of the pod cannot be written: free some space, or choose another node")]
    Disk(#[from] DiskError),
    /// Not of the offer.
    #[error(
        "the source sent content for disk {disk}, but the pod has {disks}: the peer is broken or not ours"
    )]
    NoSuchDisk {
        /// Its index.
        disk: u16,
        /// How many there are.
        disks: usize,
    },
    /// A frame that is not content, or comes when all has come.
    #[error(
        "the source sent what is no content of a disk, or after the last of it: the peer is broken or not ours"
    )]
    NotContent,
}

/// So many bytes are placed before the device begins to write them: the sync of a round waits for the rest only, and a device is kept busy by less.
const EAGER: u64 = 8 << 20;

/// The disks, whose files are being filled. No guest runs yet. Its calls block.
#[derive(Debug)]
pub struct Incoming {
    disks: Vec<Arc<Disk>>,
    /// Bytes placed since the devices began to write.
    placed: AtomicU64,
    /// All has come: from here on the disks are the guest's.
    sealed: AtomicBool,
}

impl Incoming {
    /// Empty disks, in the order of the offer.
    pub fn new(disks: Vec<Arc<Disk>>) -> Self {
        Self {
            disks,
            placed: AtomicU64::new(0),
            sealed: AtomicBool::new(false),
        }
    }

    /// Nothing more is placed: the guest is about to run.
    pub fn seal(&self) {
        self.sealed.store(true, Ordering::SeqCst);
    }

    /// Puts content in its place.
    ///
    /// # Errors
    /// It is beyond its disk, or the file system does not take it; see [`IncomingError`].
    pub fn place(&self, blocks: &Blocks) -> Result<(), IncomingError> {
        if self.sealed.load(Ordering::SeqCst) {
            return Err(IncomingError::NotContent);
        }
        match blocks {
            Blocks::Raw { at, raw } => {
                self.disk(*at)?.write_at(raw, at.offset)?;
                self.write_eagerly(raw.len() as u64);
                Ok(())
            }
            Blocks::Hole { at, len } => Ok(self.disk(*at)?.zero(at.offset, *len, false)?),
            Blocks::Packed { .. } | Blocks::Barrier { .. } => Err(IncomingError::NotContent),
        }
    }

    fn write_eagerly(&self, bytes: u64) {
        let before = self.placed.fetch_add(bytes, Ordering::Relaxed);
        if before / EAGER != (before + bytes) / EAGER {
            self.disks.iter().for_each(|disk| disk.begin_writeback());
        }
    }

    /// Makes everything durable that was placed.
    ///
    /// # Errors
    /// The device does not take it.
    pub fn sync(&self) -> Result<(), IncomingError> {
        for disk in &self.disks {
            disk.flush()?;
        }
        Ok(())
    }

    fn disk(&self, at: Place) -> Result<&Disk, IncomingError> {
        let disks = self.disks.len();
        let disk = at.disk;
        match self.disks.get(usize::from(disk)) {
            Some(found) => Ok(found),
            None => Err(IncomingError::NoSuchDisk { disk, disks }),
        }
    }
}
