//! Doing things inside a named network namespace, without leaving the mount namespace.
//!
//! `ip netns exec` would also unshare the mounts: a bpffs that a node mounts would then be invisible to
//! the same node after a restart. So a short-lived thread enters the network namespace and starts the
//! child, or opens the socket, from there.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};

use crate::cmd;

/// Where `ip netns` keeps its handles.
const RUN_NETNS: &str = "/run/netns";

/// The handle of the namespace `name`.
pub fn path(name: &str) -> PathBuf {
    Path::new(RUN_NETNS).join(name)
}

/// Whether it exists.
pub fn exists(name: &str) -> bool {
    path(name).exists()
}

/// Which CPUs new devices of a namespace hand what they receive to.
const RPS_SYSCTL: &str = "/proc/sys/net/core/rps_default_mask";

/// In the calling thread's namespace, what is received by devices that are made from now on waits in the queue of one CPU, as frames of one flow
/// wait in one queue of a NIC. A veth has them wait where their sender ran, so one that the scheduler moves overtakes itself. A kernel before 6.3 has no
/// such setting: nothing is done.
///
/// # Errors
/// The kernel refuses.
pub fn keep_order() -> Result<()> {
    match Path::new(RPS_SYSCTL).exists() {
        true => {
            std::fs::write(RPS_SYSCTL, "1").with_context(|| format!("cannot write {RPS_SYSCTL}"))
        }
        false => Ok(()),
    }
}

/// Runs `work` on a thread inside the namespace: sockets that it opens stay there, children that it starts live there.
///
/// # Errors
/// There is no such namespace, it may not be entered, or `work` fails.
pub fn within<T: Send>(name: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let handle = File::open(path(name)).with_context(|| {
        format!("network namespace {name} does not exist: `cargo xtask lab up` makes the lab's")
    })?;
    std::thread::scope(|scope| {
        scope
            .spawn(move || {
                setns(&handle, CloneFlags::CLONE_NEWNET)
                    .with_context(|| format!("cannot enter network namespace {name}"))?;
                work()
            })
            .join()
            .map_err(|_| anyhow!("the thread in network namespace {name} panicked"))?
    })
}

/// Starts `command` inside the namespace.
///
/// # Errors
/// As [`within`], or the command cannot be started.
pub fn spawn(name: &str, command: &mut Command) -> Result<Child> {
    within(name, || {
        command
            .spawn()
            .with_context(|| format!("cannot start `{}` in {name}", cmd::show(command)))
    })
}
