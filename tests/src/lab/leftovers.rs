//! What a pod or a migration may leave behind on a node.

use std::path::Path;

use anyhow::{Context, Result};
use xtask::lab::Node;
use xtask::{netns, process};

use super::TestLab;

impl TestLab {
    /// Everything of pods and of migrations that is on this node now: folders, links, VMMs, half-made images.
    ///
    /// # Errors
    /// It cannot be looked at.
    pub fn leftovers(&self, node: Node) -> Result<Vec<String>> {
        let state = self.state(node);
        let mut left = names(&state.join("pods"), |_| true);
        left.extend(names(&state.join("images"), |name| {
            name.starts_with(".tmp-")
        }));
        let namespace = self.lab().netns(node.name());
        left.extend(
            links(&namespace)?
                .into_iter()
                .filter(|link| is_of_a_pod(link)),
        );
        for pid in process::in_netns(&namespace) {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if String::from_utf8_lossy(&line).contains("qemu-system") {
                left.push(format!("VMM {pid}"));
            }
        }
        Ok(left)
    }
}

/// TAPs, parks, and the TAPs that an upgrade begins with: `mt`, `mp` and `ms` with the slot's number.
fn is_of_a_pod(link: &str) -> bool {
    ["mt", "mp", "ms"].iter().any(|prefix| {
        link.strip_prefix(prefix)
            .is_some_and(|slot| slot.parse::<u16>().is_ok())
    })
}

/// A folder that is not there has nothing in it.
fn names(dir: &Path, wanted: impl Fn(&str) -> bool) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|entry| wanted(&entry.file_name().to_string_lossy()))
        .map(|entry| entry.path().display().to_string())
        .collect()
}

fn links(namespace: &str) -> Result<Vec<String>> {
    // Of the thread that asks: sysfs would be that of the mount.
    let table = netns::within(namespace, || {
        std::fs::read_to_string("/proc/thread-self/net/dev").context("cannot list the links")
    })?;
    Ok(table
        .lines()
        .filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()))
        .collect())
}
