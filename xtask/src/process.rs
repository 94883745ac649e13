//! Processes named by pid *and* start time, so that a recycled pid is never signalled.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// A process that somebody started, and its identity over time.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// What it is, for messages.
    pub what: String,
    /// Its pid.
    pub pid: i32,
    /// Field 22 of `/proc/PID/stat`: clock ticks from boot to its start.
    pub start_time: u64,
}

impl ProcessId {
    /// The identity of a process that lives now.
    ///
    /// # Errors
    /// It does not live.
    pub fn of(what: &str, pid: i32) -> Result<ProcessId> {
        let start_time =
            start_time(pid).with_context(|| format!("{what} (pid {pid}) is not running"))?;
        Ok(ProcessId {
            what: what.to_owned(),
            pid,
            start_time,
        })
    }

    /// The identity of a child that was not waited for, which may have ended already.
    ///
    /// # Errors
    /// It is no such child.
    pub fn of_child(what: &str, pid: i32) -> Result<ProcessId> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))
            .with_context(|| format!("{what} (pid {pid}) was waited for already"))?;
        let (_, start_time) =
            parse_stat(&stat).with_context(|| format!("/proc/{pid}/stat says: {stat}"))?;
        Ok(ProcessId {
            what: what.to_owned(),
            pid,
            start_time,
        })
    }

    /// Whether this very process still runs (a zombie does not).
    pub fn alive(&self) -> bool {
        start_time(self.pid) == Some(self.start_time)
    }

    /// Sends a signal; a process that is gone is no error.
    ///
    /// # Errors
    /// It may not be signalled.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        if !self.alive() {
            return Ok(());
        }
        match kill(Pid::from_raw(self.pid), signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(error) => Err(error)
                .with_context(|| format!("cannot signal {} (pid {})", self.what, self.pid)),
        }
    }

    /// Asks it to end with SIGTERM, and after `grace` makes it.
    ///
    /// # Errors
    /// It may not be signalled, or it outlives SIGKILL by 5 s.
    pub fn end(&self, grace: Duration) -> Result<()> {
        if grace > Duration::ZERO {
            self.signal(Signal::SIGTERM)?;
            if self.gone_within(grace) {
                return Ok(());
            }
        }
        self.signal(Signal::SIGKILL)?;
        if !self.gone_within(Duration::from_secs(5)) {
            anyhow::bail!("{} (pid {}) outlived SIGKILL by 5 s", self.what, self.pid);
        }
        Ok(())
    }

    fn gone_within(&self, limit: Duration) -> bool {
        poll_until(limit, || !self.alive())
    }
}

/// Polls `condition` every 5 ms until it holds; `false` after `limit`.
pub fn poll_until(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Start time of a process that runs: a zombie does not, unless threads of it have not ended yet.
fn start_time(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (runs, start_time) = parse_stat(&stat)?;
    (runs || threads(pid) > 1).then_some(start_time)
}

fn threads(pid: i32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count)
}

/// Whether its first thread runs (a zombie does not) and its start time, out of a `/proc/PID/stat` line (proc(5)); the name in parentheses may
/// hold anything.
fn parse_stat(stat: &str) -> Option<(bool, u64)> {
    let fields: Vec<&str> = stat
        .get(stat.rfind(')')? + 1..)?
        .split_ascii_whitespace()
        .collect();
    let runs = !matches!(*fields.first()?, "Z" | "X");
    Some((runs, fields.get(19)?.parse().ok()?))
}

/// Every process that lives in the network namespace `name`.
pub fn in_netns(name: &str) -> Vec<i32> {
    let Ok(wanted) = std::fs::metadata(crate::netns::path(name)) else {
        return Vec::new();
    };
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| {
            std::fs::metadata(format!("/proc/{pid}/ns/net"))
                .is_ok_and(|net| same_file(&net, &wanted))
        })
        .collect()
}

fn same_file(a: &std::fs::Metadata, b: &std::fs::Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    a.ino() == b.ino() && a.dev() == b.dev()
}

/// Whether the command line of `pid` mentions `dir`.
pub fn mentions(pid: i32, dir: &Path) -> bool {
    let Some(dir) = dir.to_str() else {
        return false;
    };
    std::fs::read(format!("/proc/{pid}/cmdline"))
        .is_ok_and(|line| String::from_utf8_lossy(&line).contains(dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_spaces_and_parentheses_does_not_shift_the_fields() {
        let stat =
            "77 (a) b (c)) S 1 77 77 0 -1 4194560 100 0 0 0 1 2 0 0 20 0 1 0 4242 1000 10 1844";
        assert_eq!(parse_stat(stat), Some((true, 4242)));
    }

    #[test]
    fn a_zombie_does_not_count_as_running() {
        let stat = "77 (x) Z 1 77 77 0 -1 4194560 100 0 0 0 1 2 0 0 20 0 1 0 4242 1000 10 1844";
        assert_eq!(parse_stat(stat), Some((false, 4242)));
    }

    #[test]
    fn a_recycled_pid_is_not_alive() {
        let me = ProcessId::of("this test", std::process::id() as i32).unwrap();
        assert!(me.alive());
        assert!(
            !ProcessId {
                start_time: me.start_time + 1,
                ..me
            }
            .alive()
        );
    }
}
