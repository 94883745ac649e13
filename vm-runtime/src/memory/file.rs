//! The memfd that is guest RAM.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use nix::unistd::{Whence, lseek};

use super::huge::{HUGE_PAGE, HugeWindow};
use crate::units::{Bytes, PAGE_SIZE, PageIndex, PageRange};

/// How long [`GuestMemory::make_hole`] waits for whoever uses a page: who reads or moves one does so for microseconds.
const HOLE_WITHIN: Duration = Duration::from_millis(200);
/// How often it tries.
const HOLE_AGAIN: Duration = Duration::from_micros(200);

/// Guest RAM: a memfd of a whole number of pages.
///
/// It may be made of reserved huge pages. Then all of it counts as data, whether it is there or not; what is punched stays reserved
/// for this guest; and the dirty tracker tells of 512 pages where the guest has written one.
///
/// Reads and writes are copies. While the guest runs, a read may see a page half written; the
/// dirty scan that follows names that page again, so the last copy is whole.
#[derive(Debug)]
pub struct GuestMemory {
    file: File,
    len: u64,
    huge: Option<Huge>,
}

/// The mapping through which huge pages are written, once it is needed.
type Huge = OnceLock<HugeWindow>;

impl GuestMemory {
    /// Makes a memfd of `size` bytes, all holes. `name` shows in `/proc/PID/maps`.
    ///
    /// The size is sealed, so that a VMM gone wrong can neither grow nor shrink it.
    ///
    /// # Errors
    /// `InvalidInput` if `size` is zero or no multiple of the page size; else what the kernel says.
    pub fn create(name: &str, size: Bytes) -> io::Result<Self> {
        check_size(size.0, PAGE_SIZE as u64)?;
        Ok(Self {
            file: sealed(name, size, MFdFlags::empty())?,
            len: size.0,
            huge: None,
        })
    }

    /// The same of huge pages of 2 MiB, all of which are reserved: the guest never waits for one, nor dies for want of one.
    ///
    /// # Errors
    /// `InvalidInput` if `size` is zero or no multiple of 2 MiB; `StorageFull` if the host has too few huge pages; else
    /// what the kernel says.
    pub fn create_huge(name: &str, size: Bytes) -> io::Result<Self> {
        check_size(size.0, HUGE_PAGE)?;
        let file = sealed(name, size, MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB)?;
        let window = HugeWindow::new(file.as_fd(), size.0)?;
        Ok(Self {
            file,
            len: size.0,
            huge: Some(OnceLock::from(window)),
        })
    }

