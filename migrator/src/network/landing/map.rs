//! The unsafe island of the landing: its file, in this process's memory.

use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, IoSliceMut};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{Ordering, compiler_fence};

use memmap2::{MmapMut, MmapOptions};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::{FILL, ROOM};

/// What is said of a packet stands before it.
const HEAD: usize = 64;
const SIZE: usize = HEAD + ROOM;

/// The file's bytes. They are the file: what is in them outlives this process, however it ends.
#[derive(Debug)]
pub(super) struct Area(MmapMut);

impl Area {
    /// Opens the file, or makes it.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        if let Some(dir) = path.parent() {
            DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        let is_new = file.metadata()?.len() != SIZE as u64;
        // All of its pages, or an error now: a write to one that has no place in memory would end the service.
        let size = i64::try_from(SIZE).map_err(io::Error::other)?;
        fallocate(&file, FallocateFlags::empty(), 0, size)?;
        // SAFETY: the file has `SIZE` bytes and is never cut shorter. It lies in a folder of root's, and only the service that has locked the node's
        // state opens it, once for each port, so nobody else writes to what this value gives out as slices.
        let map = unsafe { MmapOptions::new().len(SIZE).populate().map_mut(&file) }?;
        // A page that must be fetched while the process is being killed would cost the packet; where it may not be locked, it is there nearly always.
        let _ = map.lock();
        let mut area = Self(map);
        if is_new {
            area.set_words([0; 4]);
            area.fill(ROOM);
        }
        Ok(area)
    }

    /// Where packets land.
    pub(super) fn room(&self) -> &[u8] {
        &self.0[HEAD..]
    }

    pub(super) fn words(&self) -> [u64; 4] {
        let (words, _) = self.0.as_chunks::<8>();
        std::array::from_fn(|at| words.get(at).map_or(0, |word| u64::from_le_bytes(*word)))
    }

    pub(super) fn set_words(&mut self, values: [u64; 4]) {
        let (words, _) = self.0.as_chunks_mut::<8>();
        for (word, value) in words.iter_mut().zip(values) {
            *word = value.to_le_bytes();
        }
        // The process may end between any two instructions: they must be carried out in this order.
        compiler_fence(Ordering::SeqCst);
    }

    /// Its first bytes look as if nothing had landed there.
    pub(super) fn fill(&mut self, used: usize) {
        self.0[HEAD..HEAD + used].fill(FILL);
        compiler_fence(Ordering::SeqCst);
    }

    /// Reads a packet into it.
    pub(super) fn read(&mut self, from: BorrowedFd<'_>) -> Result<usize, Errno> {
        let read = read(from, &mut self.0[HEAD..]);
        compiler_fence(Ordering::SeqCst);
        read
    }
}

/// By readv(2), as nothing else on a port's thread is read: so that a test can tell these calls.
pub(super) fn read(from: BorrowedFd<'_>, to: &mut [u8]) -> Result<usize, Errno> {
    nix::sys::uio::readv(from, &mut [IoSliceMut::new(to)])
}
