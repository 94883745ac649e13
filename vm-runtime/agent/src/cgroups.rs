//! One cgroup (v2) for each container: its limits, its figures, and where its processes begin.

use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use guest_agent::protocol::message::{Container, ContainerStats};

use crate::boot::CGROUPS;

/// The period that cpu.max divides, in microseconds: the kernel's default.
const CPU_PERIOD_US: u64 = 100_000;

/// The smallest quota that the kernel takes, in microseconds.
const CPU_QUOTA_MIN_US: u64 = 1_000;

/// Most processes and threads of one container: half of what the kernel has numbers for, so that one that forks without end leaves
/// room for the others (`kernel.pid_max`, 32768).
const PIDS_MAX: u32 = 16_384;

/// A container's cgroup.
#[derive(Clone, Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    dir: Arc<File>,
}

/// All cgroups, in the order in which they were made, and the containers that they are for.
static MADE: Mutex<Vec<(Option<String>, Cgroup)>> = Mutex::new(Vec::new());

fn made() -> MutexGuard<'static, Vec<(Option<String>, Cgroup)>> {
    MADE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes what the first container will need.
pub(crate) fn prepare() -> Result<Cgroup> {
    let mut made = made();
    if made.is_empty() {
        made.push((None, Cgroup::make(0)?));
    }
    Ok(made[0].1.clone())
}

impl Cgroup {
    /// The container's, with its limits; the same each time that it is started.
    pub(crate) fn of(container: &Container) -> Result<Self> {
        let mut made = made();
        let own = made
            .iter()
            .position(|(owner, _)| owner.as_ref().is_none_or(|name| *name == container.name));
        let own = match own {
            Some(own) => own,
            None => {
                let group = Self::make(made.len())?;
                made.push((None, group));
                made.len() - 1
            }
        };
        let (owner, group) = &mut made[own];
        *owner = Some(container.name.clone());
        group.limit(container)?;
        Ok(group.clone())
    }

    /// By number: a template has made the first one before anybody knows what its container is called.
    fn make(number: usize) -> Result<Self> {
        let path = PathBuf::from(CGROUPS).join(format!("container{number}"));
        fs::create_dir_all(&path)
            .with_context(|| format!("making the cgroup {}", path.display()))?;
        let dir = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        let group = Self {
            path,
            dir: Arc::new(dir),
        };
        group.write("pids.max", &PIDS_MAX.to_string())?;
        // As the kubelet has it: half a container is of no use.
        group.write("memory.oom.group", "1")?;
        Ok(group)
    }

    fn limit(&self, container: &Container) -> Result<()> {
        if let Some(limit) = container.memory_limit {
            self.write("memory.max", &limit.to_string())?;
        }
        if let Some(milli) = container.cpu_limit_milli {
            self.write("cpu.max", &cpu_max(milli))?;
        }
        Ok(())
    }

    /// Its folder, for clone3.
    pub(crate) fn dir(&self) -> &File {
        &self.dir
    }

    /// Kills everything in it.
    pub(crate) fn kill(&self) {
        // A cgroup that is empty already has nothing to refuse.
        self.write("cgroup.kill", "1").ok();
    }

    /// How many of its processes were killed because there was no more memory.
    pub(crate) fn oom_kills(&self) -> u64 {
        let events = fs::read_to_string(self.path.join("memory.events"));
        field(&events.unwrap_or_default(), "oom_kill ")
    }

    /// What it uses.
    pub(crate) fn stats(&self, name: &str) -> ContainerStats {
        let read = |file: &str| fs::read_to_string(self.path.join(file)).unwrap_or_default();
        ContainerStats {
            name: name.to_owned(),
            memory: read("memory.current").trim_end().parse().unwrap_or(0),
            cpu_us: field(&read("cpu.stat"), "usage_usec "),
        }
    }

    fn write(&self, file: &str, value: &str) -> Result<()> {
        let path = self.path.join(file);
        fs::write(&path, value).with_context(|| format!("writing `{value}` to {}", path.display()))
    }
}

fn cpu_max(milli: u32) -> String {
    let quota = (u64::from(milli) * CPU_PERIOD_US / 1000).max(CPU_QUOTA_MIN_US);
    format!("{quota} {CPU_PERIOD_US}")
}

/// A number of a file of lines such as `usage_usec 12`.
fn field(text: &str, name: &str) -> u64 {
    text.lines()
        .find_map(|l| l.strip_prefix(name))
        .and_then(|n| n.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_limits_become_quotas_of_the_period() {
        assert_eq!(cpu_max(1500), "150000 100000");
        assert_eq!(cpu_max(1), "1000 100000");
    }

    #[test]
    fn figures_are_found_by_their_names() {
        let cpu = "usage_usec 4321\nuser_usec 1\n";
        assert_eq!(field(cpu, "usage_usec "), 4321);
        assert_eq!(
            field("oom 1\noom_kill 2\noom_group_kill 1\n", "oom_kill "),
            2
        );
        assert_eq!(field("", "oom_kill "), 0);
    }
}
