//! The source's half: one task a data connection reads pages and writes frames.

use std::io;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use tokio::io::AsyncWrite;
use tokio::sync::{mpsc, oneshot};
use vm_runtime::memory::{GuestMemory, PageReader};
use vm_runtime::units::{PageIndex, PageRange};

use super::pace::Pace;
use super::postcopy::PushQueue;
use super::shard;
use crate::wire::batch::Batch;
use crate::wire::bulk::Data;
use crate::wire::conn::{LinkError, Writer};

/// Bytes that are gathered before they are written. What was copied is still in the processor's cache when it is encrypted.
const BATCH: usize = 256 << 10;

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
}

impl std::ops::AddAssign for Sent {
    fn add_assign(&mut self, other: Self) {
        self.pages += other.pages;
        self.zero_pages += other.zero_pages;
        self.bytes += other.bytes;
    }
}

/// Sends pages over all data connections, each page always over the same one.
#[derive(Debug)]
pub struct PageSender {
    lanes: Vec<mpsc::Sender<Job>>,
    reader: Arc<PageReader>,
    bytes: Arc<AtomicU64>,
    pace: Arc<Pace>,
}

#[derive(Debug)]
enum Job {
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
    ) -> Self
    where
        W: AsyncWrite + Unpin + Send + 'static,
    {
        let reader = Arc::new(PageReader::new(memory));
        let bytes = Arc::new(AtomicU64::new(0));
        let pace = Arc::new(Pace::new(limit));
        let lanes = writers
            .into_iter()
            .map(|writer| {
                let (jobs, queue) = mpsc::channel(4);
                let lane = Lane {
                    reader: Arc::clone(&reader),
                    writer,
                    batch: Batch::new(),
                    bytes: Arc::clone(&bytes),
                    pace: Arc::clone(&pace),
                };
                tokio::spawn(lane.run(queue));
                jobs
            })
            .collect();
        Self {
            lanes,
            reader,
            bytes,
            pace,
        }
    }

    /// From now on the limit holds no more: the guest stands still, and every millisecond is its downtime.
    pub fn lift_limit(&self) {
        self.pace.lift();
    }

    /// What it reads pages with: mapped, once the first pass is over, as far as the guest's memory holds data.
    pub fn reader(&self) -> &Arc<PageReader> {
        &self.reader
    }

    /// Frame bytes written since the start, for progress.
    pub fn bytes_sent(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
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
}

struct Lane<W> {
    reader: Arc<PageReader>,
    writer: Writer<Data, W>,
    batch: Batch,
    bytes: Arc<AtomicU64>,
    pace: Arc<Pace>,
}

impl<W: AsyncWrite + Unpin> Lane<W> {
    async fn run(mut self, mut queue: mpsc::Receiver<Job>) {
        while let Some(job) = queue.recv().await {
            let (result, done) = match job {
                Job::Round {
                    round,
                    pieces,
                    skip_zeros,
                    done,
                } => (self.round(round, &pieces, skip_zeros).await, done),
                Job::Push { queue, done } => (self.push(&queue).await, done),
                Job::Chunk { digest, raw, done } => (self.chunk(digest, raw).await, done),
            };
            let failed = result.is_err();
            // The asker may have given up; the connection's state is what counts.
            let _ = done.send(result);
            if failed {
                return;
            }
        }
        let _ = self.writer.close().await;
    }

    async fn round(
        &mut self,
        round: u32,
        pieces: &[PageRange],
        skip_zeros: bool,
    ) -> Result<Sent, SendError> {
        let mut sent = Sent::default();
        for piece in pieces {
            if skip_zeros {
                // The first pass reads every page that holds data: later rounds then find it mapped.
                self.reader.prepare(*piece);
            }
            self.piece(*piece, skip_zeros, &mut sent).await?;
        }
        self.batch.push(&Data::Barrier { round });
        self.write(&mut sent).await?;
        Ok(sent)
    }

    async fn push(&mut self, queue: &PushQueue) -> Result<Sent, SendError> {
        let mut sent = Sent::default();
        while let Some(piece) = queue.next() {
            self.piece(piece, false, &mut sent).await?;
            self.write(&mut sent).await?;
        }
        Ok(sent)
    }

    async fn chunk(&mut self, digest: [u8; 32], raw: Bytes) -> Result<Sent, SendError> {
        self.writer.send(&Data::Chunk { digest, raw }).await?;
        Ok(Sent::default())
    }

    /// Appends the pages of one piece to the batch, and writes it whenever it is full.
    async fn piece(
        &mut self,
        piece: PageRange,
        skip_zeros: bool,
        sent: &mut Sent,
    ) -> Result<(), SendError> {
        let reader = Arc::clone(&self.reader);
        let mut zeros = ZeroRun::default();
        for page in (piece.start.0..piece.end.0).map(PageIndex) {
            let kept = self
                .batch
                .page(page, |content| reader.copy(page, content).map(|zero| !zero))?;
            if kept {
                sent.pages += 1;
            } else if !skip_zeros {
                sent.pages += 1;
                sent.zero_pages += 1;
                zeros.add(page, &mut self.batch);
            }
            if self.batch.len() >= BATCH {
                self.write(sent).await?;
            }
        }
        zeros.end(&mut self.batch);
        Ok(())
    }

    async fn write(&mut self, sent: &mut Sent) -> Result<(), SendError> {
        let bytes = self.batch.len() as u64;
        if bytes > 0 {
            self.pace.wait(bytes).await;
            self.writer.send_batch(&self.batch).await?;
            self.batch.clear();
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
            sent.bytes += bytes;
        }
        Ok(())
    }
}

/// Pages of zeros that follow each other, until they become one frame.
#[derive(Default)]
struct ZeroRun(Option<PageRange>);

impl ZeroRun {
    fn add(&mut self, page: PageIndex, batch: &mut Batch) {
        match &mut self.0 {
            Some(run) if run.end == page => run.end.0 += 1,
            Some(_) | None => {
                self.end(batch);
                self.0 = Some(PageRange::new(page.0, page.0 + 1));
            }
        }
    }

    fn end(&mut self, batch: &mut Batch) {
        if let Some(run) = self.0.take() {
            batch.push(&Data::Zeros {
                first: run.start,
                count: run.len(),
            });
        }
    }
}
