//! The source's half of one data connection: reads pages, and writes frames.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::Bytes;
use tokio::io::AsyncWrite;
use tokio::sync::mpsc;
use vm_runtime::units::{PAGE_SIZE, PageIndex, PageRange};

use super::compress::{Compressor, Packer};
use super::postcopy::PushQueue;
use super::send::{Job, SendError, Sent, Shared};
use crate::wire::batch::Batch;
use crate::wire::bulk::{Blocks, Codec, Data};
use crate::wire::codec;
use crate::wire::conn::Writer;

/// Bytes that are gathered before they are written. What was copied is still in the processor's cache when it is encrypted.
const BATCH: usize = 256 << 10;

/// One data connection at the source.
#[derive(Debug)]
pub(super) struct Lane<W> {
    shared: Arc<Shared>,
    writer: Writer<Data, W>,
    batch: Batch,
    packer: Packer,
    /// For disks, whose content says nothing about how pages compress.
    compressor: Compressor,
}

impl<W: AsyncWrite + Unpin> Lane<W> {
    pub(super) fn new(shared: Arc<Shared>, writer: Writer<Data, W>) -> Self {
        Self {
            shared,
            writer,
            batch: Batch::new(),
            packer: Packer::default(),
            compressor: Compressor::default(),
        }
    }

    /// Does what it is told until nobody tells it any more, or the connection fails.
    pub(super) async fn run(mut self, mut queue: mpsc::Receiver<Job>) {
        while let Some(job) = queue.recv().await {
            let (result, done) = match job {
                Job::Round {
                    round,
                    pieces,
                    skip_zeros,
                    done,
                } => (self.round(round, &pieces, skip_zeros).await, done),
                Job::Push { queue, done } => (self.push(&queue).await, done),
                Job::Disk { frames, done } => (self.disk(frames).await, done),
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
                self.shared.reader.prepare(*piece);
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

    async fn disk(&mut self, frames: Vec<Blocks>) -> Result<Sent, SendError> {
        let mut sent = Sent::default();
        for frame in frames {
            let frame = match self.shared.choice.codec() {
                Some(codec) => pack(&mut self.compressor, codec, frame),
                None => frame,
            };
            let message = Data::Disk(frame);
            let bytes = codec::size(&message) as u64;
            self.shared.pace.wait(bytes).await;
            self.writer.send(&message).await?;
            self.shared.disk_bytes.fetch_add(bytes, Ordering::Relaxed);
            sent.bytes += bytes;
        }
        Ok(sent)
    }

    /// Appends the pages of one piece to the batch, and writes it whenever it is full.
    async fn piece(
        &mut self,
        piece: PageRange,
        skip_zeros: bool,
        sent: &mut Sent,
    ) -> Result<(), SendError> {
        let shared = Arc::clone(&self.shared);
        let codec = shared.choice.codec();
        let mut zeros = ZeroRun::default();
        for page in (piece.start.0..piece.end.0).map(PageIndex) {
            let fill = |content: &mut _| shared.reader.copy(page, content).map(|zero: bool| !zero);
            let kept = match codec {
                None => self.batch.page(page, fill)?,
                Some(codec) => {
                    if self.packer.is_full_for(page) {
                        self.pack(codec, sent);
                    }
                    self.packer.page(page, fill)?
                }
            };
            if kept {
                sent.pages += 1;
                if codec.is_none() {
                    shared.choice.plain(PAGE_SIZE);
                }
            } else if !skip_zeros {
                sent.pages += 1;
                sent.zero_pages += 1;
                zeros.add(page, &mut self.batch);
            }
            if self.batch.len() >= BATCH {
                self.write(sent).await?;
            }
        }
        if let Some(codec) = codec {
            self.pack(codec, sent);
        }
        zeros.end(&mut self.batch);
        Ok(())
    }

    fn pack(&mut self, codec: Codec, sent: &mut Sent) {
        if let Some(packing) = self.packer.pack(codec, &mut self.batch) {
            sent.saved += (packing.raw - packing.packed) as u64;
            self.shared.choice.packed(&packing);
        }
    }

    async fn write(&mut self, sent: &mut Sent) -> Result<(), SendError> {
        let bytes = self.batch.len() as u64;
        if bytes == 0 {
            return Ok(());
        }
        let began = Instant::now();
        self.shared.pace.wait(bytes).await;
        self.writer.send_batch(&self.batch).await?;
        let took = began.elapsed();
        let Self { packer, batch, .. } = self;
        self.shared.choice.wrote(bytes, took, |codec| {
            let pages = batch.last_pages();
            (!pages.is_empty()).then(|| packer.sample(codec, pages))
        });
        self.batch.clear();
        self.shared.bytes.fetch_add(bytes, Ordering::Relaxed);
        sent.bytes += bytes;
        Ok(())
    }
}

/// The same content in fewer bytes, where it gets smaller.
fn pack(compressor: &mut Compressor, codec: Codec, frame: Blocks) -> Blocks {
    let Blocks::Raw { at, raw } = frame else {
        return frame;
    };
    let mut out = vec![0; Compressor::room(codec, raw.len())];
    match compressor.pack(codec, &raw, &mut out) {
        Some(packed) => {
            out.truncate(packed);
            Blocks::Packed {
                at,
                len: raw.len() as u32,
                codec,
                raw: out.into(),
            }
        }
        None => Blocks::Raw { at, raw },
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
