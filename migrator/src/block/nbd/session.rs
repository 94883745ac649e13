//! A client's requests, by as many threads as they overlap.
//!
//! One thread at a time leads: it reads a request, then hands the lead over and carries the request out itself. So a request is never
//! handed from thread to thread. If no other request has come yet, and this one cannot wait long, it keeps the lead: a client that asks
//! for one thing after the other is served by one thread without any switch. Small reads of what is in the page cache are answered by
//! whoever leads, several with one call if several were there.
//!
//! The pages of larger reads go from the cache to the socket by a pipe, without a copy.

use std::io::{self, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};

use super::codec::{Command, MAX_PAYLOAD, REPLY_LEN, REQUEST_LEN, Request, error, reply, request};
use super::replies::Replies;
use crate::block::{DiskError, Export, Pipe};

/// Most requests of one connection at once: as many as QEMU sends (`MAX_NBD_REQUESTS` in its block/nbd.c).
const MAX_THREADS: usize = 16;
/// What a thread keeps of its buffer from one request to the next.
const KEPT: usize = 1 << 20;
/// Reads up to this are copied by whoever leads, larger ones are spliced, side by side: for so little the pipe's calls cost as much as
/// the copy.
const COPIED: u32 = 32 << 10;
/// What the kernel holds of replies that the client has not read yet: two of the largest.
const SEND_BUFFER: usize = 8 << 20;

/// A connection past its handshake.
#[derive(Debug)]
pub(super) struct Session {
    export: Export,
    stream: UnixStream,
    /// The lead. `None` once nothing more is read.
    lead: Mutex<Option<Lead>>,
    /// Held while a reply is sent, so that it is not mixed with another.
    replies: Mutex<UnixStream>,
    threads: AtomicUsize,
    /// Threads that wait for the lead.
    idle: AtomicUsize,
}

/// What whoever leads has.
#[derive(Debug)]
struct Lead {
    reader: BufReader<Incoming>,
    replies: Replies,
}

/// What the client sends. It is waited for by poll: whoever sleeps in a read is also woken each time that the client has taken a part of a
/// reply, for nothing.
#[derive(Debug)]
struct Incoming(UnixStream);

impl Read for Incoming {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        let mut wanted = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut wanted, PollTimeout::NONE)?;
        self.0.read(data)
    }
}

/// What a thread has.
struct Hands {
    /// Begins with room for a reply's header, so that one call sends it with its data.
    buffer: Vec<u8>,
    /// Made when it is needed first.
    pipe: Option<Pipe>,
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
    pub(super) fn new(export: Export, stream: UnixStream) -> io::Result<Arc<Self>> {
        // Beyond `net.core.wmem_max` only with CAP_NET_ADMIN; without it replies wait sooner.
        let _ = setsockopt(&stream, sockopt::SndBufForce, &SEND_BUFFER);
        let lead = Lead {
            reader: BufReader::with_capacity(4 << 10, Incoming(stream.try_clone()?)),
            replies: Replies::default(),
        };
        Ok(Arc::new(Self {
            export,
            lead: Mutex::new(Some(lead)),
            replies: Mutex::new(stream.try_clone()?),
            stream,
            threads: AtomicUsize::new(1),
            idle: AtomicUsize::new(0),
        }))
    }

    /// Serves requests until the connection ends; other threads may serve it for a moment longer.
    pub(super) fn serve(self: &Arc<Self>) {
        let mut hands = Hands {
            buffer: vec![0; REPLY_LEN],
            pipe: None,
        };
        let mut kept = None;
        loop {
            let mut place = kept.take().unwrap_or_else(|| self.wait_for_lead());
            let Some(lead) = place.as_mut() else { break };
            let request = match self.take_on(lead, &mut hands.buffer) {
                Ok(request) => request,
                Err(over) => {
                    *place = None;
                    drop(place);
                    if let Over::Broken(what) = over {
                        tracing::warn!(disk = %self.export.path().display(), what, "a client of the disk is cut off");
                    }
                    break;
                }
            };
            if self.is_quick(&request) && !has_more(&lead.reader) {
                kept = Some(place);
            } else {
                self.have_a_follower();
                drop(place);
            }
            if self.carry_out(&request, &mut hands).is_err() {
                break;
            }
            hands.buffer.truncate(KEPT);
            hands.buffer.shrink_to(KEPT);
        }
        self.cut();
        self.threads.fetch_sub(1, Ordering::Relaxed);
    }

