//! A pipe that carries pages of a file to a socket without a copy.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;

/// What is asked for: the most that a process without CAP_SYS_RESOURCE may have by default (`fs.pipe-max-size`).
const WANTED: i32 = 1 << 20;
/// A page has a slot of its own, whatever of it is sent.
const PAGE: u64 = 4096;

/// The pipe. It is empty between two uses.
#[derive(Debug)]
pub struct Pipe {
    from: OwnedFd,
    to: OwnedFd,
    pages: u64,
}

impl Pipe {
    /// A pipe as large as may be.
    ///
    /// # Errors
    /// Out of descriptors, or of memory.
    pub fn new() -> io::Result<Self> {
        let (from, to) = pipe2(OFlag::O_CLOEXEC)?;
        // A small one is of use as well.
        let _ = fcntl(&to, FcntlArg::F_SETPIPE_SZ(WANTED));
        let bytes = fcntl(&to, FcntlArg::F_GETPIPE_SZ)?;
        let pages = u64::try_from(bytes).unwrap_or(0) / PAGE;
        Ok(Self { from, to, pages })
    }

    /// How much of a range of a file fits, so that filling it in does not wait for a reader.
    pub fn room(&self, offset: u64, len: u64) -> u64 {
        len.min(self.pages * PAGE - offset % PAGE)
    }

    /// Takes the range's pages in, from the cache or the device. On an error the pipe may have a part of it, and is of no more use.
    pub(super) fn fill(&self, file: &File, offset: u64, len: usize) -> io::Result<()> {
        let mut at = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut left = len;
        while left > 0 {
            // It moves `at` on.
            match splice(
                file,
                Some(&mut at),
                &self.to,
                None,
                left,
                SpliceFFlags::empty(),
            ) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(more) => left -= more,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Gives all of the `len` bytes that are in it to a socket.
    ///
    /// # Errors
    /// The connection broke: the pipe is of no more use.
    pub fn drain(&self, socket: impl AsFd, len: usize) -> io::Result<()> {
        let mut left = len;
        while left > 0 {
            match splice(&self.from, None, &socket, None, left, SpliceFFlags::empty()) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(more) => left -= more,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }
}
