//! Unsafe island: what the child does between fork and exec.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::unistd::setsid;

/// Inherited descriptors get numbers from here up, clear of what std uses between fork and exec.
const FIRST_NUMBER: RawFd = 200;

/// A duplicate of `fd` whose number will be its number in the child, too.
pub(super) fn numbered(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let number = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(FIRST_NUMBER))?;
    // SAFETY: fcntl has just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(number) })
}

/// Prepares `command`: its own session, traced by the spawning thread from exec on, and of our
/// descriptors only `kept` (under the same numbers) and its standard streams.
///
/// The descriptors stay close-on-exec here, so that no other child of ours can inherit them.
pub(super) fn prepare(command: &mut Command, kept: &[OwnedFd]) {
    let kept: Vec<RawFd> = kept.iter().map(AsRawFd::as_raw_fd).collect();
    let setup = move || -> io::Result<()> {
        setsid()?;
        // SAFETY: close_range(2) with CLOSE_RANGE_CLOEXEC only sets a flag on descriptors.
        let result = unsafe {
            libc::syscall(
                libc::SYS_close_range,
                3,
                libc::c_uint::MAX,
                libc::CLOSE_RANGE_CLOEXEC,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        for fd in &kept {
            // SAFETY: the numbers are of descriptors that the caller of `spawn` keeps open, and
            // fork has copied them.
            let fd = unsafe { BorrowedFd::borrow_raw(*fd) };
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        // Until it is recorded and let go, it must not outlive us; see inject::survive_parent.
        set_pdeathsig(Signal::SIGKILL)?;
        ptrace::traceme()?;
        Ok(())
    };
    // SAFETY: between fork and exec, `setup` only issues system calls and iterates over memory
    // that was allocated before: it takes no lock and allocates nothing.
    unsafe { command.pre_exec(setup) };
}
