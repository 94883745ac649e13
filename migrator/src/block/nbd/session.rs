//! A client's requests, by as many threads as they overlap.
//!
//! One thread at a time leads: it reads a request, then hands the lead over and carries the request out itself. So a request is never
//! handed from thread to thread. If no other request has come yet, and this one cannot wait long, it keeps the lead: a client that asks
//! for one thing after the other is served by one thread without any switch.

use std::io::{self, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use nix::sys::socket::{MsgFlags, recv};

use super::codec::{Command, MAX_PAYLOAD, REPLY_LEN, REQUEST_LEN, Request, error, reply, request};
use crate::block::{Disk, DiskError};

/// Most requests of one connection at once: as many as QEMU sends (`MAX_NBD_REQUESTS` in its block/nbd.c).
const MAX_THREADS: usize = 16;
/// What a thread keeps of its buffer from one request to the next.
const KEPT: usize = 1 << 20;

/// A connection past its handshake.
#[derive(Debug)]
pub(super) struct Session {
    disk: Arc<Disk>,
    stream: UnixStream,
    /// The lead. `None` once nothing more is read.
    lead: Mutex<Option<BufReader<UnixStream>>>,
    replies: Mutex<UnixStream>,
    threads: AtomicUsize,
    /// Threads that wait for the lead.
    idle: AtomicUsize,
}

/// Why a session ends.
enum Over {
    /// The client has gone, or the connection broke.
    Gone,
    /// It broke the protocol.
    Broken(&'static str),
}

impl From<io::Error> for Over {
    fn from(_: io::Error) -> Self {
        Self::Gone
    }
}

impl Session {
    pub(super) fn new(disk: Arc<Disk>, stream: UnixStream) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            disk,
            lead: Mutex::new(Some(BufReader::with_capacity(4 << 10, stream.try_clone()?))),
            replies: Mutex::new(stream.try_clone()?),
            stream,
            threads: AtomicUsize::new(1),
            idle: AtomicUsize::new(0),
        }))
    }

    /// Serves requests until the connection ends; other threads may serve it for a moment longer.
    pub(super) fn serve(self: &Arc<Self>) {
        // The reply's header is in front of the data, so that one write sends both.
        let mut buffer = vec![0; REPLY_LEN];
        loop {
            self.idle.fetch_add(1, Ordering::Relaxed);
            let mut lead = self.lead.lock().unwrap_or_else(PoisonError::into_inner);
            self.idle.fetch_sub(1, Ordering::Relaxed);
            let Some(reader) = lead.as_mut() else { break };
            let taken = match take(reader, &mut buffer) {
                Ok(taken) => taken,
                Err(over) => {
                    *lead = None;
                    drop(lead);
                    if let Over::Broken(what) = over {
                        tracing::warn!(disk = %self.disk.path().display(), what, "a client of the disk is cut off");
                    }
                    break;
                }
            };
            let kept = (self.is_quick(&taken) && !has_more(reader)).then_some(lead);
            if kept.is_none() {
                self.have_a_follower();
            }
            let done = self.carry_out(&taken, &mut buffer);
            drop(kept);
            if done.is_err() {
                break;
            }
            buffer.truncate(KEPT);
            buffer.shrink_to(KEPT);
        }
        self.cut();
        self.threads.fetch_sub(1, Ordering::Relaxed);
    }

    /// Ends the connection; requests under way are not answered.
    pub(super) fn cut(&self) {
        // It may be cut already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Whether the request does not wait for anything but the file's pages.
    fn is_quick(&self, request: &Request) -> bool {
        matches!(
            request.command,
            Command::Read | Command::Write { fua: false }
        ) && self.disk.missing_bytes() == 0
    }

    /// Sees to it that somebody takes the lead.
    fn have_a_follower(self: &Arc<Self>) {
        // Only the leader comes here: nobody else adds threads meanwhile.
        if self.idle.load(Ordering::Relaxed) > 0
            || self.threads.load(Ordering::Relaxed) >= MAX_THREADS
        {
            return;
        }
        self.threads.fetch_add(1, Ordering::Relaxed);
        let session = Arc::clone(self);
        let spawned = thread::Builder::new()
            .name("disk".to_owned())
            .spawn(move || session.serve());
        if let Err(error) = spawned {
            // This thread takes the lead again when it is through.
            self.threads.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!(%error, "no further thread for a disk's requests");
        }
    }

    fn carry_out(&self, request: &Request, buffer: &mut Vec<u8>) -> Result<(), Over> {
        let admitted = self.disk.admit();
        let done = match &admitted {
            Ok(_) => self.change_or_read(request, buffer),
            Err(_) => Err(DiskError::Closed),
        };
        let code = match done {
            Ok(()) => 0,
            // The client finds out where the disk is served now.
            Err(DiskError::Closed) => return Err(Over::Gone),
            Err(error) => {
                let code = code(&error);
                tracing::warn!(
                    error = crate::api::error::chain(&error),
                    disk = %self.disk.path().display(),
                    "a request to the disk failed"
                );
                code
            }
        };
        let payload = match request.command {
            Command::Read if code == 0 => request.len as usize,
            _ => 0,
        };
        buffer[..REPLY_LEN].copy_from_slice(&reply(request.cookie, code));
        let mut replies = self.replies.lock().unwrap_or_else(PoisonError::into_inner);
        replies.write_all(&buffer[..REPLY_LEN + payload])?;
        Ok(())
    }

    fn change_or_read(&self, request: &Request, buffer: &mut Vec<u8>) -> Result<(), DiskError> {
        let Request { offset, len, .. } = *request;
        let disk = &self.disk;
        let fua = match request.command {
            Command::Read => {
                if len > MAX_PAYLOAD {
                    return Err(too_long(disk, request));
                }
                let end = REPLY_LEN + len as usize;
                if buffer.len() < end {
                    buffer.resize(end, 0);
                }
                disk.read_at(&mut buffer[REPLY_LEN..end], offset)?;
                false
            }
            Command::Write { fua } => {
                disk.write_at(&buffer[REPLY_LEN..REPLY_LEN + len as usize], offset)?;
                fua
            }
            Command::WriteZeroes { fua, no_hole } => {
                disk.zero(offset, len.into(), no_hole)?;
                fua
            }
            Command::Trim { fua } => {
                disk.discard(offset, len.into())?;
                fua
            }
            Command::Flush => true,
            Command::Disconnect | Command::Unknown => return Err(too_long(disk, request)),
        };
        match fua {
            true => disk.flush(),
            false => Ok(()),
        }
    }
}

