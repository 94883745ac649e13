//! One cgroup (v2) for each container: its limits, its figures, and where its processes begin.

use std::fs::{self, File};
use std::path::PathBuf;

use anyhow::{Context, Result};
use guest_agent::protocol::message::{Container, ContainerStats};

use crate::boot::CGROUPS;

/// The period that cpu.max divides, in microseconds: the kernel's default.
const CPU_PERIOD_US: u64 = 100_000;

/// The smallest quota that the kernel takes, in microseconds.
const CPU_QUOTA_MIN_US: u64 = 1_000;

/// A container's cgroup.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    dir: File,
}

impl Cgroup {
    /// Makes it, with the container's limits.
    pub(crate) fn create(container: &Container) -> Result<Self> {
        let path = PathBuf::from(CGROUPS).join(&container.name);
        fs::create_dir_all(&path)
            .with_context(|| format!("making the cgroup {}", path.display()))?;
        let dir = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        let group = Self { path, dir };
        if let Some(limit) = container.memory_limit {
            group.write("memory.max", &limit.to_string())?;
        }
        if let Some(milli) = container.cpu_limit_milli {
            group.write("cpu.max", &cpu_max(milli))?;
        }
        Ok(group)
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

    /// What it uses.
    pub(crate) fn stats(&self, name: &str) -> ContainerStats {
        let read = |file: &str| fs::read_to_string(self.path.join(file)).unwrap_or_default();
        ContainerStats {
            name: name.to_owned(),
            memory: read("memory.current").trim_end().parse().unwrap_or(0),
            cpu_us: usage_us(&read("cpu.stat")),
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

fn usage_us(cpu_stat: &str) -> u64 {
    cpu_stat
        .lines()
        .find_map(|l| l.strip_prefix("usage_usec "))
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
    fn cpu_use_is_found_in_cpu_stat() {
        assert_eq!(usage_us("usage_usec 4321\nuser_usec 1\n"), 4321);
        assert_eq!(usage_us(""), 0);
    }
}
