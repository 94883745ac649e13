//! The unsafe island of guest memory in huge pages: hugetlbfs has no write(2), so what is written goes through a mapping.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use crate::units::{Bytes, PAGE_SIZE};

/// Bytes of a huge page: the smaller of the two sizes that x86-64 has.
pub const HUGE_PAGE: u64 = 2 << 20;

/// Where the kernel counts its huge pages of this size, Documentation/admin-guide/mm/hugetlbpage.rst.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Huge pages of the host that nobody has or has reserved.
pub fn huge_pages_available() -> Bytes {
    let count = |name: &str| -> u64 {
        let text = std::fs::read_to_string(format!("{POOL}/{name}"));
        // A kernel without huge pages has none available.
        text.ok().and_then(|t| t.trim().parse().ok()).unwrap_or(0)
    };
    Bytes(count("free_hugepages").saturating_sub(count("resv_hugepages")) * HUGE_PAGE)
}

/// A file of huge pages, mapped to be written to. As long as it exists each page of the file is either there or reserved.
#[derive(Debug)]
pub(super) struct HugeWindow {
    at: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread.
unsafe impl Send for HugeWindow {}
// SAFETY: as above. Two threads that write to the same bytes leave either's: nobody reads them through this mapping.
unsafe impl Sync for HugeWindow {}

impl HugeWindow {
    /// Maps the first `len` bytes of a file whose size is sealed, and reserves what is not there.
    ///
    /// # Errors
    /// `StorageFull` if the host has too few huge pages; else what `mmap` says.
    pub(super) fn new(file: BorrowedFd<'_>, len: u64) -> io::Result<Self> {
        let size = usize::try_from(len).map_err(io::Error::other)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            return Err(match error.raw_os_error() {
                Some(libc::ENOMEM) => too_few(len),
                _ => error,
            });
        }
        let at = NonNull::new(at.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { at, len: size })
    }

    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` if they reach beyond the file.
    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let end = usize::try_from(offset)
            .ok()
            .and_then(|o| o.checked_add(bytes.len()));
        if end.is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // SAFETY: the destination lies within the mapping (checked above), whose file cannot shrink and whose pages are there or
        // reserved, so that the fault finds one. It overlaps nothing that Rust owns. A guest that reads meanwhile sees old bytes or
        // new ones; no reference of ours points there.
        unsafe {
            let to = self.at.as_ptr().add(offset as usize);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
        Ok(())
    }
}

impl Drop for HugeWindow {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone, and nothing refers to it after this. munmap of a whole mapping does not fail.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.len) };
    }
}

fn too_few(len: u64) -> io::Error {
    let text = format!(
        "guest memory of {} needs {} huge pages of 2 MiB, and {} are available: raise vm.nr_hugepages on this host, or give \
         the pod no huge pages",
        Bytes(len),
        len.div_ceil(HUGE_PAGE),
        huge_pages_available().0 / HUGE_PAGE
    );
    io::Error::new(io::ErrorKind::StorageFull, text)
}

const _: () = assert!(HUGE_PAGE.is_multiple_of(PAGE_SIZE as u64));
