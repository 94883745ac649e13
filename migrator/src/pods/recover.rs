//! Finding the pods again after a restart of the service.
//!
//! The journal says whose a pod is, its folder says what it is, and its VMM has the descriptors:
//!
//! | journal | what happens |
//! |---|---|
//! | owner, no migration open | attached; a VM that stands still goes on |
//! | owner, containers never started | removed: whoever asked was told of a failure |
//! | owner, it was being started again | its VM is ended; it is shown as failed, and can be started again |
//! | a migration from here is open | attached as migrating; the driver ends the migration |
//! | the same, the right is handed over, and its VM is gone | in doubt until the driver knows whose it is |
//! | granted to this node, not settled with the source | attached as migrating; the driver resumes it if need be |
//! | the same, and its guest lacks pages | attached as soon as its VMM answers, which may itself wait for a page |
//! | released to another node | what is left of it is removed; the driver tells that node |
//! | anything else | the VM is killed and everything removed |
//! | damaged | left alone; its name and slot stay taken |

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::actor::{self, Birth};
use super::again;
use super::attach::{attach, clean_network};
use super::disks::Origin;
use super::error::PodError;
use super::handle::{Facts, PodHandle, PodResources};
use super::lacking::LackingPod;
use super::logs::LogStore;
use super::open::{close, decisive, departing};
use super::run::give_back;
use super::state::{self, PodFile};
use crate::api::error::chain;
use crate::daemon::node::Node;
use crate::migration::journal::{
    DestinationRecord, OwnerRecord, OwnerState, Recovery, SourceRecord,
};
use crate::network::Role;

/// A migration that an earlier service left open, for the driver to end.
#[derive(Debug)]
pub enum OpenMigration {
    /// It was to take a pod away from here.
    Source {
        /// As journaled.
        record: SourceRecord,
        /// Whether the right was handed over already.
        handed_over: bool,
        /// The pod, and its parts, with which it is marked as migrating; without parts if its VM is gone. Absent if its folder is.
        pod: Option<(PodHandle, Option<Arc<PodResources>>)>,
    },
    /// It has taken a pod away from here, and nothing of it is left: only the destination is to be told.
    Departed {
        /// As journaled.
        record: SourceRecord,
    },
    /// It brought a pod here, and the grant came.
    Destination {
        /// As journaled.
        record: DestinationRecord,
        /// The pod, marked as migrating, and its parts; absent if its VM is gone.
        pod: Option<(PodHandle, Arc<PodResources>)>,
    },
    /// It brought a pod here, and the grant came; the guest lacks pages.
    Lacking {
        /// As journaled.
        record: DestinationRecord,
        /// The pod, to be found.
        pod: Box<LackingPod>,
    },
    /// It was to bring a pod here, and no grant had come: nothing of it is left, and the driver answers so.
    Discarded {
        /// As journaled.
        record: DestinationRecord,
    },
}

