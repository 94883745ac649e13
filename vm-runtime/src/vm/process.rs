//! The QEMU process, as child or as a stranger that an earlier service started.

use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::process::ExitStatus;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use tokio::sync::watch;
use tokio::time::timeout;

use super::pidfd;

/// How long the kernel may take to end a killed process: its memory has to be given back.
const KILL_DEADLINE: Duration = Duration::from_secs(20);

#[derive(Debug)]
pub(super) struct Process {
    pub(super) start_time: u64,
    pidfd: OwnedFd,
    /// The exit status, if it is our child: the thread that started it reaps it.
    status: Option<watch::Receiver<Option<ExitStatus>>>,
}

impl Process {
    /// A child that the calling code keeps from being reaped until this has returned.
    pub(super) fn child(pid: i32, status: watch::Receiver<Option<ExitStatus>>) -> io::Result<Self> {
        Ok(Self {
            start_time: start_time(pid)?,
            pidfd: pidfd::open(pid)?,
            status: Some(status),
        })
    }

    /// The process of this number that began at this time; `NotFound` if it is gone.
    pub(super) fn find(pid: i32, began: u64) -> io::Result<Self> {
        let gone = || io::Error::from(io::ErrorKind::NotFound);
        // First the pidfd, then the start time: what the pidfd holds cannot change any more.
        let pidfd = match pidfd::open(pid) {
            Ok(pidfd) => pidfd,
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Err(gone()),
            Err(error) => return Err(error),
        };
        if start_time(pid).map_err(|_| gone())? != began || has_exited(&pidfd)? {
            return Err(gone());
        }
        Ok(Self {
            start_time: began,
            pidfd,
            status: None,
        })
    }

    pub(super) fn get_fd(&self, number: RawFd) -> io::Result<OwnedFd> {
        pidfd::get_fd(self.pidfd.as_fd(), number)
    }

    /// Ends when the process has exited.
    pub(super) async fn exited(&self) -> io::Result<()> {
        let watched = pidfd::watch(&self.pidfd)?;
        // Readiness is enough: an exited process does not come back.
        let _guard = watched.readable().await?;
        Ok(())
    }

    /// The exit status, if it was our child and has exited. Call after `exited`.
    pub(super) async fn status(&self) -> Option<ExitStatus> {
        let mut status = self.status.clone()?;
        let value = status.wait_for(Option::is_some).await.ok()?;
        *value
    }

    /// Kills it, and waits until it is gone.
    pub(super) async fn kill(&self) -> io::Result<()> {
        self.kill_now()?;
        timeout(KILL_DEADLINE, self.exited()).await?
    }

    /// Sends SIGKILL and does not wait.
    pub(super) fn kill_now(&self) -> io::Result<()> {
        self.signal(Signal::SIGKILL)
    }

    /// Sends a signal. One that is gone already needs none.
    pub(super) fn signal(&self, signal: Signal) -> io::Result<()> {
        match pidfd::signal(self.pidfd.as_fd(), signal) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

/// Whether the process has exited, be it reaped or not.
fn has_exited(pidfd: &OwnedFd) -> io::Result<bool> {
    let mut asked = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    Ok(poll(&mut asked, PollTimeout::ZERO)? > 0)
}

/// Field 22 of `/proc/PID/stat`, in clock ticks since boot: with the number, it names a process.
fn start_time(pid: i32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_start_time(&stat)
        .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat makes no sense")))
}

fn parse_start_time(stat: &str) -> Option<u64> {
    field(stat, 22)?.parse().ok()
}

/// Whether the process of this number was suspended by a signal, as field 3 of `/proc/PID/stat` tells.
pub(super) fn is_suspended(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| field(&stat, 3) == Some("T"))
}

/// A field behind the name, numbered as in proc_pid_stat(5).
fn field(stat: &str, number: usize) -> Option<&str> {
    // The second field is the name in parentheses, and may hold blanks and parentheses itself.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(number.checked_sub(3)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 0 0 0 5 6 0 0 20 0 1 0 987654 0 0";
        assert_eq!(parse_start_time(stat), Some(987_654));
        assert_eq!(parse_start_time("7 (a"), None);
    }

    #[test]
    fn a_process_is_found_by_number_and_start_time_only() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let began = start_time(pid).unwrap();
        assert!(Process::find(pid, began).is_ok());
        let other = Process::find(pid, began + 1).unwrap_err();
        assert_eq!(other.kind(), io::ErrorKind::NotFound);
    }

    #[tokio::test]
    async fn a_child_is_suspended_and_goes_on() {
        let mut child = std::process::Command::new("sleep")
            .arg("600")
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let process = Process::child(pid, watch::channel(None).1).unwrap();
        assert!(!is_suspended(pid));
        process.signal(Signal::SIGSTOP).unwrap();
        let until = std::time::Instant::now() + KILL_DEADLINE;
        while !is_suspended(pid) {
            assert!(std::time::Instant::now() < until, "it does not stop");
            std::thread::yield_now();
        }
        process.signal(Signal::SIGCONT).unwrap();
        while is_suspended(pid) {
            assert!(std::time::Instant::now() < until, "it does not go on");
            std::thread::yield_now();
        }
        process.kill().await.unwrap();
        child.wait().unwrap();
    }

    #[tokio::test]
    async fn a_child_is_watched_and_killed_by_its_pidfd() {
        let mut child = std::process::Command::new("sleep")
            .arg("600")
            .spawn()
            .unwrap();
        let (sender, status) = watch::channel(None);
        let pid = i32::try_from(child.id()).unwrap();
        let process = Process::child(pid, status).unwrap();
        process.kill().await.unwrap();
        // Not reaped yet, and gone all the same.
        let gone = Process::find(pid, process.start_time).unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::NotFound);
        sender.send(Some(child.wait().unwrap())).unwrap();
        assert_eq!(process.status().await.unwrap().code(), None);
        process.kill().await.unwrap();
        let gone = Process::find(pid, process.start_time).unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::NotFound);
    }
}
