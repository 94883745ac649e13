//! What makes a guest that was started from a template one of its own.
//!
//! What containers get is drawn after this: their addresses in memory, the boot id (which the kernel makes when it is first read), and
//! every random number. The kernel's own place in memory, and what it drew while the template was made, are shared by all pods
//! of a template.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use guest_agent::protocol::message::Identity;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

use crate::{disks, furniture, network, stats, sys};

/// What containers find as [`PRODUCT_UUID`], if it is there.
pub(crate) const OWN_UUID: &str = "/run/product_uuid";

/// The VM's UUID in sysfs, which the kernel read from the firmware when it started.
pub(crate) const PRODUCT_UUID: &str = "/sys/devices/virtual/dmi/id/product_uuid";

/// As many random bytes as the kernel's generator can take in (256 bits) at the least.
const LEAST_ENTROPY: usize = 32;

/// Becomes the guest that `identity` says. Nothing of a pod may run yet.
pub(crate) fn take(identity: &Identity) -> Result<()> {
    let entropy = &identity.entropy.0;
    ensure!(
        entropy.len() >= LEAST_ENTROPY,
        "{} random bytes are too few: send {LEAST_ENTROPY} at least",
        entropy.len()
    );
    sys::reseed(entropy).context("keying the kernel's random generator anew")?;
    set_clock(identity.unix_ns).context("setting the clock")?;
    network::readdress(identity.old_mac, identity.mac)?;
    name(&identity.uuid)
}

/// Gives containers another UUID to find than the VM's own.
fn name(uuid: &str) -> Result<()> {
    // As the kernel has it.
    let mut file = File::options();
    let file = file.write(true).create(true).mode(0o400).open(OWN_UUID);
    file.and_then(|mut file| writeln!(file, "{uuid}"))
        .with_context(|| format!("writing {OWN_UUID}"))
}

/// Gives memory back that is not needed. What was in free pages before is gone: the host keeps no page of zeros.
pub(crate) fn settle() -> Result<()> {
    // Before caches are dropped: what these look up and make, guests that start from this one need not.
    network::prepare()?;
    disks::prepare()?;
    name("")?;
    furniture::prepare()?;
    nix::unistd::sync();
    for (path, value) in [
        ("/proc/sys/vm/drop_caches", "3"),
        ("/proc/sys/vm/compact_memory", "1"),
    ] {
        // The second is an option of the kernel.
        if fs::exists(path).unwrap_or(false) {
            fs::write(path, value).with_context(|| format!("writing to {path}"))?;
        }
    }
    let meminfo = fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
    let total = stats::memory(&meminfo, "MemTotal:");
    let free = stats::memory(&meminfo, "MemFree:");
    // The kernel begins to look for more below one and a half times this (Documentation/admin-guide/sysctl/vm.rst); and page tables
    // take one page of each 512.
    let least = fs::read_to_string("/proc/sys/vm/min_free_kbytes").unwrap_or_default();
    let least = least.trim_end().parse::<u64>().unwrap_or(free >> 10) << 10;
    let zeros = free.saturating_sub(2 * least + total / 128);
    sys::zero_free_memory(zeros).context("filling free memory with zeros")
}

/// Sets CLOCK_REALTIME.
pub(crate) fn set_clock(unix_ns: u64) -> nix::Result<()> {
    let time = TimeSpec::from_duration(Duration::from_nanos(unix_ns));
    clock_settime(ClockId::CLOCK_REALTIME, time)
}
