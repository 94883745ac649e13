//! A CPU limit on single threads of QEMU: one control group for each, beside their process's own.
//!
//! One for each, because a limit on all of them together would let one busy virtual CPU have the share of those that
//! idle. Everything here blocks: callers are threads that may.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::mark::Mark;
use super::place::{Place, Version, places};
use super::{Percent, ThrottleError};

/// The period of the limit, in microseconds. The kernel grants no less than 1 ms of each (`min_cfs_quota_period`),
/// which is the 5 % that [`Percent::MAX`] leaves. A shorter one could not; a longer one keeps a thread that was
/// stopped with QEMU's big lock in its hand waiting for longer, and the monitor with it: at 95 %, answers took 0.5 ms
/// at the median and up to 140 ms.
const PERIOD_US: u64 = 20_000;
/// How long a group may stay busy after its threads have left.
const EMPTY_WITHIN: Duration = Duration::from_millis(500);

/// Groups of the threads of one VM's virtual CPUs. Dropping it removes them.
#[derive(Debug)]
pub(super) struct Groups {
    place: Place,
    /// What their names begin with: unique to the process.
    prefix: String,
    mark: Mark,
    removed: bool,
}

impl Groups {
    /// Makes a group for each thread and moves it there; without a limit so far.
    pub(super) fn make(
        dir: &Path,
        pid: i32,
        start_time: u64,
        threads: &[i32],
    ) -> Result<Self, ThrottleError> {
        let read = |path: &str| {
            std::fs::read_to_string(path).map_err(|source| ThrottleError::Group {
                step: "read",
                path: path.into(),
                source,
            })
        };
        let places = places(
            &read(&format!("/proc/{pid}/cgroup"))?,
            &read("/proc/self/mountinfo")?,
        );
        let place = places.into_iter().find(Place::is_usable);
        let place = place.ok_or(ThrottleError::NoController {
            why: "the CPU controller is not mounted, or not enabled for the group that QEMU is in",
        })?;
        let groups = Self {
            prefix: format!("migrator-throttle-{pid}-{start_time}-"),
            mark: Mark::new(dir),
            removed: false,
            place,
        };
        groups.mark.groups(&groups.place, &groups.prefix)?;
        // From here on, whatever fails is undone by dropping it.
        groups.place.remove(&groups.prefix)?;
        for (number, thread) in threads.iter().enumerate() {
            let group = groups.place.dir.join(format!("{}{number}", groups.prefix));
            groups.place.make(&group)?;
            write(&group.join(groups.place.members()), &thread.to_string())?;
        }
        Ok(groups)
    }

    /// Sets the limit of each.
    pub(super) fn limit(&self, percent: Percent) -> Result<(), ThrottleError> {
        self.place
            .each(&self.prefix)?
            .iter()
            .try_for_each(|group| self.place.limit(group, percent))
    }

    /// Moves the threads back, and removes the groups.
    pub(super) fn remove(mut self) -> Result<(), ThrottleError> {
        self.removed = true;
        self.undo()
    }

    fn undo(&self) -> Result<(), ThrottleError> {
        self.place.remove(&self.prefix)?;
        self.mark.remove()
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        if !self.removed
            && let Err(error) = self.undo()
        {
            let reason = std::error::Error::source(&error).map(ToString::to_string);
            tracing::warn!(%error, reason, "a throttle's control groups stay behind");
        }
    }
}

impl Place {
    fn is_usable(&self) -> bool {
        match self.version {
            // The root has no limit, but its children do: any writable folder will do.
            Version::V1 => self.dir.join(self.members()).exists(),
            Version::V2 => {
                let controllers = std::fs::read_to_string(self.dir.join("cgroup.controllers"));
                controllers.is_ok_and(|list| list.split_whitespace().any(|one| one == "cpu"))
            }
        }
    }

