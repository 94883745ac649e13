//! The one call that no library has.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Reads what is in the page cache from `offset` on, and never waits for a device; the number of bytes.
///
/// # Errors
/// `WouldBlock`: the first of it is not there.
pub(super) fn read_cached(file: &File, data: &mut [u8], offset: u64) -> io::Result<usize> {
    let offset = libc::off64_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    let part = libc::iovec {
        iov_base: data.as_mut_ptr().cast(),
        iov_len: data.len(),
    };
    // SAFETY: `part` is one range of writable memory that is borrowed for the call, and the kernel keeps no pointer to it.
    let read = unsafe { libc::preadv2(file.as_raw_fd(), &part, 1, offset, libc::RWF_NOWAIT) };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}
