//! The destination's half: one task a data connection places pages in the RAM file.

use std::io;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use tokio::io::AsyncRead;
use tokio::sync::mpsc;
use vm_runtime::memory::GuestMemory;
use vm_runtime::units::{PAGE_SIZE, PageIndex, PageRange};

use super::compress::{Decompressor, UnpackError};
use super::postcopy::{Pager, PagerError};
use super::verify::PageHashes;
use crate::wire::bulk::{Blocks, Data};
use crate::wire::conn::{LinkError, Reader};

/// A data connection ended, and the migration cannot go on over it.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The RAM file could not be written.
    #[error("the guest's RAM file could not be written")]
    Memory(#[source] io::Error),
    /// A page could not be put in place.
    #[error("a missing page could not be put in place")]
    Pager(#[from] PagerError),
    /// Packed pages that are not what they should be.
    #[error(transparent)]
    Unpack(#[from] UnpackError),
    /// Content of a disk could not be put in place.
    #[error("what came of the pod's disks is not in place")]
    Disk(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Content of a disk for a pod that has none.
    #[error(
        "the source sent content of a disk, and the pod has none here: the peer is broken or not ours"
    )]
    NoDisk,
    /// An answer without a question.
    #[error(
        "the source says that it lacks a chunk that nobody asked it for: the peer is broken or not ours"
    )]
    NotAsked,
    /// The data connection is lost.
    #[error("a data connection from the source is lost")]
    Link(#[from] LinkError),
    /// The source sent pages before it was told the size of the RAM, or beyond it.
    #[error("the source sent pages {first}..{end}, but the guest's RAM has {pages} pages")]
    OutOfRange {
        /// First page.
        first: u64,
        /// One past the last page.
        end: u64,
        /// Pages of the guest's RAM.
        pages: u64,
    },
}

/// What the data connections report, in each one's own order.
#[derive(Debug)]
pub enum Arrival {
    /// Everything up to this round has been placed from this connection.
    Barrier {
        /// Which connection.
        lane: usize,
        /// The round.
        round: u32,
    },
    /// Every block of a disk up to this round of disks has been placed from this connection.
    DiskBarrier {
        /// Which connection.
        lane: usize,
        /// The round of disks.
        round: u32,
    },
    /// A chunk of an image, not verified yet.
    Chunk {
        /// Claimed digest.
        digest: [u8; 32],
        /// Content.
        raw: Bytes,
    },
    /// The connection has ended. Orderly or not is for the conductor to say.
    Ended(ReceiveError),
}

/// Where content of disks goes.
pub trait BlockSink: std::fmt::Debug + Send + Sync {
    /// Puts it in place; blocks.
    ///
    /// # Errors
    /// It does not belong there, or there is no room for it.
    fn place(&self, blocks: &Blocks) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;
}

/// Where pages go, once the destination has made the RAM file.
#[derive(Debug)]
pub struct Target {
    /// The RAM file.
    pub memory: Arc<GuestMemory>,
    /// Filled beside it when the migration verifies.
    pub hashes: Option<Arc<PageHashes>>,
    /// From post-copy on pages go this way: the guest may run.
    pub pager: OnceLock<Arc<Pager>>,
    /// Where content of disks goes, if the pod has any.
    pub disks: Option<Arc<dyn BlockSink>>,
}

impl Target {
    /// A RAM file whose guest does not run yet.
    pub fn new(
        memory: Arc<GuestMemory>,
        hashes: Option<Arc<PageHashes>>,
        disks: Option<Arc<dyn BlockSink>>,
    ) -> Self {
        Self {
            memory,
            hashes,
            pager: OnceLock::new(),
            disks,
        }
    }

    /// The RAM file of a guest that lacks pages.
    pub fn paged(memory: Arc<GuestMemory>, pager: Arc<Pager>) -> Self {
        Self {
            memory,
            hashes: None,
            pager: OnceLock::from(pager),
            disks: None,
        }
    }
}

/// Starts a task a connection. `target` may be set later, but before the first page comes. The tasks end
/// with their connection, or when `arrivals` is closed.
pub fn start<R>(
    readers: Vec<Reader<Data, R>>,
    target: &Arc<std::sync::OnceLock<Target>>,
    arrivals: &mpsc::Sender<Arrival>,
) where
    R: AsyncRead + Unpin + Send + 'static,
{
    for (lane, reader) in readers.into_iter().enumerate() {
        let target = Arc::clone(target);
        let arrivals = arrivals.clone();
        tokio::spawn(async move {
            let ended = tokio::select! {
                ended = run(lane, reader, &target, &arrivals) => ended,
                () = arrivals.closed() => return,
            };
            let _ = arrivals.send(Arrival::Ended(ended)).await;
        });
    }
}

