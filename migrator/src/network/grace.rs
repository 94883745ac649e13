//! Waiting until every frame that saw the network as it was has got where it was going.
//!
//! A frame passes the gate and enters the TAP's queue, or the park's, with soft interrupts off on its CPU
//! (`__dev_queue_xmit` in Linux's net/core/dev.c). Without PREEMPT_RT no task is scheduled on a CPU meanwhile. So once a
//! task of ours has run on a CPU, whatever was under way there is done: one visit to each CPU, in tens of microseconds,
//! does what the kernel's own grace period does in milliseconds, and it stands between a held pod and its stop.

use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::sys;

/// The kernel's list of CPUs that run, such as `0-3,8`.
const ONLINE: &str = "/sys/devices/system/cpu/online";
/// Reads `1` on a kernel built with PREEMPT_RT.
const REALTIME: &str = "/sys/kernel/realtime";
/// A frame may be handed from the first CPU, which it was on, to another that is emptying the device's queue just then.
const ROUNDS: usize = 2;

/// Waits until no CPU is inside a program run that began before the call: every frame that saw the gate's old word is
/// in its queue. Blocks: for microseconds where every CPU can be visited, else for the kernel's grace period.
///
/// # Errors
/// The kernel has no grace period either.
pub(crate) fn grace_period() -> io::Result<()> {
    if preempts_soft_interrupts() {
        return sys::rcu_grace_period();
    }
    // A thread of its own, because its CPUs are changed.
    let visitor = std::thread::Builder::new().name("grace".into());
    match visitor.spawn(visit_all)?.join() {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => {
            tracing::debug!(%error, "not every CPU can be visited: waiting for the kernel's grace period");
            sys::rcu_grace_period()
        }
        Err(_) => sys::rcu_grace_period(),
    }
}

fn preempts_soft_interrupts() -> bool {
    Path::new(REALTIME).exists()
}

fn visit_all() -> io::Result<()> {
    // Without the right to it: waits its turn behind other tasks.
    let _ = vm_runtime::sched::prefer_this_thread();
    let online = online()?;
    for _ in 0..ROUNDS {
        for cpu in &online {
            go_to(*cpu)?;
        }
    }
    Ok(())
}

fn online() -> io::Result<Vec<usize>> {
    Ok(parse_list(&std::fs::read_to_string(ONLINE)?).ok_or(Errno::EINVAL)?)
}

/// Returns on that CPU; refused for one that is outside the service's cpuset, or has gone offline.
fn go_to(cpu: usize) -> io::Result<()> {
    let mut only = CpuSet::new();
    only.set(cpu)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &only)?)
}

/// Does something on each CPU that this process may use, one after the other; it is told which this is, from 0, and how many there are.
///
/// # Errors
/// There is no thread, or no list of CPUs, or none of them may be used.
pub(crate) fn on_each_cpu(work: impl Fn(u16, u16) + Send + 'static) -> io::Result<()> {
    let visit = move || {
        let _ = vm_runtime::sched::prefer_this_thread();
        let mut usable = online()?;
        usable.retain(|cpu| go_to(*cpu).is_ok());
        let cpus = u16::try_from(usable.len()).map_err(|_| Errno::EOVERFLOW)?;
        for (number, cpu) in (0..cpus).zip(usable) {
            go_to(cpu)?;
            work(number, cpus);
        }
        if cpus == 0 {
            return Err(Errno::EPERM.into());
        }
        Ok(())
    };
    let visitor = std::thread::Builder::new().name("each-cpu".into());
    let done = visitor.spawn(visit)?.join();
    done.unwrap_or_else(|_| Err(Errno::ECANCELED.into()))
}

/// `0-1,4` is 0, 1, 4.
fn parse_list(text: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        cpus.extend(first.parse::<usize>().ok()?..=last.parse::<usize>().ok()?);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_lists() {
        assert_eq!(parse_list("0\n"), Some(vec![0]));
        assert_eq!(parse_list("0-2,5,7-8\n"), Some(vec![0, 1, 2, 5, 7, 8]));
        assert_eq!(parse_list(""), None);
        assert_eq!(parse_list("x"), None);
    }

    #[test]
    fn every_cpu_is_visited_once() {
        let (sender, seen) = std::sync::mpsc::channel();
        on_each_cpu(move |cpu, cpus| sender.send((cpu, cpus)).unwrap()).unwrap();
        let seen: Vec<_> = seen.iter().collect();
        let usable = nix::sched::sched_getaffinity(Pid::from_raw(0)).unwrap();
        let usable = (0..CpuSet::count()).filter(|cpu| usable.is_set(*cpu).unwrap());
        let cpus = seen.len() as u16;
        assert!(seen.len() >= usable.count());
        assert!(seen.into_iter().eq((0..cpus).map(|cpu| (cpu, cpus))));
    }

    #[test]
    fn a_visit_leaves_the_callers_cpus_alone() {
        let before = nix::sched::sched_getaffinity(Pid::from_raw(0)).unwrap();
        grace_period().unwrap();
        assert_eq!(
            nix::sched::sched_getaffinity(Pid::from_raw(0)).unwrap(),
            before
        );
    }
}
