//! Unsafe island of the tests: a mapping of guest memory, and a userfaultfd, in this very process.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use super::{GuestMemory, handshake};
use crate::units::{Bytes, PAGE_SIZE, PageIndex};

/// Guest memory that this process maps, as a VMM does.
pub(super) struct Own {
    memory: GuestMemory,
    uffd: OwnedFd,
    at: NonNull<u8>,
}

// SAFETY: the mapping is the process's, and all access to it is by volatile bytes.
unsafe impl Sync for Own {}

impl Own {
    /// `pages` pages, all holes.
    pub(super) fn new(pages: u64) -> Self {
        let memory = GuestMemory::create("own", Bytes(pages * PAGE_SIZE as u64)).unwrap();
        // SAFETY: userfaultfd(2) takes flags alone, and its result is a descriptor that nobody else knows.
        let uffd = unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK);
            assert!(fd >= 0, "{}", std::io::Error::last_os_error());
            OwnedFd::from_raw_fd(fd as i32)
        };
        handshake(uffd.as_fd()).unwrap();
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                memory.len().0 as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                memory.as_fd().as_raw_fd(),
                0,
            )
        };
        assert_ne!(at, libc::MAP_FAILED);
        let at = NonNull::new(at.cast()).unwrap();
        Self { memory, uffd, at }
    }

    pub(super) fn uffd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }

    pub(super) fn pid(&self) -> i32 {
        i32::try_from(std::process::id()).unwrap()
    }

    pub(super) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The first byte of a page, read as a guest would.
    pub(super) fn read(&self, page: PageIndex) -> u8 {
        assert!(page.0 < self.memory.pages());
        // SAFETY: the page lies within the mapping.
        unsafe { self.at.add(page.0 as usize * PAGE_SIZE).read_volatile() }
    }

    /// Sets the first byte of a page, as a guest would.
    pub(super) fn write(&self, page: PageIndex, value: u8) {
        assert!(page.0 < self.memory.pages());
        // SAFETY: the page lies within the mapping.
        unsafe {
            self.at
                .add(page.0 as usize * PAGE_SIZE)
                .write_volatile(value)
        }
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone, and nothing refers to it after this.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.memory.len().0 as usize) };
    }
}
