//! Putting one descriptor of a running process in the place of another of its own: dup3(2), by its own hand.
//!
//! ```text
//! seize, interrupt       the main thread stops, as a rule where it waits: behind the `syscall` of poll(2)
//! point it there again, with dup3's registers; one step
//! registers as before    the kernel begins poll(2) again, as it does after any stop
//! detach
//! ```
//!
//! No code is written: other threads run it. A thread that stands elsewhere than behind a `syscall` goes on, and is
//! stopped again. As long as it is traced, the process dies with this one (`PTRACE_O_EXITKILL`): it never goes on with
//! the registers of a call that is not its own. All calls must come from one thread, ptrace(2).

use std::io;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// An idle main thread is met in poll(2) at the first attempt; one that just woke up, at one of the next.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two attempts.
const PAUSE: Duration = Duration::from_micros(200);
/// linux/ptrace.h: the stop that `PTRACE_INTERRUPT` makes.
const PTRACE_EVENT_STOP: i32 = 128;
/// The `syscall` instruction, 0f 05, as the low two bytes of a little-endian word, and its length.
const SYSCALL: i64 = 0x050f;
const SYSCALL_LEN: u64 = 2;
/// Registers of a thread that is in no system call, as far as restarts are concerned.
const NO_SYSCALL: u64 = u64::MAX;

/// Makes `to` another name of `from` in process `pid`. Blocks for a fraction of a millisecond.
///
/// # Errors
/// The process is gone, traced by another, busy, or refuses. If it was stopped in the middle of it, it is killed.
pub(super) fn replace_fd(pid: i32, from: RawFd, to: RawFd) -> io::Result<()> {
    let pid = Pid::from_raw(pid);
    ptrace::seize(pid, Options::PTRACE_O_EXITKILL)?;
    let done = interrupted(pid).and_then(|before| {
        let result = dup3(pid, before, from, to);
        ptrace::setregs(pid, before)?;
        result
    });
    match done {
        Ok(()) => Ok(ptrace::detach(pid, None)?),
        Err(error) => {
            // Whatever it is doing, it must not go on with another call's registers.
            let _ = nix::sys::signal::kill(pid, Signal::SIGKILL);
            let _ = ptrace::detach(pid, None);
            Err(error)
        }
    }
}

/// Stops the main thread behind a `syscall`; its registers.
fn interrupted(pid: Pid) -> io::Result<libc::user_regs_struct> {
    let until = Instant::now() + PATIENCE;
    loop {
        ptrace::interrupt(pid)?;
        await_stop(pid, PTRACE_EVENT_STOP)?;
        let regs = ptrace::getregs(pid)?;
        let at = regs.rip.wrapping_sub(SYSCALL_LEN) as ptrace::AddressType;
        if ptrace::read(pid, at)? & 0xffff == SYSCALL {
            return Ok(regs);
        }
        if Instant::now() >= until {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        ptrace::cont(pid, None)?;
        std::thread::sleep(PAUSE);
    }
}

fn dup3(pid: Pid, before: libc::user_regs_struct, from: RawFd, to: RawFd) -> io::Result<()> {
    let number = |fd: RawFd| u64::try_from(fd).map_err(io::Error::other);
    let mut call = before;
    call.rip = before.rip.wrapping_sub(SYSCALL_LEN);
    call.rax = libc::SYS_dup3 as u64;
    call.orig_rax = NO_SYSCALL;
    call.rdi = number(from)?;
    call.rsi = number(to)?;
    call.rdx = libc::O_CLOEXEC as u64;
    ptrace::setregs(pid, call)?;
    ptrace::step(pid, None)?;
    await_stop(pid, 0)?;
    let result = ptrace::getregs(pid)?.rax as i64;
    // The kernel returns errors as -4095..=-1.
    match i32::try_from(result) {
        Ok(done) if done == to => Ok(()),
        Ok(errno @ -4095..=-1) => Err(Errno::from_raw(-errno).into()),
        Ok(_) | Err(_) => Err(io::Error::other(format!("dup3 returned {result}"))),
    }
}

/// Awaits the stop by this event, or by a single step (0). Any other one is an error: this one is alone with a process that
/// has nothing to do.
fn await_stop(pid: Pid, event: i32) -> io::Result<()> {
    loop {
        match waitpid(pid, Some(WaitPidFlag::__WALL)) {
            Ok(WaitStatus::PtraceEvent(_, Signal::SIGTRAP, found)) if found == event => {
                return Ok(());
            }
            Ok(WaitStatus::Stopped(_, Signal::SIGTRAP)) if event == 0 => return Ok(()),
            Ok(other) => {
                return Err(io::Error::other(format!(
                    "the process did not stop as expected: {other:?}"
                )));
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_that_waits_reads_from_the_other_descriptor_from_then_on() {
        let (reader, mut other) = io::pipe().unwrap();
        let (mut answers, output) = io::pipe().unwrap();
        // It copies line by line, and waits in read(2) or poll(2) in between. Its standard error is the other pipe.
        let mut child = Command::new("sh")
            .args(["-c", "exec 7<&2; while read line; do echo $line; done"])
            .stdin(Stdio::piped())
            .stdout(output)
            .stderr(Stdio::from(std::os::fd::OwnedFd::from(reader)))
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let mut said = move |wanted: &str| {
            let mut text = vec![0; wanted.len()];
            answers.read_exact(&mut text).unwrap();
            assert_eq!(String::from_utf8_lossy(&text), wanted);
        };
        let mut first = child.stdin.take().unwrap();
        first.write_all(b"one\n").unwrap();
        said("one\n");
        replace_fd(pid, 7, 0).unwrap();
        other.write_all(b"two\n").unwrap();
        // A read that was under way began anew, with the new one.
        said("two\n");
        let error = replace_fd(pid, 99, 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
        assert!(!child.wait().unwrap().success(), "it was not killed");
    }
}
