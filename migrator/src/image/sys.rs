//! The system calls that no safe wrapper here offers: extended attributes. The only unsafe code of the image
//! module.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// fsetxattr(2): sets attribute `name` of an open file or directory.
pub(super) fn fsetxattr(fd: BorrowedFd<'_>, name: &CStr, value: &[u8]) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as it is borrowed, `name` ends in NUL, and the kernel
    // reads `value.len()` bytes from `value`, which is that long; it keeps none of the pointers.
    let result = unsafe {
        libc::fsetxattr(
            fd.as_raw_fd(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            0,
        )
    };
    check(result)
}

/// lsetxattr(2): sets attribute `name` of `path` itself, also if it is a symlink.
pub(super) fn lsetxattr(path: &CStr, name: &CStr, value: &[u8]) -> io::Result<()> {
    // SAFETY: both strings end in NUL, and the kernel reads `value.len()` bytes from `value`, which
    // is that long; it keeps none of the pointers.
    let result = unsafe {
        libc::lsetxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            0,
        )
    };
    check(result)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