    /// Takes a memfd that exists, such as one that a running VMM holds.
    ///
    /// # Errors
    /// `InvalidInput` if its size is zero or no multiple of the page size.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let file = File::from(fd);
        let len = file.metadata()?.len();
        check_size(len, PAGE_SIZE as u64)?;
        let huge = fstatfs(&file)?.filesystem_type() == HUGETLBFS_MAGIC;
        Ok(Self {
            file,
            len,
            huge: huge.then(Huge::new),
        })
    }

    /// Whether it is made of huge pages.
    pub fn is_huge(&self) -> bool {
        self.huge.is_some()
    }

    /// Size of guest RAM.
    // There is no empty guest memory, so `is_empty` would be a lie waiting to be asked.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> Bytes {
        Bytes(self.len)
    }

    /// Number of guest pages.
    pub fn pages(&self) -> u64 {
        self.len / PAGE_SIZE as u64
    }

    /// Device and inode of the memfd: what `/proc/PID/maps` names a mapping of it by.
    ///
    /// # Errors
    /// What `fstat` says.
    pub fn identity(&self) -> io::Result<(u64, u64)> {
        let meta = self.file.metadata()?;
        Ok((meta.dev(), meta.ino()))
    }

    /// Copies guest memory from page `first` on into `buf`; holes read as zeros and stay holes.
    ///
    /// # Errors
    /// `UnexpectedEof` if the range leaves guest RAM.
    pub fn read(&self, first: PageIndex, buf: &mut [u8]) -> io::Result<()> {
        self.check_range(first, buf.len())?;
        self.file.read_exact_at(buf, first.offset())
    }

    /// Copies `bytes` into guest memory from page `first` on.
    ///
    /// # Errors
    /// `UnexpectedEof` if the range leaves guest RAM; `StorageFull` if the host has no memory left.
    pub fn write(&self, first: PageIndex, bytes: &[u8]) -> io::Result<()> {
        self.check_range(first, bytes.len())?;
        let Some(huge) = &self.huge else {
            return self.file.write_all_at(bytes, first.offset());
        };
        if let Some(window) = huge.get() {
            return window.write(first.offset(), bytes);
        }
        // Taken from a VMM. A second mapping, made beside this one, is as good.
        let window = HugeWindow::new(self.file.as_fd(), self.len)?;
        window.write(first.offset(), bytes)?;
        let _ = huge.set(window);
        Ok(())
    }

    /// Gives the pages back to the host: they read as zeros, and are holes. Of huge pages, those that lie within the range as a whole
    /// are given back, and stay reserved.
    ///
    /// # Errors
    /// `UnexpectedEof` if the range leaves guest RAM; `StorageFull` if somebody else took the huge pages in that moment.
    pub fn punch(&self, range: PageRange) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let bytes = range
            .len()
            .checked_mul(PAGE_SIZE as u64)
            .ok_or_else(outside)?;
        self.check_range(range.start, usize::try_from(bytes).map_err(|_| outside())?)?;
        fallocate(
            &self.file,
            FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
            to_offset(range.start.offset())?,
            to_offset(bytes)?,
        )?;
        if self.huge.is_some() && bytes >= HUGE_PAGE {
            // A page that is punched is not reserved any more, and a mapping reserves what is not there.
            HugeWindow::new(self.file.as_fd(), self.len)?;
        }
        Ok(())
    }

    /// Makes holes, where [`Self::punch`] need not: of a transparent huge page that somebody uses in that moment, the kernel clears
    /// the range, and keeps it. Waits for that user, 200 ms at most.
    ///
    /// # Errors
    /// As [`Self::punch`]; `ResourceBusy` if the kernel keeps a page: then it reads as zeros.
    pub fn make_hole(&self, range: PageRange) -> io::Result<()> {
        let began = Instant::now();
        loop {
            self.punch(range)?;
            if self.is_hole(range)? {
                return Ok(());
            }
            if began.elapsed() >= HOLE_WITHIN {
                return Err(io::Error::new(
                    io::ErrorKind::ResourceBusy,
                    "the kernel does not let go of a huge page",
                ));
            }
            std::thread::sleep(HOLE_AGAIN);
        }
    }

    fn is_hole(&self, range: PageRange) -> io::Result<bool> {
        if range.is_empty() {
            return Ok(true);
        }
        match lseek(
            &self.file,
            to_offset(range.start.offset())?,
            Whence::SeekData,
        ) {
            Ok(data) => Ok(data as u64 >= range.end.offset()),
            // No data behind this offset, lseek(2).
            Err(Errno::ENXIO) => Ok(true),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Pages that the host keeps for the guest: those that are no holes.
    ///
    /// # Errors
    /// What `fstat` says.
    pub fn allocated_pages(&self) -> io::Result<u64> {
        // In units of 512 bytes, stat(2).
        Ok(self.file.metadata()?.blocks() / (PAGE_SIZE as u64 / 512))
    }

    /// The page ranges that hold data, in order; everything between them is holes, thus zeros.
    ///
    /// # Errors
    /// What `lseek` says.
    pub fn data_ranges(&self) -> io::Result<Vec<PageRange>> {
        let page = PAGE_SIZE as u64;
        let mut ranges: Vec<PageRange> = Vec::new();
        let mut at = 0u64;
        while at < self.len {
            let start = match lseek(&self.file, to_offset(at)?, Whence::SeekData) {
                Ok(start) => start as u64,
                // ENXIO: no data behind this offset, lseek(2).
                Err(Errno::ENXIO) => break,
                Err(errno) => return Err(errno.into()),
            };
            let end = lseek(&self.file, to_offset(start)?, Whence::SeekHole)? as u64;
            if end <= start {
                // Punched between the two calls.
                at = start + page;
                continue;
            }
            let end = end.min(self.len);
            ranges.push(PageRange::new(start / page, end.div_ceil(page)));
            at = end;
        }
        Ok(ranges)
    }

    fn check_range(&self, first: PageIndex, bytes: usize) -> io::Result<()> {
        let offset = first.0.checked_mul(PAGE_SIZE as u64).ok_or_else(outside)?;
        let end = offset.checked_add(bytes as u64).ok_or_else(outside)?;
        if end > self.len {
            return Err(outside());
        }
        Ok(())
    }
}

impl AsFd for GuestMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A memfd of that size, which nobody can change.
fn sealed(name: &str, size: Bytes, flags: MFdFlags) -> io::Result<File> {
    let flags = flags | MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(name, flags)?);
    file.set_len(size.0)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}

