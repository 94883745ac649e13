//! What must survive the service: who may run which pod, and how far each migration got.
//!
//! One small file a record, changed in place: see [`mod@file`].
//!
//! ```text
//! owners/POD.json             the right to run: the one authority on this node
//! source/MIGRATION.json       migrations away from here
//! destination/MIGRATION.json  migrations to here, and the answers to whoever asks about them
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tracing::warn;
use vm_runtime::units::Epoch;

use crate::wire::id::MigrationId;
use crate::wire::message::Verdict;

mod error;
mod file;
mod record;
pub use error::JournalError;
use file::{failed, read, reserve, write};
pub use record::{
    DestinationRecord, DestinationState, Entry, OwnerRecord, OwnerState, SourceRecord, SourceState,
};

/// Finished records that are kept in each folder; the oldest go first.
const HISTORY: usize = 1024;

/// What a starting service must take up again.
#[derive(Debug, Default)]
pub struct Recovery {
    /// The right to run, for every pod this node has known.
    pub owners: Vec<OwnerRecord>,
    /// Migrations away from here that did not end, each with its pod's owner record: see
    /// [`crate::migration::source::Source::recover`].
    pub sources: Vec<(SourceRecord, Option<OwnerRecord>)>,
    /// Migrations to here that have not ended at both nodes, each with its pod's owner record: see
    /// [`crate::migration::destination::Destination::recover`].
    pub destinations: Vec<(DestinationRecord, Option<OwnerRecord>)>,
    /// Files that cannot be read. Their pods must be left alone.
    pub damaged: Vec<JournalError>,
}

/// The journal of one node. All calls block for the time of an fsync.
#[derive(Debug)]
pub struct Journal {
    dir: PathBuf,
    lock: Mutex<()>,
}

impl Journal {
    /// Opens the journal in `dir`, creating it if needed; tells what must be recovered.
    ///
    /// # Errors
    ///
    /// When a folder cannot be made or listed. Damaged files are in [`Recovery::damaged`].
    pub fn open(dir: &Path) -> Result<(Self, Recovery), JournalError> {
        for folder in ["owners", "source", "destination"] {
            let path = dir.join(folder);
            fs::create_dir_all(&path).map_err(|e| failed("create", &path, e))?;
        }
        let journal = Self {
            dir: dir.to_owned(),
            lock: Mutex::new(()),
        };
        let recovery = journal.recover()?;
        Ok((journal, recovery))
    }

    /// Writes an entry; durable when it returns.
    ///
    /// # Errors
    ///
    /// See [`JournalError`]; the old record is in force then. Beginning a migration (`Prepared`) under an id that has a record
    /// is [`JournalError::Known`].
    pub fn apply(&self, entry: &Entry) -> Result<(), JournalError> {
        let _guard = self.guard();
        match entry {
            Entry::Owner(record) => self.write_owner(record),
            Entry::Source(record) => self.write("source", &record.migration.to_string(), record),
            Entry::Destination(record) => {
                if record.state == DestinationState::Prepared
                    && self.read_destination(record.migration)?.is_some()
                {
                    return Err(JournalError::Known(record.migration));
                }
                if record.state == DestinationState::Prepared {
                    // The owner record follows within the freeze, if it does.
                    check_pod(&record.pod)?;
                    reserve(&self.path("owners", &record.pod))?;
                }
                self.write_destination(record)
            }
        }
    }

    /// Makes this node the owner of a new pod, in an epoch above any that it has seen for the name.
    ///
    /// # Errors
    ///
    /// See [`JournalError`].
    pub fn create_owner(&self, pod: &str) -> Result<Epoch, JournalError> {
        let _guard = self.guard();
        let epoch = self
            .read_owner(pod)?
            .map_or(Epoch(1), |record| record.epoch.next());
        self.write_owner(&OwnerRecord {
            pod: pod.to_owned(),
            epoch,
            state: OwnerState::Owner,
        })?;
        Ok(epoch)
    }

