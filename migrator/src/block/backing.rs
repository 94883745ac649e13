//! The sparse file behind a disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};

use super::granule::Extent;
use super::sys::{begin_writeback, read_cached};

/// Zeros to write where the file system cannot make holes.
const ZEROS: &[u8] = &[0; 64 << 10];

#[derive(Debug)]
pub(super) struct Backing {
    pub(super) file: File,
}

impl Backing {
    /// Makes the file, which must not be there, as one hole.
    pub(super) fn create(path: &Path, size: u64) -> io::Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        file.set_len(size)?;
        file.sync_all()?;
        Ok(Self { file })
    }

    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(path)?;
        Ok(Self { file })
    }

    pub(super) fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// What the file takes on its file system, in bytes.
    pub(super) fn allocated_bytes(&self) -> io::Result<u64> {
        // st_blocks counts 512 bytes, whatever the file system's block is (stat(2)).
        Ok(self.file.metadata()?.blocks() * 512)
    }

    pub(super) fn read(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(data, offset)
    }

    /// Reads, if all of it is in the page cache. False: it is not, or nobody knows.
    pub(super) fn read_cached(&self, data: &mut [u8], offset: u64) -> bool {
        read_cached(&self.file, data, offset).is_ok_and(|read| read == data.len())
    }

    pub(super) fn write(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    /// Begins to write to the device what a sync would wait for. A file system that cannot do that has it wait.
    pub(super) fn begin_writeback(&self) {
        let _ = begin_writeback(&self.file);
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Makes a hole. False if the file system has none.
    pub(super) fn punch(&self, extent: Extent) -> io::Result<bool> {
        self.fallocate(
            FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
            extent,
        )
    }

    /// Zeros that keep their place on the file system, where it can do that.
    pub(super) fn zero_in_place(&self, extent: Extent) -> io::Result<()> {
        let zeroed = self.fallocate(
            FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
            extent,
        )?;
        match zeroed {
            true => Ok(()),
            false => self.write_zeros(extent),
        }
    }

    pub(super) fn write_zeros(&self, extent: Extent) -> io::Result<()> {
        let mut at = extent.offset;
        while at < extent.end() {
            let len = (extent.end() - at).min(ZEROS.len() as u64) as usize;
            self.write(&ZEROS[..len], at)?;
            at += len as u64;
        }
        Ok(())
    }

    /// What is not a hole, in order. What is written meanwhile may be missed.
    pub(super) fn data(&self) -> io::Result<Vec<Extent>> {
        let mut found = Vec::new();
        let mut at = 0_i64;
        loop {
            let start = match lseek(&self.file, at, Whence::SeekData) {
                Ok(start) => start,
                // No data from there to the end.
                Err(Errno::ENXIO) => return Ok(found),
                Err(errno) => return Err(errno.into()),
            };
            // There is a hole at the end of every file, or what counts as one.
            at = lseek(&self.file, start, Whence::SeekHole)?;
            let (Ok(offset), Ok(end)) = (u64::try_from(start), u64::try_from(at)) else {
                return Err(io::Error::other("a negative offset"));
            };
            found.push(Extent {
                offset,
                len: end - offset,
            });
        }
    }

    fn fallocate(&self, flags: FallocateFlags, extent: Extent) -> io::Result<bool> {
        if extent.len == 0 {
            return Ok(true);
        }
        let (Ok(offset), Ok(len)) = (i64::try_from(extent.offset), i64::try_from(extent.len))
        else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        loop {
            match fallocate(&self.file, flags, offset, len) {
                Ok(()) => return Ok(true),
                Err(Errno::EINTR) => {}
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => return Ok(false),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}
