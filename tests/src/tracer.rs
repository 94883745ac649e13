//! Ends a process between two steps of one of its threads: at a system call's return, before the thread does anything else. An unsafe island:
//! what ptrace(2) tells of a call is a union.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use xtask::process::{ProcessId, poll_until};

/// How long the thread may take to be there, and then to make its calls.
const BEGINS: Duration = Duration::from_secs(20);
const CALLS: Duration = Duration::from_secs(10);
/// Between two looks at it.
const LOOK: Duration = Duration::from_micros(20);

/// linux/ptrace.h.
const PTRACE_SYSCALL_INFO_ENTRY: u8 = 1;
const PTRACE_SYSCALL_INFO_EXIT: u8 = 2;

/// Waits until the process has a thread whose name begins with `name`, and kills the process as that thread's call of this number returns for the
/// `nth` time without an error. False: it makes no so many within 10 s, or ends, and is left alone.
///
/// # Errors
/// There is no such thread, or it may not be traced.
pub fn kill_at(process: &ProcessId, name: &str, call: libc::c_long, nth: u32) -> Result<bool> {
    let mut thread = None;
    poll_until(BEGINS, || {
        thread = find(process, name);
        thread.is_some()
    });
    let thread = thread.with_context(|| format!("{} has no thread {name}", process.what))?;
    ptrace::seize(thread, Options::PTRACE_O_TRACESYSGOOD)?;
    ptrace::interrupt(thread)?;
    let until = Instant::now() + CALLS;
    let mut given_up = false;
    let (mut inside, mut returned) = (false, 0);
    loop {
        match waitpid(thread, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG))? {
            WaitStatus::StillAlive if !given_up && Instant::now() > until => {
                given_up = true;
                ptrace::interrupt(thread)?;
            }
            WaitStatus::StillAlive => std::thread::sleep(LOOK),
            WaitStatus::Exited(..) | WaitStatus::Signaled(..) => return Ok(false),
            _ if given_up => {
                ptrace::detach(thread, None)?;
                return Ok(false);
            }
            WaitStatus::PtraceSyscall(_) => {
                let info = ptrace::syscall_info(thread)?;
                match info.op {
                    PTRACE_SYSCALL_INFO_ENTRY => inside = is_entry(&info, call),
                    PTRACE_SYSCALL_INFO_EXIT if inside && is_success(&info) => returned += 1,
                    _ => {}
                }
                if returned == nth {
                    process.signal(Signal::SIGKILL)?;
                    // Until it is gone, it is this process that keeps it.
                    while waitpid(thread, Some(WaitPidFlag::__WALL)).is_ok() {}
                    return Ok(true);
                }
                ptrace::syscall(thread, None)?;
            }
            WaitStatus::Stopped(_, signal) => ptrace::syscall(thread, signal)?,
            _ => ptrace::syscall(thread, None)?,
        }
    }
}

fn find(process: &ProcessId, name: &str) -> Option<Pid> {
    let tasks = PathBuf::from(format!("/proc/{}/task", process.pid));
    let mut threads = std::fs::read_dir(tasks).ok()?.flatten();
    let thread = threads.find(|thread| {
        let comm = std::fs::read_to_string(thread.path().join("comm"));
        comm.is_ok_and(|comm| comm.starts_with(name))
    })?;
    let number = thread.file_name().to_str()?.parse().ok()?;
    Some(Pid::from_raw(number))
}

/// Whether a stop at the entry is one of this call.
fn is_entry(info: &libc::ptrace_syscall_info, call: libc::c_long) -> bool {
    // SAFETY: the kernel has filled this part of the union in, as `op` says.
    let number = unsafe { info.u.entry.nr };
    i64::try_from(number) == Ok(call)
}

/// Whether a stop at the exit is one without an error.
fn is_success(info: &libc::ptrace_syscall_info) -> bool {
    // SAFETY: as above.
    unsafe { info.u.exit.is_error == 0 }
}
