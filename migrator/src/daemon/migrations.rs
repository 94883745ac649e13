//! The migrations of a node: those under way, to be watched and cancelled, and the reports of those
//! that are over, kept in `migrations/ID.json`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::migration::status::{MigrationReport, MigrationStatus, Phase};
use crate::pods::state;
use crate::wire::id::MigrationId;

/// Reports that are kept; the oldest go first.
const HISTORY: usize = 200;

/// Migrations by id. Cheap to clone.
#[derive(Clone, Debug)]
pub struct MigrationRegistry {
    dir: PathBuf,
    entries: Arc<Mutex<BTreeMap<MigrationId, Entry>>>,
}

#[derive(Debug)]
struct Entry {
    /// For the order of lists; grows by one with each migration.
    number: u64,
    status: watch::Receiver<MigrationStatus>,
    /// Absent once it is over.
    cancel: Option<CancellationToken>,
}

/// A migration under way: what its driver publishes to and is cancelled by.
#[derive(Debug)]
pub struct Ticket {
    /// The migration.
    pub id: MigrationId,
    /// What watchers see.
    pub status: watch::Sender<MigrationStatus>,
    /// Cancelled when the user asks for it. Before the grant the driver aborts; afterwards it ignores it.
    pub cancel: CancellationToken,
    registry: MigrationRegistry,
}

/// Why a migration is not cancelled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CancelError {
    /// There is none of that id.
    #[error("there is no such migration")]
    Unknown,
    /// It is over.
    #[error("the migration is over")]
    Over,
    /// The guest is the destination's, or may be.
    #[error("the guest has been handed over: the migration can only go on")]
    HandedOver,
    /// The guest runs at the destination, and its memory follows.
    #[error(
        "the guest runs at {to} already, and {pages_left} pages of its memory are still to come: the migration can only go on"
    )]
    Postcopy {
        /// The destination.
        to: String,
        /// Pages.
        pages_left: u64,
    },
}

