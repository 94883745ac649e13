//! The source's half: what the connections are told to send. What one connection does is in [`super::lane`].

use std::io;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use tokio::io::AsyncWrite;
use tokio::sync::{mpsc, oneshot};
use vm_runtime::memory::{GuestMemory, PageReader};
use vm_runtime::units::PageRange;

use super::compress::{Choice, Compress};
use super::lane::Lane;
use super::pace::Pace;
use super::postcopy::PushQueue;
use super::shard;
use crate::wire::bulk::{Blocks, Data};
use crate::wire::conn::{LinkError, Writer};

/// Pages or chunks could not be sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The RAM file could not be read.
    #[error("the guest's RAM file could not be read")]
    Memory(#[from] io::Error),
    /// The data connection is lost.
    #[error("a data connection to the destination is lost")]
    Link(#[from] LinkError),
    /// A connection failed before; its own error was reported then.
    #[error("a data connection to the destination has ended")]
    Ended,
}

/// What a round sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Pages, zero pages included; those that the first pass skips are not.
    pub pages: u64,
    /// Of these, pages of zeros.
    pub zero_pages: u64,
    /// Bytes of frames, before TLS.
    pub bytes: u64,
    /// Bytes that compression saved: so many more would the frames have without it.
    pub saved: u64,
}

impl std::ops::AddAssign for Sent {
    fn add_assign(&mut self, other: Self) {
        self.pages += other.pages;
        self.zero_pages += other.zero_pages;
        self.bytes += other.bytes;
        self.saved += other.saved;
    }
}

/// Sends pages over all data connections, each page always over the same one.
#[derive(Debug)]
pub struct PageSender {
    lanes: Vec<mpsc::Sender<Job>>,
    shared: Arc<Shared>,
}

/// What the connections share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) reader: PageReader,
    pub(super) bytes: AtomicU64,
    /// Of disks.
    pub(super) disk_bytes: AtomicU64,
    pub(super) pace: Pace,
    pub(super) choice: Choice,
}

#[derive(Debug)]
pub(super) enum Job {
    Round {
        round: u32,
        pieces: Vec<PageRange>,
        skip_zeros: bool,
        done: oneshot::Sender<Result<Sent, SendError>>,
    },
    Chunk {
        digest: [u8; 32],
        raw: Bytes,
        done: oneshot::Sender<Result<Sent, SendError>>,
    },
    Disk {
        frames: Vec<Blocks>,
        done: oneshot::Sender<Result<Sent, SendError>>,
    },
    Push {
        queue: Arc<PushQueue>,
        done: oneshot::Sender<Result<Sent, SendError>>,
    },
}

impl PageSender {
    /// Takes the data connections. The tasks end, and close them, when this is dropped. `limit` bounds the
    /// bytes a second of all connections together, until [`Self::lift_limit`].
    pub fn start<W>(
        memory: &Arc<GuestMemory>,
        writers: Vec<Writer<Data, W>>,
        limit: Option<NonZeroU64>,
        compress: Compress,
    ) -> Self
    where
        W: AsyncWrite + Unpin + Send + 'static,
    {
        let shared = Arc::new(Shared {
            reader: PageReader::new(memory),
            bytes: AtomicU64::new(0),
            disk_bytes: AtomicU64::new(0),
            pace: Pace::new(limit),
            choice: Choice::new(compress, writers.len()),
        });
        let lanes = writers
            .into_iter()
            .map(|writer| {
                let (jobs, queue) = mpsc::channel(4);
                tokio::spawn(Lane::new(Arc::clone(&shared), writer).run(queue));
                jobs
            })
            .collect();
        Self { lanes, shared }
    }

    /// From now on the limit holds no more: the guest stands still, and every millisecond is its downtime.
    pub fn lift_limit(&self) {
        self.shared.pace.lift();
    }

    /// What it reads pages with: mapped, once the first pass is over, as far as the guest's memory holds data.
    pub fn reader(&self) -> &PageReader {
        &self.shared.reader
    }

    /// Frame bytes written since the start, for progress.
    pub fn bytes_sent(&self) -> u64 {
        self.shared.bytes.load(Ordering::Relaxed)
    }

