use std::time::Duration;

use super::abort;
use super::kind::{Kind, Packet};
use super::summary::{Move, near};
use super::tally::{Tally, What};

#[test]
fn a_packet_is_read_as_it_was_written_and_a_change_is_seen() {
    for kind in Kind::ALL {
        let packet = Packet {
            kind,
            answer: true,
            sender: 2,
            run: 77,
            number: 1 << 33,
        };
        let mut bytes = packet.encode();
        assert_eq!(bytes.len(), kind.length());
        assert_eq!(Packet::decode(&bytes), Some((packet, true)));
        *bytes.last_mut().unwrap() ^= 1;
        assert_eq!(Packet::decode(&bytes), Some((packet, false)));
        bytes.pop();
        assert_eq!(Packet::decode(&bytes), Some((packet, false)));
        bytes[0] ^= 1;
        assert_eq!(Packet::decode(&bytes), None);
    }
    assert_eq!(Packet::decode(&[]), None);
}

#[test]
fn ports_of_the_kinds_are_apart() {
    let ports: std::collections::BTreeSet<u16> = Kind::ALL.iter().map(|k| k.port()).collect();
    assert_eq!(ports.len(), Kind::ALL.len());
    let shares: u32 = Kind::ALL.iter().map(|kind| kind.share()).sum();
    assert_eq!(shares, super::kind::SHARES);
    assert_eq!(super::kind::Kind::unicast(), &Kind::ALL[..6]);
}

#[test]
fn a_tally_tells_lost_late_and_doubled_apart() {
    let mut tally = Tally::default();
    for number in [0, 1, 4, 3, 4, 5, 5] {
        tally.add(number, true, 9);
    }
    assert_eq!((tally.received, tally.next), (5, 6));
    assert_eq!(tally.missing.iter().collect::<Vec<_>>(), [&2]);
    assert_eq!((tally.doubled, tally.reordered, tally.changed), (2, 1, 0));
    tally.add(6, false, 9);
    assert_eq!((tally.changed, tally.next), (1, 6));
    let events: Vec<What> = tally.events.iter().map(|event| event.what).collect();
    use What::{Changed, Doubled, Gap, Late};
    assert_eq!(events, [Gap, Late, Doubled, Doubled, Changed]);
}

#[test]
fn what_a_tally_tells_is_read_by_the_driver() {
    let mut tally = Tally::default();
    for number in [0, 3, 3] {
        tally.add(number, true, 5);
    }
    let read: super::peers::Tally = serde_json::from_str(&tally.json()).unwrap();
    assert_eq!((read.received, read.next, read.missing), (2, 4, 2));
    assert_eq!(read.first_missing, [1, 2]);
    assert_eq!((read.lost(4), read.lost(6)), (2, 4));
    assert!(read.is_wrong() && read.events.len() == 2);
}

#[test]
fn an_event_is_told_with_the_move_that_it_is_nearest_to() {
    let one = |number, began_at_unix_us| Move {
        number,
        began_at_unix_us,
        ended_at_unix_us: began_at_unix_us + 1_000_000,
        frozen_at_unix_us: began_at_unix_us + 400_000,
        ..Move::default()
    };
    let moves = [one(1, 10_000_000), one(2, 20_000_000)];
    let text = near(20_410_000, &moves);
    assert!(text.contains("move 2, +10.0 ms from its freeze"), "{text}");
    let text = near(11_500_000, &moves);
    assert!(
        text.contains("+1500.0 ms from the beginning of move 1"),
        "{text}"
    );
    assert_eq!(near(5, &[]), "before the first move");
}

#[test]
fn every_second_end_is_near_the_switchover_and_the_rest_are_before_it() {
    let lead = Duration::from_millis(400);
    for number in 1..200 {
        let delay = abort::delay(9, number, lead);
        match number % 2 {
            0 => assert!(delay < lead, "{delay:?}"),
            _ => assert!((280..440).contains(&delay.as_millis()), "{delay:?}"),
        }
        assert_eq!(delay, abort::delay(9, number, lead));
    }
}
