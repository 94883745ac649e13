//! The calls that no library has.

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

/// Begins to write what of the file is dirty in the page cache to the device. It makes nothing durable (sync_file_range(2)): a sync that
/// follows has less to wait for.
///
/// # Errors
/// The file system cannot do that.
pub(super) fn begin_writeback(file: &File) -> io::Result<()> {
    // SAFETY: the call takes no pointer; 0 and 0 stand for all of the file.
    let begun =
        unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
    match begun {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
