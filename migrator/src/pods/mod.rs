//! The pods of a node: one actor each, and the register of them all.
//!
//! ```text
//!   run ──▶ Starting ──▶ Running ──▶ Stopping ──▶ (removed)
//!                          │  ▲
//!            begin_migration│  │end_migration(Kept)
//!                          ▼  │
//!                       Migrating ──▶ InDoubt ──▶ end_migration(MovedAway) ──▶ (removed)
//!
//!   Running ──▶ Upgrading ──▶ Running, in another VMM or in the same one
//!
//!   incoming: prepare ──▶ build ──▶ (grant) ──▶ adopt ──▶ Running
//!                 └───────────┴──▶ discard ──▶ (removed)
//!   the VM ends by itself ──▶ Failed, until `stop` removes it, or `start` boots it again
//!   ... while InDoubt, with the service ──▶ InDoubt ──▶ end_migration(Died) ──▶ Failed
//! ```
//!
//! Whose a pod is stands in the node's journal before it is acted upon.

pub mod addressing;
pub mod disks;
pub mod error;
pub mod handle;
pub mod images;
pub mod incoming;
mod lacking;
pub mod logs;
pub mod plan;
pub mod recover;
pub mod run;
pub mod state;
pub mod upgrade;

mod actor;
mod again;
mod agent;
mod attach;
mod boot;
mod console;
mod open;
mod sink;
mod warm;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_runtime::pod::PodSpec;

pub use agent::AgentSlot;
pub use disks::PodDisk;
pub use error::PodError;
pub use handle::{MigrationEnd, PodHandle, PodResources, View};
pub use images::PodImage;
pub use sink::LogSink;
pub(crate) use sink::log_stream;
pub use state::PodRecord;

/// The register of a node's pods. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct PodRegistry {
    pods: Arc<Mutex<BTreeMap<String, Entry>>>,
}

#[derive(Debug)]
struct Entry {
    spec: PodSpec,
    slot: u16,
    /// Absent while it is only reserved.
    handle: Option<PodHandle>,
}

/// A name, addresses and a slot that nobody else gets, until it is dropped or becomes a pod.
#[derive(Debug)]
pub struct Reservation {
    registry: PodRegistry,
    name: String,
    slot: u16,
    keep: bool,
}

impl PodRegistry {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        // Every change is one call on the map: a panic elsewhere leaves it whole.
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every pod, by name.
    pub fn list(&self) -> Vec<PodHandle> {
        self.lock()
            .values()
            .filter_map(|e| e.handle.clone())
            .collect()
    }

    /// The pod of that name.
    ///
    /// # Errors
    /// [`PodError::NotFound`].
    pub fn get(&self, name: &str) -> Result<PodHandle, PodError> {
        self.lock()
            .get(name)
            .and_then(|e| e.handle.clone())
            .ok_or_else(|| PodError::NotFound(name.to_owned()))
    }

    /// Takes a pod's name, addresses and a slot, if all are free and fewer than `limit` are held.
    ///
    /// # Errors
    /// What is taken, and by whom.
    pub fn reserve(&self, spec: &PodSpec, limit: u16) -> Result<Reservation, PodError> {
        let mut pods = self.lock();
        if pods.len() >= usize::from(limit) {
            return Err(PodError::TooMany(limit));
        }
        let taken = |slot: u16| pods.values().any(|e| e.slot == slot);
        let slot = (0..limit)
            .find(|slot| !taken(*slot))
            .ok_or(PodError::TooMany(limit))?;
        self.insert(&mut pods, spec, slot)
    }

    /// The same with the slot that it had before the service was restarted.
    pub(crate) fn reserve_slot(&self, spec: &PodSpec, slot: u16) -> Result<Reservation, PodError> {
        let mut pods = self.lock();
        if let Some((by, _)) = pods.iter().find(|(_, e)| e.slot == slot) {
            return Err(PodError::AddressTaken {
                what: format!("slot {slot}"),
                by: by.clone(),
            });
        }
        self.insert(&mut pods, spec, slot)
    }

    fn insert(
        &self,
        pods: &mut BTreeMap<String, Entry>,
        spec: &PodSpec,
        slot: u16,
    ) -> Result<Reservation, PodError> {
        if pods.contains_key(&spec.name) {
            return Err(PodError::NameTaken(spec.name.clone()));
        }
        for (by, entry) in pods.iter() {
            if let Some(what) = shared_address(spec, &entry.spec) {
                return Err(PodError::AddressTaken {
                    what,
                    by: by.clone(),
                });
            }
        }
        for volume in spec.claims() {
            if let Some(pod) = user_of(pods, volume) {
                let volume = volume.to_owned();
                return Err(PodError::VolumeTaken { volume, by: pod });
            }
        }
        pods.insert(
            spec.name.clone(),
            Entry {
                spec: spec.clone(),
                slot,
                handle: None,
            },
        );
        Ok(Reservation {
            registry: self.clone(),
            name: spec.name.clone(),
            slot,
            keep: false,
        })
    }

    /// The pod that uses a named volume.
    pub fn user_of(&self, volume: &str) -> Option<String> {
        user_of(&self.lock(), volume)
    }

    /// Runs `work`, during which nobody begins to use the volume.
    ///
    /// # Errors
    /// The pod that uses it; nothing is done then.
    pub fn unused<T>(&self, volume: &str, work: impl FnOnce() -> T) -> Result<T, String> {
        let pods = self.lock();
        match user_of(&pods, volume) {
            Some(pod) => Err(pod),
            None => Ok(work()),
        }
    }

    fn remove(&self, name: &str) {
        self.lock().remove(name);
    }
}

impl Reservation {
    /// The slot.
    pub fn slot(&self) -> u16 {
        self.slot
    }

    /// Leaves name, addresses and slot taken, for a pod that nobody may touch.
    fn keep_for_ever(mut self) {
        self.keep = true;
    }

    /// Turns it into an entry that lasts until the pod's actor removes it.
    fn become_pod(mut self, handle: PodHandle) {
        self.keep = true;
        if let Some(entry) = self.registry.lock().get_mut(&self.name) {
            entry.handle = Some(handle);
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.keep {
            self.registry.remove(&self.name);
        }
    }
}

fn user_of(pods: &BTreeMap<String, Entry>, volume: &str) -> Option<String> {
    let uses = |entry: &Entry| entry.spec.claims().any(|claimed| claimed == volume);
    let found = pods.iter().find(|(_, entry)| uses(entry));
    found.map(|(pod, _)| pod.clone())
}

/// An address that both pods claim.
fn shared_address(one: &PodSpec, other: &PodSpec) -> Option<String> {
    let (a, b) = (&one.net, &other.net);
    if a.mac == b.mac {
        return Some(format!("the MAC address {}", a.mac));
    }
    if let (Some((mine, _)), Some((theirs, _))) = (a.ipv4, b.ipv4)
        && mine == theirs
    {
        return Some(format!("the address {mine}"));
    }
    if let (Some((mine, _)), Some((theirs, _))) = (a.ipv6, b.ipv6)
        && mine == theirs
    {
        return Some(format!("the address {mine}"));
    }
    None
}

#[cfg(test)]
mod tests;
