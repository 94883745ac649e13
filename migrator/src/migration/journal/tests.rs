use super::*;

const ID: MigrationId = MigrationId([7; 16]);

fn open(dir: &Path) -> (Journal, Recovery) {
    Journal::open(dir).unwrap()
}

fn destination(state: DestinationState) -> DestinationRecord {
    DestinationRecord {
        migration: ID,
        pod: "web".to_owned(),
        from: "a".to_owned(),
        epoch: Epoch(5),
        state,
    }
}

fn source(state: SourceState) -> SourceRecord {
    SourceRecord {
        migration: ID,
        pod: "web".to_owned(),
        to: "b".to_owned(),
        epoch: Epoch(4),
        offered: Epoch(5),
        state,
    }
}

#[test]
fn an_unfinished_migration_is_found_again_with_its_owner_record() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, recovery) = open(dir.path());
    assert!(recovery.owners.is_empty());
    assert_eq!(journal.create_owner("web").unwrap(), Epoch(1));
    journal
        .apply(&Entry::Source(source(SourceState::Started)))
        .unwrap();
    let owner = OwnerRecord {
        pod: "web".to_owned(),
        epoch: Epoch(4),
        state: OwnerState::HandedOver {
            to: "b".to_owned(),
            migration: ID,
            offered: Epoch(5),
        },
    };
    journal.apply(&Entry::Owner(owner.clone())).unwrap();
    let (_, recovery) = open(dir.path());
    assert_eq!(recovery.owners, std::slice::from_ref(&owner));
    assert_eq!(
        recovery.sources,
        [(source(SourceState::Started), Some(owner))]
    );
    assert!(recovery.damaged.is_empty());
}

#[test]
fn a_finished_migration_is_not_taken_up_again() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = open(dir.path());
    journal
        .apply(&Entry::Source(source(SourceState::Completed)))
        .unwrap();
    journal
        .apply(&Entry::Destination(destination(DestinationState::Settled)))
        .unwrap();
    let (_, recovery) = open(dir.path());
    assert!(recovery.sources.is_empty() && recovery.destinations.is_empty());
}

#[test]
fn an_unknown_migration_is_journaled_as_discarded_before_the_answer() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = open(dir.path());
    assert_eq!(journal.answer(ID, "a").unwrap(), Verdict::Discarded);
    let again = journal.apply(&Entry::Destination(destination(DestinationState::Prepared)));
    assert!(matches!(again, Err(JournalError::Known(ID))), "{again:?}");
    let (journal, _) = open(dir.path());
    assert_eq!(journal.answer(ID, "a").unwrap(), Verdict::Discarded);
}

#[test]
fn a_grant_is_answered_with_running_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = open(dir.path());
    for state in [
        DestinationState::Prepared,
        DestinationState::Owner { resumed: false },
    ] {
        journal
            .apply(&Entry::Destination(destination(state)))
            .unwrap();
    }
    assert_eq!(journal.owner("web").unwrap().unwrap().epoch, Epoch(5));
    assert_eq!(journal.answer(ID, "a").unwrap(), Verdict::Running);
    journal.settle(ID, "a").unwrap();
    journal.settle(ID, "a").unwrap();
    let (journal, _) = open(dir.path());
    assert_eq!(journal.answer(ID, "a").unwrap(), Verdict::Running);
}

#[test]
fn another_node_gets_no_answer() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = open(dir.path());
    journal
        .apply(&Entry::Destination(destination(DestinationState::Prepared)))
        .unwrap();
    let asked = journal.answer(ID, "c");
    assert!(
        matches!(asked, Err(JournalError::NotYours { .. })),
        "{asked:?}"
    );
    assert_eq!(journal.answer(ID, "a").unwrap(), Verdict::Discarded);
}

#[test]
fn a_crash_between_the_grant_and_the_owner_record_is_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = open(dir.path());
    let granted = destination(DestinationState::Owner { resumed: false });
    write(&journal.path("destination", &ID.to_string()), &granted).unwrap();
    let (_, recovery) = open(dir.path());
    assert_eq!(recovery.owners, [granted.owner()]);
    assert_eq!(
        recovery.destinations,
        [(granted.clone(), Some(granted.owner()))]
    );
}

