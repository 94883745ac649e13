//! A process's output on its way to the host, in pieces, never more under way than a window allows.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result};
use guest_agent::protocol::message::MAX_CHUNK;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// What reading gave.
pub(crate) enum Chunk {
    /// Bytes, and how many of this stream came before them.
    Data(u64, Vec<u8>),
    /// Nothing now.
    Empty,
    /// Nothing ever again.
    End,
}

/// The reading end of a pipe or the master of a terminal.
pub(crate) struct Output {
    file: Option<File>,
    offset: u64,
    /// Pieces that the host has not acknowledged: (ordinal in the link, bytes).
    under_way: VecDeque<(u64, u64)>,
    outstanding: u64,
}

impl Output {
    /// Takes a descriptor, which becomes non-blocking.
    pub(crate) fn new(fd: OwnedFd) -> Result<Self> {
        unblock(fd.as_fd())?;
        Ok(Self {
            file: Some(fd.into()),
            offset: 0,
            under_way: VecDeque::new(),
            outstanding: 0,
        })
    }

    /// An output that has ended before it began.
    pub(crate) fn none() -> Self {
        Self::after(0)
    }

    /// One of which so many bytes came from an earlier guest, and no more so far.
    pub(crate) fn after(offset: u64) -> Self {
        Self {
            file: None,
            offset,
            under_way: VecDeque::new(),
            outstanding: 0,
        }
    }

    /// Goes on as the same stream with what another process writes, or with nothing more.
    pub(crate) fn goes_on(&mut self, next: Self) {
        self.file = next.file;
    }

    /// The descriptor to poll, until the stream has ended.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }

    /// Reads at most `room` bytes.
    pub(crate) fn read(&mut self, room: u64) -> Chunk {
        let Some(file) = &mut self.file else {
            return Chunk::End;
        };
        let room = usize::try_from(room).unwrap_or(MAX_CHUNK).min(MAX_CHUNK);
        if room == 0 {
            return Chunk::Empty;
        }
        let mut buffer = vec![0; room];
        match file.read(&mut buffer) {
            Ok(n) if n > 0 => {
                buffer.truncate(n);
                let offset = self.offset;
                self.offset += n as u64;
                Chunk::Data(offset, buffer)
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                Chunk::Empty
            }
            // A terminal whose last process has gone says EIO.
            Ok(_) | Err(_) => {
                self.file = None;
                Chunk::End
            }
        }
    }

    /// Books a piece that went to the link.
    pub(crate) fn sent(&mut self, ordinal: u64, bytes: u64) {
        self.under_way.push_back((ordinal, bytes));
        self.outstanding += bytes;
    }

    /// Bytes that the host has not acknowledged, when it has released everything before `released`.
    pub(crate) fn outstanding(&mut self, released: u64) -> u64 {
        while let Some((ordinal, bytes)) = self.under_way.front().copied()
            && ordinal < released
        {
            self.outstanding -= bytes;
            self.under_way.pop_front();
        }
        self.outstanding
    }

    /// Reads no more.
    pub(crate) fn close(&mut self) {
        self.file = None;
    }
}

/// Makes reads and writes return at once.
pub(crate) fn unblock(fd: BorrowedFd<'_>) -> Result<()> {
    fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context("making a pipe non-blocking")?;
    Ok(())
}
