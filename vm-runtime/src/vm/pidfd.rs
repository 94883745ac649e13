//! Unsafe island: pidfd system calls, which the C library has no names for everywhere.
//!
//! pidfd_open(2), pidfd_getfd(2), pidfd_send_signal(2); Linux 5.6 and later.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use libc::{c_int, c_long};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A descriptor of the process, readable once it has exited. Close-on-exec by nature.
pub(super) fn open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: plain integers go in; a new descriptor, or -1, comes out.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    owned(fd)
}

/// A duplicate, in this process, of descriptor `fd` of that process. Close-on-exec by nature.
pub(super) fn get_fd(pidfd: BorrowedFd<'_>, fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: plain integers go in; a new descriptor, or -1, comes out.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) };
    owned(fd)
}

/// Sends a signal to that very process, never to a later one of the same number.
pub(super) fn signal(pidfd: BorrowedFd<'_>, signal: Signal) -> io::Result<()> {
    // SAFETY: a null siginfo is allowed, and makes the kernel fill in what kill(2) would.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal as c_int,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Blocks until that child has exited; it is not reaped.
pub(super) fn await_exit(pid: u32) -> io::Result<()> {
    let pidfd = open(i32::try_from(pid).map_err(io::Error::other)?)?;
    loop {
        let mut asked = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut asked, PollTimeout::NONE) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// A duplicate that the async runtime tells the exit from. Needs a runtime around it.
pub(super) fn watch(pidfd: &OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    let copy = pidfd.try_clone()?;
    // SAFETY: the descriptor is owned by what is registered, always the same one, and is closed
    // only when the registration ends.
    let watched = unsafe { AsyncFd::register_with_interest(copy, Interest::READABLE) }?;
    Ok(watched)
}

fn owned(fd: c_long) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = c_int::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
