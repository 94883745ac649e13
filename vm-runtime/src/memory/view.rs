//! The unsafe island of reading guest memory through a mapping: what must be read fast while the guest stands still.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};

use super::GuestMemory;
use crate::units::{PAGE_SIZE, PageIndex, PageRange};

const WORD: usize = size_of::<u64>();

/// Guest RAM, mapped to be read. A copy out of it costs half of a `pread`, once its pages are in the page table.
///
/// Reading a hole makes a page of zeros of it: ask [`GuestMemory::data_ranges`] first.
#[derive(Debug)]
pub struct MemoryView {
    at: NonNull<u64>,
    pages: u64,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is only read, by volatile loads.
unsafe impl Send for MemoryView {}
// SAFETY: as above; no method changes anything through `&self`.
unsafe impl Sync for MemoryView {}

impl MemoryView {
    /// Maps the memory. Its size must be sealed, as that of [`GuestMemory::create`] is: a load beyond a file's end is a
    /// SIGBUS.
    ///
    /// # Errors
    /// `InvalidInput` for a file that can shrink; else what `mmap` says.
    pub fn new(memory: &GuestMemory) -> io::Result<Self> {
        let seals = fcntl(memory.as_fd(), FcntlArg::F_GET_SEALS)?;
        if !SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the guest's RAM file is not sealed against shrinking",
            ));
        }
        let len = usize::try_from(memory.len().0).map_err(io::Error::other)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours. It outlives the
        // descriptor, and the seal keeps every page of it backed.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ,
                libc::MAP_SHARED,
                memory.as_fd().as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let at = NonNull::new(at.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let pages = memory.pages();
        Ok(Self { at, pages })
    }

    /// Fills the page table for a range, so that later copies from it do not fault. Only a matter of speed.
    ///
    /// # Errors
    /// `UnexpectedEof` if the range leaves guest RAM; else what `madvise` says (`MADV_POPULATE_READ`, Linux 5.14).
    pub fn populate(&self, range: PageRange) -> io::Result<()> {
        let start = self.page(range.start)?;
        if range.is_empty() {
            return Ok(());
        }
        self.page(PageIndex(range.end.0 - 1))?;
        let len = range.len() as usize * PAGE_SIZE;
        // SAFETY: the range lies within our mapping (both ends were checked), and populating changes no content.
        let result = unsafe { libc::madvise(start.cast(), len, libc::MADV_POPULATE_READ) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Pages of guest memory.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Copies a page.
    ///
    /// # Errors
    /// `UnexpectedEof` if it is beyond guest RAM.
    pub fn copy(&self, page: PageIndex, out: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        let from = self.page(page)?;
        for (index, bytes) in out.chunks_exact_mut(WORD).enumerate() {
            // SAFETY: `from` is the aligned start of a whole page of the mapping, and `index` below its 512 words. The
            // VMM may write there meanwhile: a volatile load of a word is neither cached, repeated nor assumed stable.
            let word = unsafe { from.add(index).read_volatile() };
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        Ok(())
    }

    fn page(&self, page: PageIndex) -> io::Result<*mut u64> {
        if page.0 >= self.pages {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the page is beyond guest memory",
            ));
        }
        // SAFETY: the page lies within the mapping.
        Ok(unsafe { self.at.as_ptr().add(page.0 as usize * (PAGE_SIZE / WORD)) })
    }
}

impl Drop for MemoryView {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone, and nothing refers to it after this. munmap of a valid range does not fail.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.pages as usize * PAGE_SIZE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Bytes;

    #[test]
    fn a_copy_is_what_was_written_and_follows_later_writes() {
        let memory = GuestMemory::create("view-test", Bytes(8 * PAGE_SIZE as u64)).unwrap();
        memory.write(PageIndex(2), &[7; 2 * PAGE_SIZE]).unwrap();
        let view = MemoryView::new(&memory).unwrap();
        view.populate(PageRange::new(2, 4)).unwrap();
        let mut page = [0; PAGE_SIZE];
        view.copy(PageIndex(3), &mut page).unwrap();
        assert_eq!(page, [7; PAGE_SIZE]);
        memory.write(PageIndex(3), &[9; PAGE_SIZE]).unwrap();
        view.copy(PageIndex(3), &mut page).unwrap();
        assert_eq!(page, [9; PAGE_SIZE]);
    }

    #[test]
    fn nothing_beyond_the_end_is_read_or_populated() {
        let memory = GuestMemory::create("view-test", Bytes(4 * PAGE_SIZE as u64)).unwrap();
        let view = MemoryView::new(&memory).unwrap();
        assert!(view.copy(PageIndex(4), &mut [0; PAGE_SIZE]).is_err());
        assert!(view.populate(PageRange::new(3, 5)).is_err());
        assert!(view.populate(PageRange::new(u64::MAX, u64::MAX)).is_err());
        view.populate(PageRange::new(3, 3)).unwrap();
    }

    #[test]
    fn a_file_that_can_shrink_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(PAGE_SIZE as u64).unwrap();
        let memory = GuestMemory::from_fd(file.into()).unwrap();
        assert!(MemoryView::new(&memory).is_err());
    }
}