fn check_size(size: u64, page: u64) -> io::Result<()> {
    if size == 0 || !size.is_multiple_of(page) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("guest memory of {size} bytes is not a whole number of {page}-byte pages"),
        ));
    }
    Ok(())
}

fn outside() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the page range leaves guest memory",
    )
}

fn to_offset(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(|_| outside())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(pages: u64) -> GuestMemory {
        GuestMemory::create("test", Bytes(pages * PAGE_SIZE as u64)).unwrap()
    }

    #[test]
    fn a_new_memory_is_all_holes_and_reads_as_zeros() {
        let memory = memory(16);
        assert_eq!(memory.pages(), 16);
        assert_eq!(memory.data_ranges().unwrap(), []);
        let mut page = [1u8; PAGE_SIZE];
        memory.read(PageIndex(3), &mut page).unwrap();
        assert!(crate::memory::is_zero(&page));
        assert_eq!(memory.data_ranges().unwrap(), [], "a read made data");
    }

    #[test]
    fn written_pages_are_the_data_ranges_and_punching_takes_them_out() {
        let memory = memory(16);
        memory.write(PageIndex(2), &[7; 2 * PAGE_SIZE]).unwrap();
        memory.write(PageIndex(15), &[9; PAGE_SIZE]).unwrap();
        let both = [PageRange::new(2, 4), PageRange::new(15, 16)];
        assert_eq!(memory.data_ranges().unwrap(), both);
        assert_eq!(memory.allocated_pages().unwrap(), 3);
        memory.punch(PageRange::new(3, 16)).unwrap();
        assert_eq!(memory.data_ranges().unwrap(), [PageRange::new(2, 3)]);
        memory.punch(PageRange::new(5, 5)).unwrap();
        memory.make_hole(PageRange::new(0, 5)).unwrap();
        memory.make_hole(PageRange::new(5, 5)).unwrap();
        assert_eq!(memory.data_ranges().unwrap(), []);
    }

    #[test]
    fn nothing_reaches_past_the_end() {
        let memory = memory(4);
        let mut page = [0u8; PAGE_SIZE];
        for first in [4, u64::MAX, u64::MAX / PAGE_SIZE as u64] {
            let at = PageIndex(first);
            assert!(memory.read(at, &mut page).is_err());
            assert!(memory.write(at, &page).is_err());
            assert!(memory.punch(PageRange::new(first, u64::MAX)).is_err() || first == u64::MAX);
        }
        assert!(memory.write(PageIndex(3), &[0; 2 * PAGE_SIZE]).is_err());
        assert!(memory.punch(PageRange::new(0, 5)).is_err());
    }

    #[test]
    fn more_huge_pages_than_any_host_has_are_refused_with_what_to_do() {
        let error = GuestMemory::create_huge("test", Bytes(1 << 44)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{error}");
        assert!(error.to_string().contains("vm.nr_hugepages"), "{error}");
        let odd = GuestMemory::create_huge("test", Bytes(HUGE_PAGE + PAGE_SIZE as u64));
        assert_eq!(odd.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn the_size_is_sealed_and_checked() {
        let memory = memory(4);
        assert!(memory.file.set_len(8192).is_err());
        assert!(GuestMemory::create("test", Bytes(0)).is_err());
        assert!(GuestMemory::create("test", Bytes(4097)).is_err());
        let copy = memory.as_fd().try_clone_to_owned().unwrap();
        let same = GuestMemory::from_fd(copy).unwrap();
        assert_eq!(same.identity().unwrap(), memory.identity().unwrap());
    }
}