async fn run<R: AsyncRead + Unpin>(
    lane: usize,
    mut reader: Reader<Data, R>,
    target: &std::sync::OnceLock<Target>,
    arrivals: &mpsc::Sender<Arrival>,
) -> ReceiveError {
    let mut decompressor = Decompressor::default();
    loop {
        let placed = match reader.next().await {
            Err(error) => return error.into(),
            Ok(Data::Pages { first, raw }) => {
                let count = (raw.len() / PAGE_SIZE) as u64;
                place(target, first, count, Some(&raw))
            }
            Ok(Data::Packed {
                first,
                count,
                codec,
                raw,
            }) => decompressor
                .unpack(codec, count, &raw)
                .map_err(ReceiveError::from)
                .and_then(|pages| place(target, first, u64::from(count), Some(pages))),
            Ok(Data::Zeros { first, count }) => place(target, first, count, None),
            Ok(Data::Disk(Blocks::Barrier { round })) => {
                report(arrivals, Arrival::DiskBarrier { lane, round }).await
            }
            Ok(Data::Disk(blocks)) => match unpacked(&mut decompressor, blocks) {
                Ok(blocks) => place_blocks(target, blocks).await,
                Err(error) => Err(error.into()),
            },
            Ok(Data::Barrier { round }) => report(arrivals, Arrival::Barrier { lane, round }).await,
            Ok(Data::Chunk { digest, raw }) => {
                report(arrivals, Arrival::Chunk { digest, raw }).await
            }
            Ok(Data::Absent { .. }) => Err(ReceiveError::NotAsked),
        };
        if let Err(error) = placed {
            return error;
        }
    }
}

async fn report(arrivals: &mpsc::Sender<Arrival>, arrival: Arrival) -> Result<(), ReceiveError> {
    // A closed channel ends the task through the select in `start`.
    let told = arrivals.send(arrival).await;
    told.map_err(|_| LinkError::Closed.into())
}

/// As it was before it was packed.
fn unpacked(decompressor: &mut Decompressor, blocks: Blocks) -> Result<Blocks, UnpackError> {
    let Blocks::Packed {
        at,
        len,
        codec,
        raw,
    } = blocks
    else {
        return Ok(blocks);
    };
    // A block of a disk has the size of a page.
    let content = decompressor.unpack(codec, len / PAGE_SIZE as u32, &raw)?;
    let raw = Bytes::copy_from_slice(content);
    Ok(Blocks::Raw { at, raw })
}

/// A disk takes its time, in which other connections go on.
async fn place_blocks(
    target: &std::sync::OnceLock<Target>,
    blocks: Blocks,
) -> Result<(), ReceiveError> {
    let disks = target.get().and_then(|target| target.disks.clone());
    let disks = disks.ok_or(ReceiveError::NoDisk)?;
    let placed = tokio::task::spawn_blocking(move || disks.place(&blocks)).await;
    // A panic of it is one of ours, and this node's to report.
    placed
        .map_err(|panicked| ReceiveError::Disk(panicked.into()))?
        .map_err(ReceiveError::Disk)
}

/// Writes pages, or makes a hole where they are zero.
fn place(
    target: &std::sync::OnceLock<Target>,
    first: PageIndex,
    count: u64,
    raw: Option<&[u8]>,
) -> Result<(), ReceiveError> {
    let end = first.0.saturating_add(count);
    let pages = target.get().map_or(0, |target| target.memory.pages());
    let target = target
        .get()
        .filter(|_| end <= pages)
        .ok_or(ReceiveError::OutOfRange {
            first: first.0,
            end,
            pages,
        })?;
    let range = PageRange::new(first.0, end);
    if let Some(pager) = target.pager.get() {
        match raw {
            Some(raw) => pager.place(first, raw)?,
            None => pager.place_zeros(range)?,
        }
        return Ok(());
    }
    match raw {
        Some(raw) => target.memory.write(first, raw),
        None => target.memory.punch(range),
    }
    .map_err(ReceiveError::Memory)?;
    if let Some(hashes) = &target.hashes {
        hashes.mark(range);
    }
    Ok(())
}
