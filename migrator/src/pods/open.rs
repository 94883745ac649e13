//! Which of a pod's open migrations goes on after a restart.

use crate::api::error::chain;
use crate::daemon::node::Node;
use crate::migration::journal::{
    DestinationRecord, Entry, OwnerRecord, OwnerState, SourceRecord, SourceState,
};

/// Of the migrations that were to take a pod away and were left open, the one that counts: services that were killed one
/// after the other leave several. And those that do not: history, or never handed over, and what they had begun is undone
/// with the one that counts.
pub(super) fn departing<'a>(
    sources: &'a [(SourceRecord, Option<OwnerRecord>)],
    pod: &str,
    owner: Option<&OwnerRecord>,
) -> (Option<&'a SourceRecord>, Vec<&'a SourceRecord>) {
    let mut counts = None;
    let mut stale = Vec::new();
    for (record, _) in sources.iter().filter(|(record, _)| record.pod == pod) {
        let may_count = owner.is_some_and(|owner| match &owner.state {
            OwnerState::HandedOver { migration, .. } | OwnerState::Released { migration, .. } => {
                record.migration == *migration
            }
            // Not handed over, any one will do: all of them end in the same way.
            OwnerState::Owner => record.epoch == owner.epoch,
            OwnerState::Stopped => false,
        });
        if may_count {
            stale.extend(counts.replace(record));
        } else {
            stale.push(record);
        }
    }
    (counts, stale)
}

/// Notes that a migration of which nothing is left did not take place.
pub(super) fn close(node: &Node, record: &SourceRecord) {
    let closed = SourceRecord {
        state: SourceState::Failed {
            reason: "the service was restarted, and a later migration counts".to_owned(),
        },
        ..record.clone()
    };
    if let Err(error) = node.journal.apply(&Entry::Source(closed)) {
        // The next service tries again.
        tracing::warn!(
            pod = record.pod,
            migration = %record.migration,
            error = chain(&error),
            "cannot close an old migration"
        );
    }
}

/// Of the migrations that were to bring a pod here, the one that counts: services that were killed one after the
/// other leave several that never came to a grant beside the one that did.
pub(super) fn decisive<'a>(
    destinations: &'a [(DestinationRecord, Option<OwnerRecord>)],
    pod: &str,
) -> Option<&'a DestinationRecord> {
    destinations
        .iter()
        .map(|(record, _)| record)
        .filter(|record| record.pod == pod)
        .max_by_key(|record| (record.verdict().is_some(), record.epoch))
}

#[cfg(test)]
mod tests {
    use vm_runtime::units::Epoch;

    use super::*;
    use crate::migration::journal::DestinationState;
    use crate::wire::id::MigrationId;

    #[test]
    fn the_migration_that_was_handed_over_counts_whatever_else_is_open() {
        let record = |id, pod: &str, epoch| {
            let record = SourceRecord {
                migration: MigrationId([id; 16]),
                pod: pod.to_owned(),
                to: "b".to_owned(),
                epoch: Epoch(epoch),
                offered: Epoch(epoch + 1),
                state: SourceState::Started,
            };
            (record, None)
        };
        let records = [
            record(1, "web", 4),
            record(2, "web", 9),
            record(3, "web", 9),
            record(4, "db", 12),
        ];
        let owner = |state| OwnerRecord {
            pod: "web".to_owned(),
            epoch: Epoch(9),
            state,
        };
        let ids = |owner: Option<&OwnerRecord>| {
            let (counts, stale) = departing(&records, "web", owner);
            let stale: Vec<u8> = stale.iter().map(|r| r.migration.0[0]).collect();
            (counts.map(|r| r.migration.0[0]), stale)
        };
        for id in [1, 2, 3] {
            let handed_over = owner(OwnerState::HandedOver {
                to: "b".to_owned(),
                migration: MigrationId([id; 16]),
                offered: Epoch(10),
            });
            let (counts, stale) = ids(Some(&handed_over));
            assert_eq!(counts, Some(id));
            assert_eq!(stale.len(), 2);
        }
        let (counts, stale) = ids(Some(&owner(OwnerState::Owner)));
        assert!(matches!(counts, Some(2 | 3)) && stale.contains(&1));
        // It has come back since: what took it away once is history.
        let newer = OwnerRecord {
            epoch: Epoch(11),
            ..owner(OwnerState::Owner)
        };
        assert_eq!(ids(Some(&newer)), (None, vec![1, 2, 3]));
        assert_eq!(ids(None), (None, vec![1, 2, 3]));
        assert_eq!(departing(&records, "other", None), (None, Vec::new()));
    }

    #[test]
    fn a_granted_migration_counts_more_than_those_that_never_were() {
        let record = |id, pod: &str, epoch, state| {
            let record = DestinationRecord {
                migration: MigrationId([id; 16]),
                pod: pod.to_owned(),
                from: "a".to_owned(),
                epoch: Epoch(epoch),
                state,
            };
            (record, None)
        };
        let granted = DestinationState::Owner { resumed: false };
        let records = [
            record(1, "web", 2, DestinationState::Prepared),
            record(2, "web", 2, granted.clone()),
            record(3, "web", 2, DestinationState::Prepared),
            record(4, "db", 9, granted),
        ];
        let found = decisive(&records, "web").map(|record| record.migration);
        assert_eq!(found, Some(MigrationId([2; 16])));
        assert!(decisive(&records, "other").is_none());
    }
}