    /// Frame bytes of disks written since the start, for progress. They are not among [`Self::bytes_sent`].
    pub fn disk_bytes_sent(&self) -> u64 {
        self.shared.disk_bytes.load(Ordering::Relaxed)
    }

    /// How many data connections there are.
    pub fn lanes(&self) -> usize {
        self.lanes.len()
    }

    /// Bytes of the pages that were sent and are not zero: what would have been sent without compression, but for headers.
    pub fn bytes_raw(&self) -> u64 {
        self.shared.choice.raw_bytes()
    }

    /// What most of these pages were compressed with.
    pub fn compressed_with(&self) -> Compress {
        self.shared.choice.mostly()
    }

    /// Sends the pages of `ranges`, and a barrier behind them on every connection. With `skip_zeros`
    /// (a first pass into a new RAM file) pages of zeros are left out.
    ///
    /// # Errors
    /// See [`SendError`]; the other connections finish their part first.
    pub async fn round(
        &self,
        round: u32,
        ranges: &[PageRange],
        skip_zeros: bool,
    ) -> Result<Sent, SendError> {
        self.shared.choice.round();
        let mut waits = Vec::with_capacity(self.lanes.len());
        for (lane, pieces) in self
            .lanes
            .iter()
            .zip(shard::split(ranges, self.lanes.len()))
        {
            let (done, wait) = oneshot::channel();
            let job = Job::Round {
                round,
                pieces,
                skip_zeros,
                done,
            };
            lane.send(job).await.map_err(|_| SendError::Ended)?;
            waits.push(wait);
        }
        let mut total = Sent::default();
        for wait in waits {
            total += wait.await.map_err(|_| SendError::Ended)??;
        }
        Ok(total)
    }

    /// Sends what the queue hands out, over all connections, until it is empty. The guest stands still: which connection carries which
    /// page, and in what order, does not matter.
    ///
    /// # Errors
    /// See [`SendError`].
    pub async fn push(&self, queue: &Arc<PushQueue>) -> Result<Sent, SendError> {
        let mut waits = Vec::with_capacity(self.lanes.len());
        for lane in &self.lanes {
            let (done, wait) = oneshot::channel();
            let queue = Arc::clone(queue);
            let job = Job::Push { queue, done };
            lane.send(job).await.map_err(|_| SendError::Ended)?;
            waits.push(wait);
        }
        let mut total = Sent::default();
        for wait in waits {
            total += wait.await.map_err(|_| SendError::Ended)??;
        }
        Ok(total)
    }

    /// Sends one chunk of an image, over the connection that `turn` picks, and waits until it is written.
    ///
    /// # Errors
    /// See [`SendError`].
    pub async fn chunk(&self, turn: usize, digest: [u8; 32], raw: Bytes) -> Result<(), SendError> {
        let (done, wait) = oneshot::channel();
        let job = Job::Chunk { digest, raw, done };
        self.lanes[turn % self.lanes.len()]
            .send(job)
            .await
            .map_err(|_| SendError::Ended)?;
        wait.await.map_err(|_| SendError::Ended)??;
        Ok(())
    }

    /// Queues frames of a disk on the connection that `turn` picks; they are written in the order of these calls. What comes back tells when.
    ///
    /// # Errors
    /// The connection failed before.
    pub async fn disk(&self, turn: usize, frames: Vec<Blocks>) -> Result<Written, SendError> {
        let (done, wait) = oneshot::channel();
        self.lanes[turn % self.lanes.len()]
            .send(Job::Disk { frames, done })
            .await
            .map_err(|_| SendError::Ended)?;
        Ok(Written(wait))
    }
}

/// Frames on their way into a connection.
#[derive(Debug)]
pub struct Written(oneshot::Receiver<Result<Sent, SendError>>);

impl Written {
    /// Until they are written: how many bytes they had.
    ///
    /// # Errors
    /// See [`SendError`].
    pub async fn bytes(self) -> Result<u64, SendError> {
        let sent = self.0.await.map_err(|_| SendError::Ended)??;
        Ok(sent.bytes)
    }
}
