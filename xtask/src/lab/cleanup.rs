//! Taking the lab down, in reverse, whatever is left of it. Every step is tried, also when an earlier one fails.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, umount2};
use serde_json::Value;

use super::state::State;
use super::{Lab, Node, network};
use crate::process::{self, ProcessId};

pub(super) fn down(lab: &Lab) -> Result<()> {
    let mut failures = Vec::new();
    let mut attempt = |what: Result<()>| {
        if let Err(error) = what {
            failures.push(format!("{error:#}"));
        }
    };
    let state = State::load(lab.dir()).unwrap_or_else(|error| {
        // A damaged record must not keep the rest from going: the namespaces and the folder tell enough.
        println!("lab: {error:#}; going on without it");
        State::default()
    });
    // Services first: they would take a dead VM for a crash.
    for service in state.processes() {
        attempt(service.end(Duration::from_secs(3)));
    }
    for node in Node::EVERY {
        for vm in vms(&lab.node_dir(node)) {
            attempt(vm.end(Duration::ZERO));
        }
    }
    for stray in strays(lab) {
        attempt(stray.end(Duration::ZERO));
    }
    for node in Node::EVERY {
        for folder in folders_with(&lab.node_dir(node), vm_runtime::vm::throttle::RECORD) {
            vm_runtime::vm::throttle::forget(&folder);
        }
    }
    attempt(network::down(lab));
    attempt(network::restore_backlog(&state));
    for mount in mounts_below(lab.dir()) {
        attempt(
            umount2(&mount, MntFlags::MNT_DETACH)
                .with_context(|| format!("cannot unmount {}", mount.display())),
        );
    }
    // Mounts that could not be undone must not be emptied instead.
    if mounts_below(lab.dir()).is_empty() && lab.dir().exists() {
        attempt(
            std::fs::remove_dir_all(lab.dir())
                .with_context(|| format!("cannot remove {}", lab.dir().display())),
        );
    }
    if !failures.is_empty() {
        bail!("the lab is not entirely gone: {}", failures.join("; "));
    }
    Ok(())
}

/// The VMs that a node's state folder tells of, alive or not: every `vmm.json` in it, whichever pod or migration made it.
pub(super) fn vms(node_dir: &Path) -> Vec<ProcessId> {
    let folders = folders_with(node_dir, "vmm.json");
    let recorded = |folder: &PathBuf| recorded(&folder.join("vmm.json"), folder);
    folders.iter().filter_map(recorded).collect()
}

/// The folders of a node's state with a file of this name.
fn folders_with(node_dir: &Path, name: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![node_dir.join("state")];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(&folder) else {
            continue;
        };
        for entry in entries.flatten() {
            let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if is_dir {
                folders.push(entry.path());
            } else if entry.file_name() == name {
                found.push(folder.clone());
            }
        }
    }
    found
}

fn recorded(file: &Path, folder: &Path) -> Option<ProcessId> {
    let record: Value = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
    let (pid, start_time) = find_process(&record)?;
    Some(ProcessId {
        what: format!("the VM of {}", folder.display()),
        pid,
        start_time,
    })
}

/// The first object with both `pid` and `start_time`, at any depth.
fn find_process(value: &Value) -> Option<(i32, u64)> {
    match value {
        Value::Object(fields) => {
            let pair = fields
                .get("pid")
                .and_then(Value::as_i64)
                .zip(fields.get("start_time").and_then(Value::as_u64));
            match pair {
                Some((pid, start_time)) => Some((i32::try_from(pid).ok()?, start_time)),
                None => fields.values().find_map(find_process),
            }
        }
        Value::Array(items) => items.iter().find_map(find_process),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => None,
    }
}

/// Processes in the lab's namespaces whose command line names the lab's folder: a VM that was started and not yet
/// recorded. Others there, such as a user's shell, are told of and left alone.
fn strays(lab: &Lab) -> Vec<ProcessId> {
    let me = std::process::id().cast_signed();
    let mut found = Vec::new();
    let mut seen = HashSet::new();
    for place in network::PLACES {
        for pid in process::in_netns(&lab.netns(place)) {
            if pid == me || !seen.insert(pid) {
                continue;
            }
            let Ok(id) = ProcessId::of("a process of the lab", pid) else {
                continue;
            };
            if process::mentions(pid, lab.dir()) {
                found.push(id);
            } else {
                println!(
                    "lab: process {pid} lives in {} and is not the lab's: it keeps the namespace's devices until it ends",
                    lab.netns(place)
                );
            }
        }
    }
    found
}

/// Mount points below `dir`, innermost first.
fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    parse_mounts(&table, dir)
}

/// Field 5 of each line of mountinfo (proc(5)), with its octal escapes undone.
fn parse_mounts(table: &str, dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|field| {
            PathBuf::from(
                field
                    .replace("\\040", " ")
                    .replace("\\011", "\t")
                    .replace("\\134", "\\"),
            )
        })
        .filter(|path| path.starts_with(dir))
        .collect();
    found.reverse();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_is_found_at_any_depth_of_its_record() {
        let record = serde_json::json!({ "spec": { "pid_file": 1 }, "process": [{ "pid": 42, "start_time": 99 }] });
        assert_eq!(find_process(&record), Some((42, 99)));
        assert_eq!(find_process(&serde_json::json!({ "pid": 42 })), None);
    }

    #[test]
    fn inner_mounts_come_before_outer_ones_and_neighbours_are_left() {
        let table = "1 0 0:1 / /lab/a rw - bpf bpf rw\n2 1 0:2 / /lab/a/state\\040x rw - bpf bpf rw\n3 0 0:3 / /labor rw - tmpfs t rw\n";
        assert_eq!(
            parse_mounts(table, Path::new("/lab")),
            [PathBuf::from("/lab/a/state x"), PathBuf::from("/lab/a")]
        );
    }
}