/// Finds every pod again; tells which migrations are open. A pod that cannot be found again does not
/// keep the others from it.
///
/// # Errors
/// The pods' folders cannot be listed. Nothing has been touched then.
pub async fn recover(node: &Arc<Node>, journal: Recovery) -> io::Result<Vec<OpenMigration>> {
    let mut open = Vec::new();
    let mut seen = Vec::new();
    let mut folders = Vec::new();
    match std::fs::read_dir(node.pods_dir()) {
        Ok(entries) => {
            for entry in entries {
                folders.push(entry?.path());
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    for damaged in &journal.damaged {
        tracing::error!(error = chain(damaged), "the journal is damaged");
    }
    for dir in folders {
        let Some(name) = dir.file_name().and_then(|n| n.to_str()).map(str::to_owned) else {
            continue;
        };
        match find(node, &dir, &name, &journal).await {
            Ok(found) => open.extend(found),
            Err(error) => tracing::error!(pod = name, error = chain(&error), "not found again"),
        }
        seen.push(name);
    }
    for owner in &journal.owners {
        // The service was killed between the journal's entry and the folder, or before the entry was closed.
        if owner.state == OwnerState::Owner
            && !seen.contains(&owner.pod)
            && let Err(error) = node.journal.stop_owner(&owner.pod)
        {
            tracing::warn!(
                pod = owner.pod,
                error = chain(&error),
                "cannot close its entry"
            );
        }
    }
    for (record, owner) in &journal.sources {
        if !seen.contains(&record.pod) {
            let record = record.clone();
            let state = owner.as_ref().map(|owner| &owner.state);
            open.push(match state {
                Some(OwnerState::Released { migration, .. }) if *migration == record.migration => {
                    OpenMigration::Departed { record }
                }
                _ => OpenMigration::Source {
                    record,
                    handed_over: matches!(state, Some(OwnerState::HandedOver { .. })),
                    pod: None,
                },
            });
        }
    }
    for (record, _) in &journal.destinations {
        if !seen.contains(&record.pod) {
            open.push(match record.verdict() {
                Some(_) => OpenMigration::Destination {
                    record: record.clone(),
                    pod: None,
                },
                None => OpenMigration::Discarded {
                    record: record.clone(),
                },
            });
        }
    }
    Ok(open)
}

async fn find(
    node: &Arc<Node>,
    dir: &Path,
    name: &str,
    journal: &Recovery,
) -> Result<Vec<OpenMigration>, PodError> {
    let file = match state::load(dir) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            // Half made or half removed: at most a VMM is left of it.
            remove(node, dir, None).await?;
            return Ok(Vec::new());
        }
        Err(source) => {
            return Err(PodError::State {
                verb: "read the record in",
                path: dir.to_owned(),
                source,
            });
        }
    };
    if file.spec.name != name {
        return Err(PodError::NotFound(name.to_owned()));
    }
    let reservation = node.pods.reserve_slot(&file.spec, file.slot)?;
    let owner = match node.journal.owner(name) {
        Ok(owner) => owner,
        Err(error) => {
            reservation.keep_for_ever();
            return Err(PodError::step(name, "read whose it is", error));
        }
    };
    let (source, stale) = departing(&journal.sources, name, owner.as_ref());
    for record in stale {
        close(node, record);
    }
    let destination = decisive(&journal.destinations, name);
    let handed_over = owner
        .as_ref()
        .is_some_and(|o| matches!(o.state, OwnerState::HandedOver { .. }));
    let mine = owner
        .as_ref()
        .filter(|o| o.state == OwnerState::Owner || handed_over);
    let Some(owner) = mine else {
        let released = |o: &OwnerRecord| matches!(o.state, OwnerState::Released { .. });
        if source.is_some() && owner.as_ref().is_some_and(released) {
            // They have moved, and a service that was killed had not come to it.
            crate::volumes::remove_moved(&node.volumes, &file.spec, &file.vm);
            note_departed(node, source, &file).await;
        }
        remove(node, dir, Some(&file)).await?;
        if let Some(owner) = &owner {
            give_back(node, &file.vm, owner.epoch).await;
        }
        drop(reservation);
        let departed = source.map(|record| OpenMigration::Departed {
            record: record.clone(),
        });
        let discarded = destination.map(|record| OpenMigration::Discarded {
            record: record.clone(),
        });
        return Ok([departed, discarded].into_iter().flatten().collect());
    };
    if file.booting {
        let epoch_noted = node.journal.stop_owner(name);
        remove(node, dir, Some(&file)).await?;
        give_back(node, &file.vm, owner.epoch).await;
        epoch_noted.map_err(|e| PodError::step(name, "note that it was stopped", e))?;
        return Ok(Vec::new());
    }
    let granted = destination.filter(|r| r.verdict().is_some() && r.epoch == owner.epoch);
    let migration = source
        .map(|record| record.migration)
        .or(granted.map(|r| r.migration));
    let containers = file.record.containers.clone();
    let starting_again = file.starting_again;
    let facts = facts(node, dir, file)?;
    let epoch = owner.epoch;
    if let Some(record) = granted
        && node.arrivals.is_paged(record.migration)
    {
        return Ok(vec![OpenMigration::Lacking {
            record: record.clone(),
            pod: Box::new(LackingPod {
                reservation,
                facts,
                epoch,
                containers,
                migration: record.migration.to_string(),
            }),
        }]);
    }
    let role = role(source.is_some(), granted.is_some());
    let origin = match handed_over {
        true => Origin::InDoubt(epoch),
        false => Origin::Found(epoch),
    };
    let found = match starting_again {
        true => Err(interrupted(node, &facts).await?),
        false => attach(node, &facts, migration.is_some(), role, origin).await,
    };
    let birth = match (&found, migration) {
        (Err(reason), migration) => Birth::Dead {
            reason: reason.clone(),
            in_doubt: migration.filter(|_| handed_over).map(|id| id.to_string()),
        },
        (Ok(resources), None) => Birth::Running(Arc::clone(resources)),
        (Ok(resources), Some(id)) => Birth::Migrating {
            resources: Arc::clone(resources),
            migration: id.to_string(),
            in_doubt: handed_over,
        },
    };
    let handle = actor::spawn(node, reservation, facts, epoch, Some(containers), birth);
    let resources = found.ok();
    let open = match (source, granted) {
        (Some(record), _) => Some(OpenMigration::Source {
            record: record.clone(),
            handed_over,
            pod: Some((handle, resources)),
        }),
        (None, Some(record)) => Some(OpenMigration::Destination {
            record: record.clone(),
            pod: resources.map(|resources| (handle, resources)),
        }),
        (None, None) => None,
    };
    Ok(open.into_iter().collect())
}

/// Which part a found port plays. A pod departs only after its arrival has settled here: a gate that holds is then the
/// departure's, even where the journal still has the arrival, since its source has not been told.
fn role(departs: bool, arrives: bool) -> Role {
    if arrives && !departs {
        Role::Incoming
    } else {
        Role::Local
    }
}

fn facts(node: &Node, dir: &Path, file: PodFile) -> Result<Facts, PodError> {
    let logs =
        LogStore::open(&dir.join("logs"), node.config.limits.log_bytes).map_err(|source| {
            PodError::State {
                verb: "open the log in",
                path: dir.to_owned(),
                source,
            }
        })?;
    Ok(Facts {
        node: node.config.name.as_str().to_owned(),
        created_unix_ms: file.record.created_unix_ms,
        spec: file.spec,
        vm_spec: file.vm,
        slot: file.slot,
        dir: dir.to_owned(),
        logs: Arc::new(logs),
    })
}

/// Ends what there is of the VM of a pod that was being started again. The reason that it is shown as failed with.
async fn interrupted(node: &Node, facts: &Facts) -> Result<String, PodError> {
    let name = facts.spec.name.as_str();
    again::end_vm(&facts.dir)
        .await
        .map_err(|e| PodError::step(name, "end its VM", e))?;
    clean_network(node, facts.slot, name).await;
    Ok(again::INTERRUPTED.to_owned())
}

/// Removes a pod that this node does not own: its VM, its port, its folder.
async fn remove(node: &Node, dir: &Path, file: Option<&PodFile>) -> Result<(), PodError> {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    tracing::warn!(pod = %name, "it is not this node's (any more): removing what is left of it");
    again::end_vm(dir)
        .await
        .map_err(|e| PodError::step(&name, "end its VM", e))?;
    if let Some(file) = file {
        clean_network(node, file.slot, &name).await;
    }
    super::run::remove_folder(dir).await
}

/// The destination has it, should that one not have come to note that.
async fn note_departed(node: &Node, source: Option<&SourceRecord>, file: &PodFile) {
    let Some(record) = source else { return };
    let (storage, vm) = (Arc::clone(&node.storage), file.vm.clone());
    let (to, granted) = (record.to.clone(), record.offered);
    let noted = tokio::task::spawn_blocking(move || storage.hand_over_all(&vm, &to, granted));
    if let Err(error) = noted.await {
        tracing::error!(%error, "whose its volumes are is not noted");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_departure_counts_more_than_the_arrival_before_it() {
        assert_eq!(role(true, true), Role::Local);
        assert_eq!(role(false, true), Role::Incoming);
        assert_eq!(role(false, false), Role::Local);
    }
}
