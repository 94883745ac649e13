//! The driver `file`, as two nodes see it.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use vm_runtime::spec::{SharedDisk, SharedDriver};

use super::*;
use crate::config::StorageClass;

fn node(name: &str, mount: &Path, state: &Path) -> Arc<Storage> {
    let class = StorageClass::File {
        path: mount.to_owned(),
    };
    let config = config::Storage {
        classes: [("shared".to_owned(), class)].into(),
    };
    Arc::new(Storage::open(&config, name, state).unwrap())
}

struct Pair {
    mount: tempfile::TempDir,
    _state: tempfile::TempDir,
    a: Arc<Storage>,
    b: Arc<Storage>,
}

/// Two nodes with one folder, and a volume `db` in it.
fn pair() -> Pair {
    let (mount, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let a = node("a", mount.path(), state.path());
    let b = node("b", mount.path(), state.path());
    let class = a.class("shared").unwrap();
    class.init().unwrap();
    class.create("db", Bytes::mib(64), false).unwrap();
    Pair {
        mount,
        _state: state,
        a,
        b,
    }
}

fn handle(storage: &Arc<Storage>) -> SharedHandle {
    let disk = storage.describe("shared", "db".to_owned(), false).unwrap();
    SharedHandle::new(storage, &disk, "web")
}

fn refusal(result: Result<(), StorageError>) -> String {
    crate::api::error::chain(&result.unwrap_err())
}

#[test]
fn a_folder_without_the_mark_is_not_the_mounted_one() {
    let (mount, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let storage = node("a", mount.path(), state.path());
    let class = storage.class("shared").unwrap();
    let refused = class.create("db", Bytes::mib(64), false).unwrap_err();
    assert!(
        matches!(refused, StorageError::NoMarker { .. }),
        "{refused}"
    );
    for word in ["mount", "migrator volume init shared"] {
        assert!(refused.to_string().contains(word), "{refused}");
    }
    assert_eq!(fs::read_dir(mount.path()).unwrap().count(), 0);
    let id = class.init().unwrap();
    assert_eq!(class.id().unwrap(), id);
    assert!(matches!(class.init(), Err(StorageError::Marked { .. })));
    // Another class's mark.
    let marker = mount.path().join(".migrator-class");
    let text = fs::read_to_string(&marker).unwrap();
    fs::write(&marker, text.replace("\"shared\"", "\"other\"")).unwrap();
    let refused = class.find("db").unwrap_err();
    assert!(refused.to_string().contains("class `other`"), "{refused}");
    assert!(matches!(
        storage.class("ceph"),
        Err(StorageError::NoClass { .. })
    ));
}

#[test]
fn a_volume_made_on_one_node_is_seen_taken_and_removed_on_all() {
    let Pair { mount, a, b, .. } = pair();
    let found = b.find("db").unwrap().unwrap();
    assert_eq!((found.size, found.class.as_str()), (64 << 20, "shared"));
    assert!(found.allocated < found.size / 2);
    let taken = b
        .class("shared")
        .unwrap()
        .create("db", Bytes::mib(64), false);
    assert!(matches!(taken, Err(StorageError::Taken(_))));
    let at_a = handle(&a);
    at_a.take(Epoch(1), Take::New).unwrap();
    // Neither a second pod nor a removal gets past the one that serves it.
    let at_b = SharedHandle::new(&b, at_a.disk(), "other");
    let refused = refusal(at_b.take(Epoch(9), Take::New));
    assert!(refused.contains("being served"), "{refused}");
    assert!(b.class("shared").unwrap().remove("db").is_err());
    // Its service is killed: the lock is gone, the record is not.
    drop(at_a);
    let refused = refusal(at_b.take(Epoch(9), Take::New));
    assert!(refused.contains("pod `web` on node a"), "{refused}");
    assert!(b.class("shared").unwrap().remove("db").is_err());
    handle(&a).take(Epoch(1), Take::Owned).unwrap();
    let vm = vm(&a, "db", false);
    a.give_back_all(&vm, Epoch(1));
    at_b.take(Epoch(9), Take::New).unwrap();
    drop(at_b);
    let given = b
        .class("shared")
        .unwrap()
        .release("db", "b", false)
        .unwrap();
    assert_eq!(given.unwrap().pod, "other");
    b.class("shared").unwrap().remove("db").unwrap();
    assert_eq!(a.find("db").unwrap(), None);
    let left = fs::read_dir(mount.path()).unwrap().count();
    assert_eq!(left, 1, "the mark alone is left");
}

fn vm(storage: &Storage, volume: &str, ephemeral: bool) -> VmSpec {
    let shared = storage.describe("shared", volume.to_owned(), ephemeral);
    let mut vm = crate::wire::golden::offer().vm;
    vm.writable = vec![vm_runtime::spec::WritableDisk {
        serial: "w0".to_owned(),
        name: "data".to_owned(),
        size: Bytes::mib(64),
        shared: Some(shared.unwrap()),
    }];
    vm
}

#[test]
fn at_the_grant_it_changes_hands_and_no_moment_has_two() {
    let Pair {
        a,
        b,
        mount: _mount,
        _state,
    } = pair();
    let (source, destination) = (handle(&a), handle(&b));
    source.take(Epoch(4), Take::New).unwrap();
    let offered = |storage: &Storage, from: &str, epoch| {
        storage.check_offered(source.disk(), Bytes::mib(64), from, "web", Epoch(epoch))
    };
    offered(&b, "a", 5).unwrap();
    assert!(offered(&b, "c", 5).unwrap_err().contains("on node a"));
    // Before the source lets go, the destination gets nothing, whatever it believes.
    let class = b.class("shared").unwrap();
    let held = class.change("db", &mut |_| true);
    assert!(matches!(held, Err(StorageError::Served { .. })));
    // The move fails: the source has it again.
    source.let_go();
    source.take_back().unwrap();
    assert!(matches!(
        class.change("db", &mut |_| true),
        Err(StorageError::Served { .. })
    ));
    // It does not.
    source.let_go();
    destination.take(Epoch(5), Take::Owned).unwrap();
    // The source learns of it late, and changes nothing.
    a.hand_over_all(&vm(&a, "db", false), "b", Epoch(5));
    a.give_back_all(&vm(&a, "db", false), Epoch(4));
    destination.let_go();
    let refused = refusal(source.take(Epoch(4), Take::Owned));
    assert!(refused.contains("pod `web` on node b"), "{refused}");
    destination.take_back().unwrap();
    assert_eq!(
        b.find("db").unwrap().unwrap().record.holder.unwrap().epoch,
        Epoch(5)
    );
}

#[test]
fn what_is_another_storage_or_another_size_is_refused_with_its_name() {
    let Pair {
        a,
        b,
        mount: _mount,
        _state,
    } = pair();
    let at_a = handle(&a);
    at_a.take(Epoch(1), Take::New).unwrap();
    let check = |disk: &SharedDisk, size| b.check_offered(disk, size, "a", "web", Epoch(2));
    let mut disk = at_a.disk().clone();
    let refused = check(&disk, Bytes::mib(65)).unwrap_err();
    assert!(refused.contains("bytes here"), "{refused}");
    disk.volume = "other".to_owned();
    let refused = check(&disk, Bytes::mib(64)).unwrap_err();
    assert!(refused.contains("has no volume `other`"), "{refused}");
    disk.class_id = "another".to_owned();
    let refused = check(&disk, Bytes::mib(64)).unwrap_err();
    assert!(refused.contains("is another storage here"), "{refused}");
    disk.class = "ceph".to_owned();
    let refused = check(&disk, Bytes::mib(64)).unwrap_err();
    assert!(refused.contains("no storage class `ceph`"), "{refused}");
    let mut disk = at_a.disk().clone();
    disk.driver = SharedDriver::Rbd;
    assert!(check(&disk, Bytes::mib(64)).is_err());
}

#[test]
fn a_dead_nodes_volume_is_released_by_force_only_and_stays_lost_to_it() {
    let Pair {
        a,
        b,
        mount: _mount,
        _state,
    } = pair();
    let dead = handle(&a);
    dead.take(Epoch(3), Take::New).unwrap();
    let class = b.class("shared").unwrap();
    // Somebody serves it: no force helps.
    assert!(matches!(
        class.release("db", "b", true),
        Err(StorageError::Served { .. })
    ));
    dead.let_go();
    let refused = class.release("db", "b", false).unwrap_err();
    assert!(
        matches!(refused, StorageError::NeedsForce { .. }),
        "{refused}"
    );
    assert_eq!(class.release("db", "b", true).unwrap().unwrap().node, "a");
    let refused = refusal(dead.take_back());
    assert!(refused.contains("released by force"), "{refused}");
    handle(&b).take(Epoch(1), Take::New).unwrap();
}

#[test]
fn of_many_that_race_for_a_volume_one_gets_it() {
    let Pair {
        a,
        b,
        mount: _mount,
        _state,
    } = pair();
    let won: Vec<bool> = std::thread::scope(|scope| {
        let racers: Vec<_> = (0..8)
            .map(|racer| {
                let storage = if racer % 2 == 0 { &a } else { &b };
                scope.spawn(move || {
                    let disk = storage.describe("shared", "db".to_owned(), false).unwrap();
                    let handle = SharedHandle::new(storage, &disk, &format!("pod{racer}"));
                    handle.take(Epoch(1), Take::New).is_ok()
                })
            })
            .collect();
        racers
            .into_iter()
            .map(|racer| racer.join().unwrap())
            .collect()
    });
    assert_eq!(won.iter().filter(|won| **won).count(), 1, "{won:?}");
}

#[test]
fn what_ends_with_its_pod_is_removed_by_the_one_who_has_it_and_by_nobody_else() {
    let Pair {
        a,
        b,
        mount: _mount,
        _state,
    } = pair();
    let class = a.class("shared").unwrap();
    class.create("web.1.root", Bytes::mib(64), true).unwrap();
    let vm = vm(&a, "web.1.root", true);
    let shared = vm.writable[0].shared.clone().unwrap();
    let at_a = SharedHandle::new(&a, &shared, "web");
    at_a.take(Epoch(1), Take::New).unwrap();
    at_a.let_go();
    let at_b = SharedHandle::new(&b, &shared, "web");
    at_b.take(Epoch(2), Take::Owned).unwrap();
    at_b.let_go();
    a.give_back_all(&vm, Epoch(1));
    assert!(a.find("web.1.root").unwrap().is_some());
    b.give_back_all(&vm, Epoch(2));
    assert_eq!(a.find("web.1.root").unwrap(), None);
}