    /// Notes that an owned pod was stopped for good. Its epoch stays known.
    ///
    /// # Errors
    ///
    /// [`JournalError::NotOwner`] when the pod is handed over or gone: its record must stay as it is.
    pub fn stop_owner(&self, pod: &str) -> Result<(), JournalError> {
        let _guard = self.guard();
        match self.read_owner(pod)? {
            Some(record) if record.state == OwnerState::Owner => self.write_owner(&OwnerRecord {
                state: OwnerState::Stopped,
                ..record
            }),
            Some(_) | None => Err(JournalError::NotOwner(pod.to_owned())),
        }
    }

    /// Who may run the pod, as far as this node knows.
    ///
    /// # Errors
    ///
    /// See [`JournalError`].
    pub fn owner(&self, pod: &str) -> Result<Option<OwnerRecord>, JournalError> {
        let _guard = self.guard();
        self.read_owner(pod)
    }

    /// The answer to `peer`'s question about a migration that no machine of this service is running (one that runs must be
    /// asked instead). A migration that is unknown or was not granted is journaled as discarded before this returns.
    ///
    /// # Errors
    ///
    /// See [`JournalError`]; nothing may be answered then.
    pub fn answer(&self, migration: MigrationId, peer: &str) -> Result<Verdict, JournalError> {
        let _guard = self.guard();
        let record = self.destination_of(migration, peer)?;
        let verdict = record.as_ref().and_then(DestinationRecord::verdict);
        if let Some(verdict) = verdict {
            return Ok(verdict);
        }
        let discarded = DestinationState::Discarded {
            reason: "the source asked before the grant came".to_owned(),
        };
        self.write_destination(&match record {
            Some(record) => DestinationRecord {
                state: discarded,
                ..record
            },
            None => DestinationRecord {
                migration,
                pod: String::new(),
                from: peer.to_owned(),
                epoch: Epoch(0),
                state: discarded,
            },
        })?;
        self.prune("destination", |r: &DestinationRecord| r.is_forgettable());
        Ok(Verdict::Discarded)
    }

    /// Notes that `peer`, the source, has released everything: nobody will ask again. Harmless when repeated.
    ///
    /// # Errors
    ///
    /// See [`JournalError`].
    pub fn settle(&self, migration: MigrationId, peer: &str) -> Result<(), JournalError> {
        let _guard = self.guard();
        match self.destination_of(migration, peer)? {
            Some(record) if record.verdict() == Some(Verdict::Running) => {
                self.write_destination(&DestinationRecord {
                    state: DestinationState::Settled,
                    ..record
                })
            }
            Some(_) | None => Ok(()),
        }
    }

