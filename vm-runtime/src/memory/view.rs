//! The unsafe island of reading guest memory through a mapping.
//!
//! A page is copied and looked at for zeros in one pass: volatile loads of 16 bytes, stored and joined by OR. Nanoseconds a page of
//! 256 MiB, a quarter of them zero (and of 128 KiB that stay in the cache):
//!
//! | | cold | cached |
//! |---|---|---|
//! | `pread` of 256 pages, then a comparison with zeros | 557 | |
//! | `pread` of one page, then the same | 763 | |
//! | volatile words of 8 bytes | 469 | 150 |
//! | volatile vectors of 16 bytes (what is here) | 274 | 94 |
//! | `memcpy`, then a comparison with zeros | 254 | 126 |
//!
//! `memcpy` is not for memory that another process writes to: the compiler may take what it copies for stable.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m128i, _mm_cmpeq_epi8, _mm_movemask_epi8, _mm_or_si128, _mm_setzero_si128, _mm_storeu_si128,
};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};

use super::GuestMemory;
use crate::units::{PAGE_SIZE, PageIndex, PageRange};

const WORD: usize = size_of::<u64>();
/// Bytes of one vector register that every x86-64 processor has.
#[cfg(target_arch = "x86_64")]
const VECTOR: usize = size_of::<__m128i>();

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

    /// Copies a page, and says whether the copy is all zeros.
    ///
    /// # Errors
    /// `UnexpectedEof` if it is beyond guest RAM.
    pub fn copy(&self, page: PageIndex, out: &mut [u8; PAGE_SIZE]) -> io::Result<bool> {
        let from = self.page(page)?;
        // SAFETY: `from` is the aligned start of a whole page of the mapping, which lives as long as `self`.
        Ok(unsafe { copy_page(from, out) })
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

/// Copies a page that others may be writing to, and says whether the copy is all zeros.
///
/// # Safety
/// `from` is the start of a mapped page, aligned as a page is.
#[cfg(target_arch = "x86_64")]
unsafe fn copy_page(from: *const u64, out: &mut [u8; PAGE_SIZE]) -> bool {
    const LANES: usize = 4;
    let from = from.cast::<__m128i>();
    let to = out.as_mut_ptr().cast::<__m128i>();
    // SAFETY: SSE2 is part of x86-64. The indices stay below the page's 256 vectors. Loads are aligned, because the page is; they
    // are volatile, so that none is repeated or taken for stable while the VMM writes there. Stores go to `out` and need no alignment.
    unsafe {
        let mut seen = [_mm_setzero_si128(); LANES];
        for first in (0..PAGE_SIZE / VECTOR).step_by(LANES) {
            for (lane, seen) in seen.iter_mut().enumerate() {
                let vector = from.add(first + lane).read_volatile();
                _mm_storeu_si128(to.add(first + lane), vector);
                *seen = _mm_or_si128(*seen, vector);
            }
        }
        let [a, b, c, d] = seen;
        let any = _mm_or_si128(_mm_or_si128(a, b), _mm_or_si128(c, d));
        _mm_movemask_epi8(_mm_cmpeq_epi8(any, _mm_setzero_si128())) == 0xffff
    }
}

/// As above, by words.
///
/// # Safety
/// `from` is the start of a mapped page, aligned as a page is.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn copy_page(from: *const u64, out: &mut [u8; PAGE_SIZE]) -> bool {
    let mut seen = 0;
    for (index, bytes) in out.chunks_exact_mut(WORD).enumerate() {
        // SAFETY: `index` is below the page's 512 words. A volatile load is neither repeated nor taken for stable while the VMM
        // writes there.
        let word = unsafe { from.add(index).read_volatile() };
        seen |= word;
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    seen == 0
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
    fn a_single_byte_anywhere_makes_the_copy_nonzero() {
        let memory = GuestMemory::create("view-test", Bytes(PAGE_SIZE as u64)).unwrap();
        let view = MemoryView::new(&memory).unwrap();
        let mut copy = [1; PAGE_SIZE];
        for at in 0..PAGE_SIZE {
            let mut page = [0; PAGE_SIZE];
            page[at] = 0x80;
            memory.write(PageIndex(0), &page).unwrap();
            assert!(!view.copy(PageIndex(0), &mut copy).unwrap(), "byte {at}");
            assert_eq!(copy, page);
        }
        memory.write(PageIndex(0), &[0; PAGE_SIZE]).unwrap();
        assert!(view.copy(PageIndex(0), &mut copy).unwrap());
        assert_eq!(copy, [0; PAGE_SIZE]);
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
