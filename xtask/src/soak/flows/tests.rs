use super::kind::{Kind, Packet};
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