#[test]
fn a_pod_that_runs_is_taken_up_again_until_its_source_has_let_go() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = open(dir.path());
    let running = destination(DestinationState::Owner { resumed: true });
    for state in [
        DestinationState::Prepared,
        DestinationState::Owner { resumed: false },
        DestinationState::Owner { resumed: true },
    ] {
        journal
            .apply(&Entry::Destination(destination(state)))
            .unwrap();
    }
    let (_, recovery) = open(dir.path());
    let granted = Some(running.owner());
    assert_eq!(recovery.destinations, [(running.clone(), granted)]);
    // It has moved on.
    let gone = OwnerRecord {
        epoch: running.epoch.next(),
        state: OwnerState::Owner,
        ..running.owner()
    };
    journal.apply(&Entry::Owner(gone)).unwrap();
    assert_eq!(open(dir.path()).1.destinations, []);
    journal.apply(&Entry::Owner(running.owner())).unwrap();
    journal.settle(ID, "a").unwrap();
    assert_eq!(open(dir.path()).1.destinations, []);
}

#[test]
fn a_repair_never_takes_back_a_pod_that_has_moved_on() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = open(dir.path());
    let granted = destination(DestinationState::Owner { resumed: false });
    journal.apply(&Entry::Destination(granted.clone())).unwrap();
    let moved = OwnerRecord {
        state: OwnerState::Released {
            to: "c".to_owned(),
            migration: MigrationId([8; 16]),
        },
        ..granted.owner()
    };
    journal.apply(&Entry::Owner(moved.clone())).unwrap();
    let (_, recovery) = open(dir.path());
    assert_eq!(recovery.owners, [moved]);
}

#[test]
fn a_damaged_file_is_named_with_what_to_do_and_the_others_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = open(dir.path());
    journal.create_owner("web").unwrap();
    journal.create_owner("db").unwrap();
    let path = dir.path().join("owners/web.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("web", "wob")).unwrap();
    fs::write(dir.path().join("owners/db.tmp"), "half a rec").unwrap();
    let (journal, recovery) = open(dir.path());
    assert_eq!(recovery.owners.len(), 1);
    let message = recovery.damaged[0].to_string();
    assert!(
        message.contains("owners/web.json is damaged (wrong checksum)"),
        "{message}"
    );
    assert!(message.contains("migrator ps"), "{message}");
    assert!(!dir.path().join("owners/db.tmp").exists());
    assert!(matches!(
        journal.owner("web"),
        Err(JournalError::Damaged { .. })
    ));
    fs::write(&path, "").unwrap();
    assert!(matches!(
        journal.owner("web"),
        Err(JournalError::Damaged { .. })
    ));
}

#[test]
fn a_hostile_pod_name_touches_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = open(dir.path());
    for name in ["", "../x", "a/b", "a.b", "A", &"x".repeat(64)] {
        assert!(
            matches!(journal.create_owner(name), Err(JournalError::PodName(_))),
            "{name}"
        );
    }
}

#[test]
fn epochs_of_a_name_only_grow() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = open(dir.path());
    assert_eq!(journal.create_owner("web").unwrap(), Epoch(1));
    journal.stop_owner("web").unwrap();
    assert!(matches!(
        journal.stop_owner("web"),
        Err(JournalError::NotOwner(_))
    ));
    assert_eq!(journal.create_owner("web").unwrap(), Epoch(2));
}

#[test]
fn the_history_is_bounded_and_what_somebody_may_ask_about_stays() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = open(dir.path());
    let granted = destination(DestinationState::Owner { resumed: true });
    journal.apply(&Entry::Destination(granted)).unwrap();
    // Written directly: an fsync for each would only cost time.
    for n in 0..HISTORY as u128 + 50 {
        let migration = MigrationId((n << 8).to_be_bytes());
        let record = DestinationRecord {
            migration,
            ..destination(DestinationState::Discarded {
                reason: String::new(),
            })
        };
        let path = journal.path("destination", &migration.to_string());
        fs::write(path, file::new_file(&record)).unwrap();
    }
    let (journal, _) = open(dir.path());
    let files = fs::read_dir(dir.path().join("destination"))
        .unwrap()
        .count();
    assert_eq!(files, HISTORY + 1);
    assert_eq!(journal.answer(ID, "a").unwrap(), Verdict::Running);
}
