use vm_runtime::pod::PodNet;
use vm_runtime::units::Bytes;

use super::*;

fn spec(name: &str, last: u8) -> PodSpec {
    PodSpec {
        name: name.to_owned(),
        labels: BTreeMap::new(),
        net: PodNet {
            mac: format!("52:54:00:00:00:{last:02x}").parse().unwrap(),
            ipv4: Some(([10, 77, 0, last].into(), 24)),
            ipv6: None,
            gateway4: None,
            gateway6: None,
        },
        memory: Bytes::mib(128),
        hugepages: false,
        vcpus: 1,
        volumes: Vec::new(),
        containers: Vec::new(),
        cold_start: false,
        storage_class: None,
        settings: Default::default(),
    }
}

#[test]
fn names_addresses_and_slots_are_given_once() {
    let registry = PodRegistry::default();
    let first = registry.reserve(&spec("a", 1), 8).unwrap();
    assert_eq!(first.slot(), 0);
    assert!(matches!(
        registry.reserve(&spec("a", 2), 8),
        Err(PodError::NameTaken(_))
    ));
    assert!(matches!(
        registry.reserve(&spec("b", 1), 8),
        Err(PodError::AddressTaken { .. })
    ));
    let second = registry.reserve(&spec("b", 2), 8).unwrap();
    assert_eq!(second.slot(), 1);
    assert!(matches!(
        registry.reserve(&spec("c", 3), 2),
        Err(PodError::TooMany(2))
    ));
}

#[test]
fn a_dropped_reservation_frees_everything() {
    let registry = PodRegistry::default();
    drop(registry.reserve(&spec("a", 1), 1).unwrap());
    assert_eq!(registry.reserve(&spec("a", 1), 1).unwrap().slot(), 0);
}

#[test]
fn a_reserved_pod_is_not_listed() {
    let registry = PodRegistry::default();
    let _reservation = registry.reserve(&spec("a", 1), 1).unwrap();
    assert!(registry.list().is_empty());
    assert!(matches!(registry.get("a"), Err(PodError::NotFound(_))));
}