    fn wait_for_lead(&self) -> MutexGuard<'_, Option<Lead>> {
        self.idle.fetch_add(1, Ordering::Relaxed);
        let place = self.lead.lock().unwrap_or_else(PoisonError::into_inner);
        self.idle.fetch_sub(1, Ordering::Relaxed);
        place
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
        ) && self.export.is_ready(request.offset, request.len.into())
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

    /// The next request that is not answered on the spot.
    fn take_on(&self, lead: &mut Lead, buffer: &mut Vec<u8>) -> Result<Request, Over> {
        let Lead { reader, replies } = lead;
        loop {
            // What comes next may be long in coming, and a write's data, too.
            let next = reader.buffer().first_chunk().and_then(request);
            let reads = next.is_some_and(|next| next.command == Command::Read);
            if !reads || replies.are_many() {
                self.send(replies.take())?;
            }
            let request = take(reader, buffer)?;
            if !self.answer_now(&request, replies)? {
                self.send(replies.take())?;
                return Ok(request);
            }
        }
    }

    /// Answers a small read of what is in the page cache. False: it is something else.
    fn answer_now(&self, request: &Request, replies: &mut Replies) -> Result<bool, Over> {
        if request.command != Command::Read || request.len > COPIED {
            return Ok(false);
        }
        let Export::Disk(disk) = &self.export else {
            return Ok(false);
        };
        let _admitted = disk.admit().map_err(|_| Over::Gone)?;
        let read = |data: &mut [u8]| disk.read_now(data, request.offset);
        Ok(replies.add(&reply(request.cookie, 0), request.len as usize, read))
    }

    fn carry_out(&self, request: &Request, hands: &mut Hands) -> Result<(), Over> {
        let admitted = self.export.admit();
        let done = match &admitted {
            Ok(_) => self.change_or_read(request, hands),
            Err(_) => Err(DiskError::Closed),
        };
        let (code, payload) = match done {
            Ok(payload) => (0, payload),
            // The client finds out where the disk is served now.
            Err(DiskError::Closed) => return Err(Over::Gone),
            // A guest may try that as often as it likes.
            Err(error @ DiskError::ReadOnly) => (code(&error), Payload::None),
            Err(error) => {
                let code = code(&error);
                tracing::warn!(
                    error = crate::api::error::chain(&error),
                    disk = %self.export.path().display(),
                    "a request to the disk failed"
                );
                (code, Payload::None)
            }
        };
        let header = reply(request.cookie, code);
        let len = request.len as usize;
        match payload {
            Payload::None => self.send(&header),
            Payload::Buffer => {
                hands.buffer[..REPLY_LEN].copy_from_slice(&header);
                self.send(&hands.buffer[..REPLY_LEN + len])
            }
            Payload::Pipe { piped } => {
                let Some(pipe) = &hands.pipe else {
                    return Err(Over::Gone);
                };
                let mut socket = self.socket();
                socket.write_all(&header)?;
                pipe.drain(&*socket, piped)?;
                let rest = &hands.buffer[REPLY_LEN..][..len - piped];
                Ok(socket.write_all(rest)?)
            }
        }
    }

    fn change_or_read(&self, request: &Request, hands: &mut Hands) -> Result<Payload, DiskError> {
        let Request { offset, len, .. } = *request;
        let export = &self.export;
        let fua = match request.command {
            Command::Read => return self.read(request, hands),
            Command::Write { fua } => {
                export
                    .disk()?
                    .write_at(&hands.buffer[REPLY_LEN..][..len as usize], offset)?;
                fua
            }
            Command::WriteZeroes { fua, no_hole } => {
                export.disk()?.zero(offset, len.into(), no_hole)?;
                fua
            }
            Command::Trim { fua } => {
                export.disk()?.discard(offset, len.into())?;
                fua
            }
            Command::Flush => true,
            Command::Disconnect | Command::Unknown => return Err(too_long(export, request)),
        };
        if fua {
            export.flush()?;
        }
        Ok(Payload::None)
    }

    fn read(&self, request: &Request, hands: &mut Hands) -> Result<Payload, DiskError> {
        let Request { offset, len, .. } = *request;
        if len > MAX_PAYLOAD {
            return Err(too_long(&self.export, request));
        }
        if let Export::Disk(disk) = &self.export
            && len > COPIED
        {
            // Without one everything is copied.
            if hands.pipe.is_none() {
                hands.pipe = Pipe::new().ok();
            }
            // It is kept only if it has the data, and nothing else.
            if let Some(pipe) = hands.pipe.take() {
                let piped = pipe.room(offset, len.into()) as usize;
                if disk.read_into(&pipe, offset, piped)? {
                    // What a client asks for may begin and end within a page, and be one page too many.
                    let rest = room(&mut hands.buffer, len as usize - piped);
                    disk.read_at(rest, offset + piped as u64)?;
                    hands.pipe = Some(pipe);
                    return Ok(Payload::Pipe { piped });
                }
            }
        }
        let data = room(&mut hands.buffer, len as usize);
        self.export.read_at(data, offset)?;
        Ok(Payload::Buffer)
    }

    fn send(&self, bytes: &[u8]) -> Result<(), Over> {
        if bytes.is_empty() {
            return Ok(());
        }
        Ok(self.socket().write_all(bytes)?)
    }

    fn socket(&self) -> MutexGuard<'_, UnixStream> {
        self.replies.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a reply's data is.