    /// The file that threads are moved by.
    fn members(&self) -> &'static str {
        match self.version {
            Version::V1 => "tasks",
            Version::V2 => "cgroup.threads",
        }
    }

    fn make(&self, group: &Path) -> Result<(), ThrottleError> {
        std::fs::create_dir(group).map_err(|source| ThrottleError::Group {
            step: "make",
            path: group.to_owned(),
            source,
        })?;
        match self.version {
            Version::V1 => write(&group.join("cpu.cfs_period_us"), &PERIOD_US.to_string()),
            Version::V2 => {
                // Only a threaded group takes single threads; and the controller is enabled after it: a group with
                // processes in it may hand controllers on to threaded children only. It stays enabled, because another
                // VM's groups may need it.
                write(&group.join("cgroup.type"), "threaded")?;
                write(&self.dir.join("cgroup.subtree_control"), "+cpu")
            }
        }
    }

    fn limit(&self, group: &Path, percent: Percent) -> Result<(), ThrottleError> {
        let quota_us = PERIOD_US * u64::from(100 - percent.get()) / 100;
        let (file, off, on) = match self.version {
            Version::V1 => ("cpu.cfs_quota_us", "-1".to_owned(), quota_us.to_string()),
            Version::V2 => (
                "cpu.max",
                format!("max {PERIOD_US}"),
                format!("{quota_us} {PERIOD_US}"),
            ),
        };
        let file = group.join(file);
        if percent == Percent::OFF {
            return write(&file, &off);
        }
        match write(&file, &on) {
            // Version 1 refuses a limit above that of a group around it, which then is the tighter one.
            Err(ThrottleError::Group { source, .. })
                if source.raw_os_error() == Some(libc::EINVAL) =>
            {
                write(&file, &off)
            }
            done => done,
        }
    }

    /// The groups whose names begin so.
    fn each(&self, prefix: &str) -> Result<Vec<PathBuf>, ThrottleError> {
        let failed = |source| ThrottleError::Group {
            step: "list",
            path: self.dir.clone(),
            source,
        };
        let mut found = Vec::new();
        let entries = match std::fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            // The process has ended, and the group that it was in is gone as well.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(found),
            Err(error) => return Err(failed(error)),
        };
        for entry in entries {
            let entry = entry.map_err(failed)?;
            if entry.file_name().to_string_lossy().starts_with(prefix) {
                found.push(entry.path());
            }
        }
        Ok(found)
    }

    /// Removes the groups whose names begin so. Threads in them go back to the group around.
    pub(super) fn remove(&self, prefix: &str) -> Result<(), ThrottleError> {
        let groups = self.each(prefix)?;
        // First for all of them: the guest must not wait for what follows.
        for group in &groups {
            self.limit(group, Percent::OFF)?;
        }
        groups.iter().try_for_each(|group| self.remove_one(group))
    }

    fn remove_one(&self, group: &Path) -> Result<(), ThrottleError> {
        let until = Instant::now() + EMPTY_WITHIN;
        loop {
            // Asked from the group, and not remembered: the number of a thread that is gone may be a stranger's.
            let threads = std::fs::read_to_string(group.join(self.members())).unwrap_or_default();
            for thread in threads.lines() {
                match write(&self.dir.join(self.members()), thread) {
                    Err(ThrottleError::Group { source, .. })
                        if source.raw_os_error() == Some(libc::ESRCH) => {}
                    done => done?,
                }
            }
            match std::fs::remove_dir(group) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                Err(error) if is_busy(&error) && Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(source) => {
                    return Err(ThrottleError::Group {
                        step: "remove",
                        path: group.to_owned(),
                        source,
                    });
                }
            }
        }
    }
}

/// A thread that ends is in its group for a moment longer.
fn is_busy(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBUSY)
}

fn write(file: &Path, text: &str) -> Result<(), ThrottleError> {
    // Not created where the kernel has none: opened for writing only.
    let mut options = std::fs::OpenOptions::new();
    let written = options
        .write(true)
        .open(file)
        .and_then(|mut file| io::Write::write_all(&mut file, text.as_bytes()));
    written.map_err(|source| ThrottleError::Group {
        step: "write",
        path: file.to_owned(),
        source,
    })
}
