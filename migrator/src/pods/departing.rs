//! Which of a pod's migrations away from here goes on after a restart. Pure.

use crate::migration::journal::{OwnerRecord, OwnerState, SourceRecord};

/// Of the migrations that were to take a pod away and were left open, the one that counts: services that were killed one
/// after the other leave several. And those that do not: they were not handed over, and what they had begun is undone with the one that counts.
pub(super) fn departing<'a>(
    sources: &'a [(SourceRecord, Option<OwnerRecord>)],
    pod: &str,
    owner: Option<&OwnerRecord>,
) -> (Option<&'a SourceRecord>, Vec<&'a SourceRecord>) {
    let mut open: Vec<&SourceRecord> = sources
        .iter()
        .map(|(record, _)| record)
        .filter(|record| record.pod == pod)
        .collect();
    let decides = |record: &SourceRecord| match owner.map(|owner| &owner.state) {
        Some(OwnerState::HandedOver { migration, .. } | OwnerState::Released { migration, .. }) => {
            record.migration == *migration
        }
        Some(OwnerState::Owner | OwnerState::Stopped) | None => false,
    };
    // Without one that was handed over, any one will do: all of them end in the same way.
    open.sort_by_key(|record| (decides(record), record.epoch));
    let counts = open.pop();
    (counts, open)
}

#[cfg(test)]
mod tests {
    use vm_runtime::units::Epoch;

    use super::*;
    use crate::migration::journal::SourceState;
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
        assert_eq!(departing(&records, "other", None), (None, Vec::new()));
    }
}
