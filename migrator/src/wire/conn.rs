//! One connection: frames in, frames out, and a limit to how long either may stand still.

use std::io::{self, IoSlice};
use std::marker::PhantomData;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsStream;

use crate::wire::batch::Batch;
use crate::wire::bulk::Data;
use crate::wire::codec::{DecodeError, Message, encode_head};
use crate::wire::frame::{FrameError, HEADER, Lane, frame_size, take_frame};

/// A peer that has sent nothing for this long is gone: six keepalive periods.
pub const SILENCE: Duration = Duration::from_secs(3);
/// A write that makes no progress for this long fails. The receiver of pages and packets may have to wait for its disk or its guest.
pub const STALL: Duration = Duration::from_secs(10);
/// Tails up to this size are copied into one buffer with their neighbours: one write, one TLS record.
const COPY_BELOW: usize = 8 << 10;
/// Buffered bytes after which [`Writer::feed`] writes.
const FEED_UP_TO: usize = 64 << 10;
/// Least free room of the read buffer before a read.
const READ_ROOM: usize = 64 << 10;

/// The stream under a connection.
pub type Stream = TlsStream<TcpStream>;

/// The link is lost. Whatever the cause, the connection is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Reading or writing failed.
    #[error("the connection to the peer failed")]
    Io(#[from] io::Error),
    /// The peer closed the connection where no frame was under way.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer closed the connection in the middle of a frame.
    #[error("the peer closed the connection in the middle of a frame")]
    Truncated,
    /// Nothing came for too long.
    #[error("nothing came from the peer for {} ms", .0.as_millis())]
    Silent(Duration),
    /// The peer takes nothing.
    #[error("the peer took nothing for {} ms", .0.as_millis())]
    Stalled(Duration),
    /// Not our framing.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// Not our messages.
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

/// A connection whose preamble has been exchanged; it carries the messages `M`.
#[derive(Debug)]
pub struct Connection<M> {
    stream: Stream,
    messages: PhantomData<fn() -> M>,
}

impl<M: Message> Connection<M> {
    pub(crate) fn new(stream: Stream) -> Self {
        Self {
            stream,
            messages: PhantomData,
        }
    }

    /// The stream, for whoever reads and writes without the runtime. Nothing has been read from it.
    pub(crate) fn into_stream(self) -> Stream {
        self.stream
    }

    /// The two directions, which may go to two tasks.
    pub fn split(self) -> (Reader<M>, Writer<M>) {
        let (read, write) = tokio::io::split(self.stream);
        (Reader::new(read), Writer::new(write))
    }
}

/// Reads messages.
#[derive(Debug)]
pub struct Reader<M, R = ReadHalf<Stream>> {
    io: R,
    buf: BytesMut,
    silence: Option<Duration>,
    messages: PhantomData<fn() -> M>,
}

impl<M: Message, R: AsyncRead + Unpin> Reader<M, R> {
    /// Reads from `io`, and waits as long as it takes.
    pub fn new(io: R) -> Self {
        Self {
            io,
            buf: BytesMut::new(),
            silence: None,
            messages: PhantomData,
        }
    }

    /// From now on, not a byte for this long is [`LinkError::Silent`].
    pub fn set_silence(&mut self, limit: Duration) {
        self.silence = Some(limit);
    }

    /// The next message. Its bulk is a slice of the read buffer: drop it soon, so that the memory can be used again.
    ///
    /// Cancel safe: bytes already read stay in the buffer.
    ///
    /// # Errors
    ///
    /// See [`LinkError`]; [`LinkError::Closed`] is the orderly end.
    pub async fn next(&mut self) -> Result<M, LinkError> {
        loop {
            if let Some(frame) = take_frame(&mut self.buf, M::LANE)? {
                return Ok(M::decode(frame.kind, frame.payload)?);
            }
            // The length was checked by take_frame: this reserves at most one frame beyond what is there.
            let frame = frame_size(&self.buf, M::LANE)?.unwrap_or(HEADER);
            let missing = frame.saturating_sub(self.buf.len());
            self.buf.reserve(missing.max(READ_ROOM));
            if self.fill().await? == 0 {
                return Err(match self.buf.is_empty() {
                    true => LinkError::Closed,
                    false => LinkError::Truncated,
                });
            }
        }
    }

    async fn fill(&mut self) -> Result<usize, LinkError> {
        let read = self.io.read_buf(&mut self.buf);
        let read = match self.silence {
            None => read.await,
            Some(limit) => timeout(limit, read)
                .await
                .map_err(|_| LinkError::Silent(limit))?,
        };
        match read {
            Ok(n) => Ok(n),
            // A peer that died does not say goodbye; rustls reports the missing close_notify as this kind.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(0),
            Err(e) => Err(e.into()),
        }
    }
}

/// Writes messages.
#[derive(Debug)]
pub struct Writer<M, W = WriteHalf<Stream>> {
    io: W,
    staged: Vec<u8>,
    stall: Duration,
    messages: PhantomData<fn() -> M>,
}

impl<M: Message, W: AsyncWrite + Unpin> Writer<M, W> {
    /// Writes to `io`; a write that stands still fails after [`STALL`], on the control lane after [`SILENCE`].
    pub fn new(io: W) -> Self {
        Self {
            io,
            staged: Vec::new(),
            stall: match M::LANE {
                Lane::Control => SILENCE,
                Lane::Data | Lane::Urgent | Lane::Fault => STALL,
            },
            messages: PhantomData,
        }
    }

    /// Another limit for a write that makes no progress.
    pub fn set_stall(&mut self, limit: Duration) {
        self.stall = limit;
    }

    /// Writes one message and what was fed before it, down to the socket.
    ///
    /// # Errors
    ///
    /// See [`LinkError`]. The connection is of no more use then, nor after a cancelled call.
    pub async fn send(&mut self, message: &M) -> Result<(), LinkError> {
        self.feed(message).await?;
        self.flush().await
    }

    /// Takes one message; small ones wait for their neighbours until [`Writer::flush`].
    ///
    /// # Errors
    ///
    /// See [`Writer::send`].
    pub async fn feed(&mut self, message: &M) -> Result<(), LinkError> {
        encode_head(message, &mut self.staged);
        let tail = message.tail();
        if tail.len() <= COPY_BELOW {
            self.staged.extend_from_slice(tail);
            if self.staged.len() < FEED_UP_TO {
                return Ok(());
            }
            self.write_staged(&[]).await
        } else {
            self.write_staged(tail).await
        }
    }

    /// Writes what was fed, down to the socket.
    ///
    /// # Errors
    ///
    /// See [`Writer::send`].
    pub async fn flush(&mut self) -> Result<(), LinkError> {
        self.write_staged(&[]).await?;
        let flush = self.io.flush();
        timeout(self.stall, flush)
            .await
            .map_err(|_| LinkError::Stalled(self.stall))??;
        Ok(())
    }

    /// Flushes, and tells the peer that nothing follows.
    ///
    /// # Errors
    ///
    /// See [`Writer::send`].
    pub async fn close(mut self) -> Result<(), LinkError> {
        self.flush().await?;
        let shutdown = self.io.shutdown();
        timeout(self.stall, shutdown)
            .await
            .map_err(|_| LinkError::Stalled(self.stall))??;
        Ok(())
    }

    async fn write_staged(&mut self, tail: &[u8]) -> Result<(), LinkError> {
        let Self {
            io, staged, stall, ..
        } = self;
        let (mut head, mut tail) = (&staged[..], tail);
        while !(head.is_empty() && tail.is_empty()) {
            let parts = [IoSlice::new(head), IoSlice::new(tail)];
            let written = timeout(*stall, io.write_vectored(&parts))
                .await
                .map_err(|_| LinkError::Stalled(*stall))??;
            if written == 0 {
                return Err(io::Error::from(io::ErrorKind::WriteZero).into());
            }
            let of_head = written.min(head.len());
            head = &head[of_head..];
            tail = &tail[written - of_head..];
        }
        staged.clear();
        Ok(())
    }
}

impl<W: AsyncWrite + Unpin> Writer<Data, W> {
    /// Writes a batch and what was fed before it, without copying the batch, down to the socket.
    ///
    /// # Errors
    ///
    /// See [`Writer::send`].
    pub async fn send_batch(&mut self, batch: &Batch) -> Result<(), LinkError> {
        self.write_staged(batch.as_bytes()).await?;
        self.flush().await
    }
}
