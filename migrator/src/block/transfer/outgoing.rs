//! The disks of a pod that is to move, at the source.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::watch;

use super::pieces::{cut, frames};
use crate::block::{Disk, DiskError, Extent, Generation, StaleGeneration};
use crate::wire::bulk::Blocks;

/// What goes wrong at the source.
#[derive(Debug, thiserror::Error)]
pub enum OutgoingError {
    /// A disk cannot be read.
    #[error("a disk of the pod cannot be read")]
    Disk(#[from] DiskError),
    /// Somebody else moves it.
    #[error("another migration has begun with a disk of the pod")]
    Stale(#[from] StaleGeneration),
    /// The order of things is not kept.
    #[error("a disk of the pod is not tracked")]
    NotTracked,
}

/// The disks, which the guest writes to meanwhile. All but the waits block: call them where that is allowed.
#[derive(Clone, Debug)]
pub struct Outgoing {
    disks: Arc<[Arc<Disk>]>,
    state: Arc<Mutex<State>>,
    /// The highest round that the destination has acknowledged.
    acked: Arc<watch::Sender<u32>>,
}

#[derive(Debug, Default)]
struct State {
    /// Of each disk; empty before tracking.
    generations: Vec<Generation>,
    /// Of the last round.
    round: u32,
}

/// A piece to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    disk: u16,
    extent: Extent,
    /// The destination has holes there.
    has_holes: bool,
}

/// What one round sends.
#[derive(Debug)]
pub struct Turn {
    /// From 1.
    pub round: u32,
    /// Its pieces, in order of disk and place.
    pub pieces: Vec<Piece>,
}

impl Turn {
    /// Bytes of disks in it.
    pub fn bytes(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.extent.len).sum()
    }
}

impl Outgoing {
    /// The disks in the order of the offer.
    pub fn new(disks: Vec<Arc<Disk>>) -> Self {
        Self {
            disks: disks.into(),
            state: Arc::default(),
            acked: Arc::new(watch::Sender::new(0)),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.disks.is_empty()
    }

    /// How many there are.
    pub fn count(&self) -> u32 {
        self.disks.len() as u32
    }

    /// Their size in bytes.
    pub fn size(&self) -> u64 {
        self.disks.iter().map(|disk| disk.size()).sum()
    }

    /// Notes from here on what is written.
    pub fn start(&self) {
        self.lock().generations = self
            .disks
            .iter()
            .map(|disk| disk.start_tracking())
            .collect();
    }

    /// The next round: the first is what is allocated, each other what was written since the one before was taken.
    ///
    /// # Errors
    /// [`Self::start`] has not been called, or by somebody else since; or the file system does not tell.
    pub fn turn(&self) -> Result<Turn, OutgoingError> {
        let mut state = self.lock();
        if state.generations.len() != self.disks.len() {
            return Err(OutgoingError::NotTracked);
        }
        let has_holes = state.round == 0;
        let mut pieces = Vec::new();
        for ((index, disk), generation) in (0u16..).zip(self.disks.iter()).zip(&state.generations) {
            let extents = match has_holes {
                // What is written from here on is marked.
                true => disk.allocated()?,
                false => disk.take_dirty(*generation)?,
            };
            let cut = cut(&extents, disk.size());
            pieces.extend(cut.into_iter().map(|extent| Piece {
                disk: index,
                extent,
                has_holes,
            }));
        }
        state.round += 1;
        let round = state.round;
        Ok(Turn { round, pieces })
    }

    /// Reads a piece.
    ///
    /// # Errors
    /// A read error.
    pub fn read(&self, piece: Piece) -> Result<Vec<Blocks>, OutgoingError> {
        let Piece {
            disk,
            extent,
            has_holes,
        } = piece;
        let Some(file) = self.disks.get(usize::from(disk)) else {
            return Ok(Vec::new());
        };
        let mut raw = vec![0; extent.len as usize];
        file.read_at(&mut raw, extent.offset)?;
        Ok(frames(disk, extent.offset, &Bytes::from(raw), has_holes))
    }

    /// Bytes that the next round would have.
    pub fn left(&self) -> u64 {
        self.disks.iter().map(|disk| disk.dirty_bytes()).sum()
    }

    /// Has the guest's writes wait while more than so many bytes are left, of all disks together; `None`: no longer.
    pub fn limit(&self, bytes: Option<u64>) {
        Disk::limit_dirty(&self.disks, bytes);
    }

    /// Makes durable what was written here: the less is left to it when QEMU flushes its disks in the freeze.
    ///
    /// # Errors
    /// The device does not take it.
    pub fn flush(&self) -> Result<(), OutgoingError> {
        for disk in self.disks.iter() {
            disk.flush()?;
        }
        Ok(())
    }

    /// The destination has acknowledged a round.
    pub fn acknowledge(&self, round: u32) {
        self.acked.send_if_modified(|acked| {
            let newer = round > *acked;
            *acked = round.max(*acked);
            newer
        });
    }

    /// Until a round is acknowledged.
    pub async fn acknowledged(&self, round: u32) {
        // Its sender is here.
        let _ = self
            .acked
            .subscribe()
            .wait_for(|acked| *acked >= round)
            .await;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The generations are replaced as one, and the round is a number.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
