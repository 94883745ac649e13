//! Figures about the guest, from /proc.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use guest_agent::protocol::message::{ContainerStats, Stats};

use crate::boot::uptime_ms;

/// Collects them.
pub(crate) fn collect(containers: Vec<ContainerStats>) -> Stats {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let loadavg = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let clock = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Stats {
        uptime_ms: uptime_ms(),
        memory_total: memory(&meminfo, "MemTotal:"),
        memory_free: memory(&meminfo, "MemFree:"),
        memory_available: memory(&meminfo, "MemAvailable:"),
        load_milli: load_milli(&loadavg),
        clock_unix_ns: u64::try_from(clock.as_nanos()).unwrap_or(u64::MAX),
        containers,
    }
}

/// A line of /proc/meminfo, in bytes.
pub(crate) fn memory(meminfo: &str, key: &str) -> u64 {
    meminfo
        .lines()
        .find_map(|l| l.strip_prefix(key))
        .and_then(|l| l.trim().strip_suffix(" kB"))
        .and_then(|n| n.trim().parse::<u64>().ok())
        .map_or(0, |kib| kib << 10)
}

fn load_milli(loadavg: &str) -> u32 {
    let load: f64 = loadavg
        .split(' ')
        .next()
        .and_then(|l| l.parse().ok())
        .unwrap_or(0.0);
    (load * 1000.0) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_come_in_bytes_and_thousandths() {
        let meminfo = "MemTotal:         494124 kB\nMemFree:          400000 kB\n";
        assert_eq!(memory(meminfo, "MemFree:"), 400_000 << 10);
        assert_eq!(memory(meminfo, "MemAvailable:"), 0);
        assert_eq!(load_milli("0.52 0.30 0.10 1/88 301\n"), 520);
    }
}