/// Reads a request, and a write's data into the buffer, behind the room for a reply.
fn take(reader: &mut BufReader<UnixStream>, buffer: &mut Vec<u8>) -> Result<Request, Over> {
    let mut header = [0; REQUEST_LEN];
    reader.read_exact(&mut header)?;
    let request = request(&header).ok_or(Over::Broken("it sent what is no request"))?;
    match request.command {
        Command::Disconnect => return Err(Over::Gone),
        Command::Write { .. } => {
            if request.len > MAX_PAYLOAD {
                return Err(Over::Broken("it writes more at once than it may"));
            }
            let end = REPLY_LEN + request.len as usize;
            if buffer.len() < end {
                buffer.resize(end, 0);
            }
            reader.read_exact(&mut buffer[REPLY_LEN..end])?;
        }
        Command::Read
        | Command::Flush
        | Command::Trim { .. }
        | Command::WriteZeroes { .. }
        | Command::Unknown => {}
    }
    Ok(request)
}

/// Whether another request, or a part of it, is there.
fn has_more(reader: &BufReader<UnixStream>) -> bool {
    if !reader.buffer().is_empty() {
        return true;
    }
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    recv(reader.get_ref().as_raw_fd(), &mut [0], flags).is_ok()
}

fn too_long(disk: &Disk, request: &Request) -> DiskError {
    DiskError::Range {
        offset: request.offset,
        len: request.len.into(),
        size: disk.size(),
    }
}

/// The protocol's number for an error.
fn code(error: &DiskError) -> u32 {
    match error {
        DiskError::Range { .. } | DiskError::Size { .. } => error::EINVAL,
        full if full.is_full() => error::ENOSPC,
        DiskError::File { .. } | DiskError::Io { .. } => error::EIO,
        DiskError::Closed | DiskError::NotHere | DiskError::Busy { .. } => error::EIO,
    }
}
