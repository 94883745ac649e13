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