    fn guard(&self) -> MutexGuard<'_, ()> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn recover(&self) -> Result<Recovery, JournalError> {
        let mut recovery = Recovery::default();
        for record in self.scan::<DestinationRecord>("destination")? {
            match record {
                // The grant is durable and the right to run may not be: the service died between the two writes.
                Ok(record) if record.verdict() == Some(Verdict::Running) => {
                    if let Err(error) = self.repair_owner(&record) {
                        recovery.damaged.push(error);
                    }
                    if record.state != DestinationState::Settled {
                        recovery.destinations.push((record, None));
                    }
                }
                Ok(record) if record.state == DestinationState::Prepared => {
                    recovery.destinations.push((record, None));
                }
                Ok(_) => {}
                Err(error) => recovery.damaged.push(error),
            }
        }
        for record in self.scan::<SourceRecord>("source")? {
            match record {
                Ok(record) if record.state == SourceState::Started => {
                    recovery.sources.push((record, None));
                }
                Ok(_) => {}
                Err(error) => recovery.damaged.push(error),
            }
        }
        for record in self.scan::<OwnerRecord>("owners")? {
            match record {
                Ok(record) => recovery.owners.push(record),
                Err(error) => recovery.damaged.push(error),
            }
        }
        let owner_of = |pod: &str| recovery.owners.iter().find(|o| o.pod == pod).cloned();
        for (record, owner) in &mut recovery.sources {
            *owner = owner_of(&record.pod);
        }
        for (record, owner) in &mut recovery.destinations {
            *owner = owner_of(&record.pod);
        }
        // A guest that runs here, and whose source has not let go; unless it has moved on since.
        recovery.destinations.retain(|(record, owner)| {
            record.state != (DestinationState::Owner { resumed: true })
                || owner.as_ref() == Some(&record.owner())
        });
        self.prune("source", |r: &SourceRecord| r.state != SourceState::Started);
        self.prune("destination", |r: &DestinationRecord| r.is_forgettable());
        Ok(recovery)
    }

    fn repair_owner(&self, granted: &DestinationRecord) -> Result<(), JournalError> {
        let known = self.read_owner(&granted.pod)?;
        if known.is_some_and(|owner| owner.epoch >= granted.epoch) {
            return Ok(());
        }
        self.write_owner(&granted.owner())
    }

    fn destination_of(
        &self,
        migration: MigrationId,
        peer: &str,
    ) -> Result<Option<DestinationRecord>, JournalError> {
        match self.read_destination(migration)? {
            Some(record) if record.from != peer => Err(JournalError::NotYours {
                migration,
                from: record.from,
                asker: peer.to_owned(),
            }),
            record => Ok(record),
        }
    }

    fn read_owner(&self, pod: &str) -> Result<Option<OwnerRecord>, JournalError> {
        check_pod(pod)?;
        read(&self.path("owners", pod))
    }

    fn write_owner(&self, record: &OwnerRecord) -> Result<(), JournalError> {
        check_pod(&record.pod)?;
        self.write("owners", &record.pod, record)
    }

    fn read_destination(&self, id: MigrationId) -> Result<Option<DestinationRecord>, JournalError> {
        read(&self.path("destination", &id.to_string()))
    }

    /// The grant takes two records. The migration's comes first and decides: [`Journal::recover`] makes the other follow.
    fn write_destination(&self, record: &DestinationRecord) -> Result<(), JournalError> {
        self.write("destination", &record.migration.to_string(), record)?;
        if record.state == (DestinationState::Owner { resumed: false })
            && let Err(error) = self.write_owner(&record.owner())
        {
            warn!(%error, "the owner record follows at the next start");
        }
        Ok(())
    }

    fn path(&self, folder: &str, name: &str) -> PathBuf {
        self.dir.join(folder).join(format!("{name}.json"))
    }

    fn write<T: Serialize>(
        &self,
        folder: &str,
        name: &str,
        record: &T,
    ) -> Result<(), JournalError> {
        write(&self.path(folder, name), record)
    }

    /// Every record of a folder; removes temporary files that a crash has left.
    fn scan<T: DeserializeOwned>(
        &self,
        folder: &str,
    ) -> Result<Vec<Result<T, JournalError>>, JournalError> {
        let dir = self.dir.join(folder);
        let entries = fs::read_dir(&dir).map_err(|e| failed("list", &dir, e))?;
        let mut records = Vec::new();
        for entry in entries {
            let path = entry.map_err(|e| failed("list", &dir, e))?.path();
            match path.extension().and_then(|e| e.to_str()) {
                Some("json") => records.extend(read(&path).transpose()),
                Some("tmp") => fs::remove_file(&path).map_err(|e| failed("remove", &path, e))?,
                Some(_) | None => {}
            }
        }
        Ok(records)
    }

    /// Bounds the history. Nothing depends on it, so errors are only logged.
    fn prune<T: DeserializeOwned>(&self, folder: &str, forgettable: impl Fn(&T) -> bool) {
        let Ok(entries) = fs::read_dir(self.dir.join(folder)) else {
            return;
        };
        let mut old: Vec<_> = entries
            .flatten()
            .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
            .collect();
        if old.len() <= HISTORY {
            return;
        }
        old.retain(|(_, path)| matches!(read(path), Ok(Some(record)) if forgettable(&record)));
        old.sort();
        let surplus = old.len().saturating_sub(HISTORY);
        for (_, path) in old.into_iter().take(surplus) {
            if let Err(error) = fs::remove_file(&path) {
                warn!(path = %path.display(), %error, "cannot remove an old record");
            }
        }
    }
}

/// The name comes from a peer or a client, and becomes a file's name: an RFC 1123 label has neither dots nor slashes.
fn check_pod(pod: &str) -> Result<(), JournalError> {
    let label = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    match (1..=63).contains(&pod.len()) && pod.bytes().all(label) {
        true => Ok(()),
        false => Err(JournalError::PodName(pod.to_owned())),
    }
}

#[cfg(test)]
mod tests;
