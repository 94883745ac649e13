//! What the lab did to the machine, written down before it is needed: the way back after a crash.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{Node, Topology};
use crate::process::ProcessId;

/// Who made the lab: the demo removes what an earlier demo left, and nobody else's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Owner {
    /// `lab up`.
    User,
    /// `run` or `bench`.
    Demo,
    /// A test.
    Test,
}

/// The record, `lab.json` in the lab's folder.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct State {
    /// Who made it; none if there is no lab.
    pub owner: Option<Owner>,
    /// How its pods are on the network.
    #[serde(default)]
    pub topology: Topology,
    /// The services, by node name.
    services: BTreeMap<String, ProcessId>,
    /// Other processes that were started in the lab.
    helpers: Vec<ProcessId>,
    /// `net.core.netdev_max_backlog` as it was, if the lab raised it.
    pub backlog_before: Option<u64>,
}

impl State {
    /// The record of a lab that is about to be made.
    pub fn new(owner: Owner, topology: Topology) -> State {
        State {
            owner: Some(owner),
            topology,
            ..State::default()
        }
    }

    fn path(dir: &Path) -> PathBuf {
        dir.join("lab.json")
    }

    /// Reads the record in `dir`; an absent one is empty.
    ///
    /// # Errors
    /// It cannot be read, or is not one.
    pub fn load(dir: &Path) -> Result<State> {
        let path = State::path(dir);
        match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .with_context(|| format!("{} is damaged", path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(State::default()),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// Writes it, whole or not at all.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let path = State::path(dir);
        let fresh = path.with_extension("new");
        std::fs::write(&fresh, serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("cannot write {}", fresh.display()))?;
        std::fs::rename(&fresh, &path).with_context(|| format!("cannot write {}", path.display()))
    }

    /// The service of `node`, alive or not.
    pub fn service(&self, node: Node) -> Option<&ProcessId> {
        self.services.get(node.name())
    }

    /// Records the service of `node`.
    pub fn set_service(&mut self, node: Node, service: ProcessId) {
        self.services.insert(node.name().to_owned(), service);
    }

    /// Records another process, to be ended with the lab.
    pub fn add_helper(&mut self, helper: ProcessId) {
        self.helpers.push(helper);
    }

    /// Every recorded process: services first, because they would start VMs anew.
    pub fn processes(&self) -> impl Iterator<Item = &ProcessId> {
        self.services.values().chain(&self.helpers)
    }
}