enum Payload {
    None,
    Buffer,
    /// So many bytes of it in the pipe, the rest in the buffer.
    Pipe {
        piped: usize,
    },
}

/// Reads a request, and a write's data into the buffer, behind the room for a reply.
fn take(reader: &mut BufReader<Incoming>, buffer: &mut Vec<u8>) -> Result<Request, Over> {
    let mut header = [0; REQUEST_LEN];
    reader.read_exact(&mut header)?;
    let request = request(&header).ok_or(Over::Broken("it sent what is no request"))?;
    match request.command {
        Command::Disconnect => return Err(Over::Gone),
        Command::Write { .. } => {
            if request.len > MAX_PAYLOAD {
                return Err(Over::Broken("it writes more at once than it may"));
            }
            reader.read_exact(room(buffer, request.len as usize))?;
        }
        Command::Read
        | Command::Flush
        | Command::Trim { .. }
        | Command::WriteZeroes { .. }
        | Command::Unknown => {}
    }
    Ok(request)
}

/// Room for data, behind that for a reply's header.
fn room(buffer: &mut Vec<u8>, len: usize) -> &mut [u8] {
    let end = REPLY_LEN + len;
    if buffer.len() < end {
        buffer.resize(end, 0);
    }
    &mut buffer[REPLY_LEN..end]
}

/// Whether another request, or a part of it, is there.
fn has_more(reader: &BufReader<Incoming>) -> bool {
    if !reader.buffer().is_empty() {
        return true;
    }
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    recv(reader.get_ref().0.as_raw_fd(), &mut [0], flags).is_ok()
}

fn too_long(export: &Export, request: &Request) -> DiskError {
    DiskError::Range {
        offset: request.offset,
        len: request.len.into(),
        size: export.size(),
    }
}

/// The protocol's number for an error.
fn code(error: &DiskError) -> u32 {
    match error {
        DiskError::Range { .. } | DiskError::Size { .. } => error::EINVAL,
        DiskError::ReadOnly => error::EPERM,
        full if full.is_full() => error::ENOSPC,
        DiskError::File { .. } | DiskError::Io { .. } => error::EIO,
        DiskError::Closed | DiskError::NotHere | DiskError::Busy { .. } => error::EIO,
    }
}