impl MigrationRegistry {
    /// Opens the register with the reports in `dir`. A report that cannot be read is skipped.
    ///
    /// # Errors
    /// The folder cannot be made or listed.
    pub fn open(dir: &Path) -> std::io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let mut files = Vec::new();
        for entry in std::fs::read_dir(dir)? {
            let entry = entry?;
            files.push((entry.metadata()?.modified()?, entry.path()));
        }
        files.sort();
        let old = files.len().saturating_sub(HISTORY);
        for (_, path) in files.drain(..old) {
            std::fs::remove_file(path)?;
        }
        let mut entries = BTreeMap::new();
        for (number, (_, path)) in files.into_iter().enumerate() {
            let status: std::io::Result<MigrationStatus> = state::read_json(&path);
            let read = status.map_err(|e| e.to_string()).and_then(|status| {
                let id: MigrationId = status.id.parse().map_err(|_| "bad id".to_owned())?;
                Ok((id, status))
            });
            match read {
                Ok((id, status)) => {
                    let entry = Entry {
                        number: number as u64,
                        status: watch::channel(status).1,
                        cancel: None,
                    };
                    entries.insert(id, entry);
                }
                Err(error) => {
                    tracing::warn!(path = %path.display(), error, "skipping a report");
                }
            }
        }
        Ok(Self {
            dir: dir.to_owned(),
            entries: Arc::new(Mutex::new(entries)),
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<MigrationId, Entry>> {
        // Every change is one call on the map: a panic elsewhere leaves it whole.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a migration that begins, or goes on after a restart.
    pub fn begin(&self, id: MigrationId, pod: &str, from: &str, to: &str) -> Ticket {
        let status = watch::Sender::new(MigrationStatus {
            id: id.to_string(),
            pod: pod.to_owned(),
            from: from.to_owned(),
            to: to.to_owned(),
            phase: Phase::Handshake,
            round: 0,
            bytes_sent: 0,
            pages_left: 0,
            disk_bytes_sent: 0,
            disk_bytes_left: 0,
            bandwidth_bytes_per_s: 0,
            dirty_bytes_per_s: 0,
            predicted_downtime_ms: 0.0,
            throttle_percent: 0,
            report: None,
        });
        let cancel = CancellationToken::new();
        let mut entries = self.lock();
        let number = entries.values().map(|e| e.number + 1).max().unwrap_or(0);
        entries.insert(
            id,
            Entry {
                number,
                status: status.subscribe(),
                cancel: Some(cancel.clone()),
            },
        );
        Ticket {
            id,
            status,
            cancel,
            registry: self.clone(),
        }
    }

    /// Every migration's present status, oldest first.
    pub fn list(&self) -> Vec<MigrationStatus> {
        let entries = self.lock();
        let mut all: Vec<(u64, MigrationStatus)> = entries
            .values()
            .map(|e| (e.number, e.status.borrow().clone()))
            .collect();
        all.sort_by_key(|(number, _)| *number);
        all.into_iter().map(|(_, status)| status).collect()
    }

    /// A migration's status, to be watched; its last value has the report.
    pub fn watch(&self, id: MigrationId) -> Option<watch::Receiver<MigrationStatus>> {
        self.lock().get(&id).map(|e| e.status.clone())
    }

    /// Asks a migration to stop; the pod goes on where it runs.
    ///
    /// # Errors
    /// It is unknown, over, or past the point of return.
    pub fn cancel(&self, id: MigrationId) -> Result<(), CancelError> {
        let entries = self.lock();
        let entry = entries.get(&id).ok_or(CancelError::Unknown)?;
        let cancel = entry.cancel.as_ref().ok_or(CancelError::Over)?;
        let (phase, to, pages_left) = {
            let status = entry.status.borrow();
            (status.phase, status.to.clone(), status.pages_left)
        };
        match phase {
            Phase::Done => Err(CancelError::Over),
            Phase::Postcopy => Err(CancelError::Postcopy { to, pages_left }),
            Phase::Forwarding | Phase::InDoubt => Err(CancelError::HandedOver),
            Phase::Handshake | Phase::Image | Phase::Precopy | Phase::Switchover => {
                cancel.cancel();
                Ok(())
            }
        }
    }
}

impl Ticket {
    /// Changes what watchers see.
    pub fn update(&self, change: impl FnOnce(&mut MigrationStatus)) {
        self.status.send_modify(change);
    }

    /// Ends the migration: watchers get the report, and it is kept.
    pub async fn finish(self, report: MigrationReport) {
        self.status.send_modify(|status| {
            status.phase = Phase::Done;
            status.bytes_sent = report.memory.bytes_sent;
            status.report = Some(report);
        });
        let status = self.status.borrow().clone();
        if let Some(entry) = self.registry.lock().get_mut(&self.id) {
            entry.cancel = None;
        }
        let path = self.registry.dir.join(format!("{}.json", self.id));
        let written = tokio::task::spawn_blocking(move || state::write_json(&path, &status)).await;
        if let Ok(Err(error)) = written {
            tracing::warn!(id = %self.id, %error, "cannot keep the report");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::status::{ConntrackReport, MemoryReport, Outcome, PacketReport};

    fn report(id: MigrationId) -> MigrationReport {
        MigrationReport {
            id: id.to_string(),
            pod: "web".to_owned(),
            from: "a".to_owned(),
            to: "b".to_owned(),
            mode: "precopy".to_owned(),
            outcome: Outcome::Completed,
            total_ms: 1.0,
            downtime_ms: 1.0,
            frozen_at_unix_us: 1,
            memory: MemoryReport::default(),
            disk: None,
            images: None,
            packets: PacketReport::default(),
            conntrack: ConntrackReport::default(),
            phases: Vec::new(),
        }
    }

    #[tokio::test]
    async fn a_finished_migration_is_still_known_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let registry = MigrationRegistry::open(dir.path()).unwrap();
        let id = MigrationId::random();
        let ticket = registry.begin(id, "web", "a", "b");
        let mut watcher = registry.watch(id).unwrap();
        ticket.finish(report(id)).await;
        watcher.changed().await.unwrap();
        assert_eq!(watcher.borrow().phase, Phase::Done);
        assert_eq!(registry.cancel(id), Err(CancelError::Over));
        drop(registry);
        let registry = MigrationRegistry::open(dir.path()).unwrap();
        assert_eq!(registry.list().len(), 1);
        let status = registry.watch(id).unwrap().borrow().clone();
        assert_eq!(status.report, Some(report(id)));
        assert_eq!(registry.cancel(id), Err(CancelError::Over));
    }

    #[test]
    fn cancelling_reaches_the_driver_only_before_the_guest_is_handed_over() {
        let dir = tempfile::tempdir().unwrap();
        let registry = MigrationRegistry::open(dir.path()).unwrap();
        let id = MigrationId::random();
        assert_eq!(registry.cancel(id), Err(CancelError::Unknown));
        let ticket = registry.begin(id, "web", "a", "b");
        ticket.update(|s| s.phase = Phase::Forwarding);
        assert_eq!(registry.cancel(id), Err(CancelError::HandedOver));
        assert!(!ticket.cancel.is_cancelled());
        ticket.update(|s| s.phase = Phase::Precopy);
        assert_eq!(registry.cancel(id), Ok(()));
        assert!(ticket.cancel.is_cancelled());
    }
}
