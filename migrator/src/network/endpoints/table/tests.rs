use proptest::prelude::*;

use super::*;

fn mac(last: u8) -> MacAddress {
    MacAddress([0x52, 0x54, 0, 0, 0, last])
}

fn claim(last: u8, epoch: u64) -> Claim {
    Claim {
        mac: mac(last),
        v4: Some([10, 77, 0, last].into()),
        v6: Some([0xfd77, 0, 0, 0, 0, 0, 0, u16::from(last)].into()),
        epoch: Epoch(epoch),
    }
}

fn key(last: u8) -> [u8; 16] {
    mapped([10, 77, 0, last])
}

const UP: fn(u16) -> bool = |_| true;
const DOWN: fn(u16) -> bool = |_| false;

#[test]
fn a_move_is_one_store_and_a_new_pod_is_placed_before_it_is_found() {
    let mut table = Table::new(4);
    let first = table.merge(claim(1, 1), 2, UP).unwrap();
    assert_eq!(first.len(), 3);
    assert_eq!(first[0], Change::Place(0, Place { node: 2, epoch: 1 }));
    assert!(first.contains(&Change::Enter(key(1), mac(1), 0)));
    let moved = table.merge(claim(1, 2), 3, UP).unwrap();
    assert_eq!(moved, [Change::Place(0, Place { node: 3, epoch: 2 })]);
    assert_eq!(
        table.merge(claim(1, 2), 3, UP),
        Ok(Vec::new()),
        "told twice"
    );
}

#[test]
fn the_larger_epoch_wins_in_whatever_order_it_comes() {
    let mut table = Table::new(4);
    table.merge(claim(1, 2), 3, UP).unwrap();
    assert_eq!(table.merge(claim(1, 1), 2, UP), Err(Refused::Stale(2)));
    assert_eq!(table.merge(claim(1, 2), 2, UP), Err(Refused::Twice));
    assert_eq!(table.pod(mac(1)).unwrap().node, 3);
    assert_eq!(table.granted(claim(1, 2), 5), Ok(Vec::new()));
    assert_eq!(table.pod(mac(1)).unwrap().node, 3);
}

#[test]
fn a_pod_made_anew_is_believed_once_nobody_else_can_have_it() {
    let mut table = Table::new(4);
    table.merge(claim(1, 9), 2, UP).unwrap();
    assert_eq!(table.merge(claim(1, 1), 3, UP), Err(Refused::Stale(9)));
    assert!(table.merge(claim(1, 1), 3, DOWN).is_ok());
    assert_eq!(table.pod(mac(1)).unwrap().node, 3);
    table.own_pod(claim(1, 5)).unwrap();
    assert_eq!(table.merge(claim(1, 4), 3, DOWN), Err(Refused::Stale(5)));
    table.merge(claim(1, 6), 3, UP).unwrap();
    assert_eq!(table.own().count(), 0, "the grant that this node gave");
}

#[test]
fn an_address_stays_with_the_pod_that_has_it() {
    let mut table = Table::new(4);
    table.merge(claim(1, 1), 2, UP).unwrap();
    let thief = Claim {
        mac: mac(9),
        ..claim(1, 7)
    };
    assert_eq!(
        table.merge(thief, 3, UP),
        Err(Refused::AddressTaken(mac(1)))
    );
    assert!(table.pod(mac(9)).is_none());
    table.withdraw(mac(1), 2);
    assert!(table.merge(thief, 3, UP).is_ok());
}

#[test]
fn only_the_node_that_has_a_pod_can_withdraw_it() {
    let mut table = Table::new(4);
    table.merge(claim(1, 1), 2, UP).unwrap();
    table.merge(claim(1, 2), 3, UP).unwrap();
    assert_eq!(table.withdraw(mac(1), 2), []);
    let changes = table.withdraw(mac(1), 3);
    assert!(changes.contains(&Change::Leave(key(1))));
    assert_eq!(changes.len(), 2);
    assert_eq!(table.pods().count(), 0);
}

