//! Where threads run, and how long they did.

use std::time::Duration;

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

/// Which of the CPUs that this process may use: the sender's is apart from all others'.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// The first.
    Sender,
    /// The last.
    Receiver,
}

/// Binds the calling thread. On a machine with one CPU, both places are the same.
///
/// # Errors
/// The kernel does not tell its CPUs.
pub(crate) fn settle(place: Place) -> Result<()> {
    let all = sched_getaffinity(Pid::from_raw(0)).context("cannot ask for the CPUs")?;
    let mut cpus = (0..CpuSet::count()).filter(|cpu| all.is_set(*cpu).unwrap_or(false));
    let cpu = match place {
        Place::Sender => cpus.next(),
        Place::Receiver => cpus.next_back(),
    };
    let mut one = CpuSet::new();
    one.set(cpu.context("no CPU at all")?)?;
    sched_setaffinity(Pid::from_raw(0), &one).context("cannot choose a CPU")
}

/// How long the calling thread has run, in user space and in the kernel. What soft interrupts do while it sends is in it, unless the
/// kernel was built with IRQ_TIME_ACCOUNTING.
///
/// # Errors
/// The kernel has no such clock.
pub(crate) fn cpu_time() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}
