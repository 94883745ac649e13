//! Getting a userfaultfd that belongs to QEMU's address space, from an unmodified QEMU.
//!
//! The child stopped at its first instruction (it asked to be traced before exec). There it is made
//! to execute a `syscall` instruction for us: userfaultfd(2). The two bytes of its code and its
//! registers are then put back as they were. All calls must come from the thread that forked it,
//! ptrace(2).

use std::io;
use std::os::fd::RawFd;

use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

/// The `syscall` instruction, 0f 05, as the low two bytes of a little-endian word.
const SYSCALL: i64 = 0x050f;

/// Awaits the stop at exec, and makes the child die with us as long as it is traced: what was
/// not handed over yet must not be left behind.
pub(super) fn await_exec(pid: Pid) -> io::Result<()> {
    await_trap(pid)?;
    ptrace::setoptions(pid, ptrace::Options::PTRACE_O_EXITKILL)?;
    Ok(())
}

/// Makes the stopped child create a userfaultfd; gives back its number in the child.
pub(super) fn userfaultfd(pid: Pid) -> io::Result<RawFd> {
    let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
    let fd = syscall(pid, libc::SYS_userfaultfd, [flags, 0])?;
    RawFd::try_from(fd).map_err(io::Error::other)
}

/// Takes the child's death signal back: from here on it survives this service.
pub(super) fn survive_parent(pid: Pid) -> io::Result<()> {
    syscall(pid, libc::SYS_prctl, [libc::PR_SET_PDEATHSIG as u64, 0])?;
    Ok(())
}

/// One system call in the stopped child, which then is as if nothing had happened.
fn syscall(pid: Pid, number: i64, [first, second]: [u64; 2]) -> io::Result<i64> {
    let before = ptrace::getregs(pid)?;
    let at = before.rip as ptrace::AddressType;
    let code = ptrace::read(pid, at)?;
    ptrace::write(pid, at, (code & !0xffff) | SYSCALL)?;

    let mut call = before;
    call.rax = number as u64;
    call.rdi = first;
    call.rsi = second;
    // No system call is under way, so none is to be restarted.
    call.orig_rax = u64::MAX;
    ptrace::setregs(pid, call)?;
    ptrace::step(pid, None)?;
    await_trap(pid)?;
    let result = ptrace::getregs(pid)?.rax as i64;

    ptrace::write(pid, at, code)?;
    ptrace::setregs(pid, before)?;
    // The kernel returns errors as -4095..=-1.
    match i32::try_from(result) {
        Ok(errno @ -4095..=-1) => Err(Errno::from_raw(-errno).into()),
        Ok(_) | Err(_) => Ok(result),
    }
}

/// Lets the child go.
pub(super) fn detach(pid: Pid) -> io::Result<()> {
    Ok(ptrace::detach(pid, None)?)
}

fn await_trap(pid: Pid) -> io::Result<()> {
    loop {
        match waitpid(pid, None) {
            Ok(WaitStatus::Stopped(_, Signal::SIGTRAP)) => return Ok(()),
            Ok(other) => {
                return Err(io::Error::other(format!(
                    "the traced child did not stop as expected: {other:?}"
                )));
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}