#[test]
fn a_snapshot_withdraws_what_is_not_in_it() {
    let mut table = Table::new(4);
    for last in 1..=3 {
        table.merge(claim(last, 1), 2, UP).unwrap();
    }
    table.merge(claim(4, 1), 3, UP).unwrap();
    table.keep_only(2, &BTreeSet::from([mac(2)]));
    let left: Vec<_> = table.pods().map(|pod| pod.claim.mac).collect();
    assert_eq!(left, [mac(2), mac(4)]);
}

#[test]
fn an_index_that_was_given_back_is_the_last_to_be_used_again() {
    let mut table = Table::new(3);
    table.merge(claim(1, 1), 2, UP).unwrap();
    table.withdraw(mac(1), 2);
    for last in 2..=4 {
        table.merge(claim(last, 1), 2, UP).unwrap();
    }
    assert_eq!(table.pod(mac(4)).unwrap().index, 0);
    assert_eq!(table.merge(claim(5, 1), 2, UP), Err(Refused::Full));
    assert_eq!(
        table.merge(claim(2, EPOCH_MAX + 1), 2, UP),
        Err(Refused::BadEpoch)
    );
}

#[test]
fn a_table_that_is_read_back_from_the_maps_goes_on() {
    let mut table = Table::new(4);
    table.merge(claim(1, 1), 2, UP).unwrap();
    table.merge(claim(2, 1), 2, UP).unwrap();
    let mut next = Table::new(4);
    next.restore(table.pods().copied());
    assert_eq!(next.merge(claim(1, 1), 2, UP), Ok(Vec::new()));
    next.merge(claim(3, 1), 2, UP).unwrap();
    assert_eq!(next.pod(mac(3)).unwrap().index, 2);
}

proptest! {
    /// Grants of one pod, told in any order and any number of times, end at its last owner.
    #[test]
    fn whatever_the_order_the_last_grant_is_where_it_ends(
        owners in proptest::collection::vec(1u16..5, 1..8),
        order in proptest::collection::vec(any::<prop::sample::Index>(), 1..40),
    ) {
        let mut table = Table::new(4);
        let tell = |table: &mut Table, at: usize| {
            let _ = table.merge(claim(1, at as u64 + 1), owners[at], UP);
        };
        for index in order {
            tell(&mut table, index.index(owners.len()));
        }
        tell(&mut table, owners.len() - 1);
        let pod = table.pod(mac(1)).unwrap();
        prop_assert_eq!(pod.node, owners[owners.len() - 1]);
        prop_assert_eq!(pod.claim.epoch.0, owners.len() as u64);
    }

    /// The changes, carried out, give the same map as the table has.
    #[test]
    fn the_maps_follow_the_table(
        steps in proptest::collection::vec((0u8..4, 1u8..5, 1u64..6, 0u16..4), 1..60),
    ) {
        let mut table = Table::new(3);
        let mut places = [Place { node: 0, epoch: 0 }; 3];
        let mut addresses = BTreeMap::new();
        for (what, last, epoch, node) in steps {
            let changes = match what {
                0 => table.own_pod(claim(last, epoch)).unwrap_or_default(),
                1 => table.withdraw(mac(last), node),
                2 => table.granted(claim(last, epoch), node).unwrap_or_default(),
                _ => table.merge(claim(last, epoch), node, |n| n % 2 == 0).unwrap_or_default(),
            };
            for change in changes {
                match change {
                    Change::Place(index, place) => places[index as usize] = place,
                    Change::Enter(address, mac, index) => {
                        addresses.insert(address, (mac, index));
                    }
                    Change::Leave(address) => {
                        addresses.remove(&address);
                    }
                }
            }
            for pod in table.pods() {
                prop_assert_eq!(places[pod.index as usize].node, pod.node);
                prop_assert_eq!(places[pod.index as usize].epoch, pod.claim.epoch.0);
                for address in pod.claim.addresses() {
                    prop_assert_eq!(addresses.get(&address), Some(&(pod.claim.mac, pod.index)));
                }
            }
            prop_assert_eq!(addresses.len(), 2 * table.pods().count());
        }
    }
}
