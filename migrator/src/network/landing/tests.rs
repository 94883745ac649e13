//! What has landed outlives whoever read it, until it is dealt with.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair};

use super::*;

const PARKED: Label = Label {
    source: Source::Park,
    header: VNET_HEADER,
    number: Some(7),
};

/// Gives packets out one by one, as a TAP does.
struct Queue {
    from: OwnedFd,
    /// Without it, its end would be read.
    _to: OwnedFd,
}

impl Queue {
    fn of(packets: &[&[u8]]) -> Self {
        let kind = (AddressFamily::Unix, SockType::SeqPacket);
        let flags = SockFlag::SOCK_NONBLOCK;
        let (to, from) = socketpair(kind.0, kind.1, None, flags).unwrap();
        for packet in packets {
            send(to.as_raw_fd(), packet, MsgFlags::empty()).unwrap();
        }
        Self { from, _to: to }
    }
}

/// A packet of IPv4 whose frame has `length` bytes, all of the payload's being `byte`.
fn packet(header: usize, length: usize, byte: u8) -> Vec<u8> {
    let mut packet = vec![0; header];
    packet.extend([2; 12]);
    packet.extend([0x08, 0x00, 0x45, 0]);
    packet.extend(u16::try_from(length - 14).unwrap().to_be_bytes());
    packet.resize(header + length, byte);
    packet
}

fn read(landing: &mut Landing, queue: &Queue, label: Label) -> Vec<u8> {
    landing.read(queue.from.as_fd(), label).unwrap().to_vec()
}

#[test]
fn a_packet_that_was_read_is_there_for_the_next_service_whatever_it_ends_with() {
    let dir = tempfile::tempdir().unwrap();
    for (header, length, byte) in [
        (10, 60, 0),
        (10, 1514, FILL),
        (12, 60, FILL),
        (10, 65535, FILL),
        (10, 1000, 3),
    ] {
        let packet = packet(header, length, byte);
        let label = Label { header, ..PARKED };
        let mut landing = Landing::new(dir.path(), 3);
        assert_eq!(landing.left(), None);
        assert_eq!(read(&mut landing, &Queue::of(&[&packet]), label), packet);
        drop(landing);
        for _ in 0..2 {
            let mut next = Landing::new(dir.path(), 3);
            assert_eq!(next.left(), Some((packet.clone().into(), label)));
            assert!(next.is_taken());
        }
        let mut next = Landing::new(dir.path(), 3);
        next.left();
        next.clear();
    }
}

#[test]
fn padding_and_packets_that_say_no_length_come_back_too() {
    let dir = tempfile::tempdir().unwrap();
    let mut padded = packet(10, 30, 1);
    padded.resize(10 + 59, 0);
    let mut other = padded.clone();
    other[10 + 12..10 + 14].copy_from_slice(&0x88cc_u16.to_be_bytes());
    for packet in [padded, other] {
        read(
            &mut Landing::new(dir.path(), 3),
            &Queue::of(&[&packet]),
            PARKED,
        );
        let mut next = Landing::new(dir.path(), 3);
        assert_eq!(next.left().unwrap().0, packet);
        next.clear();
    }
}

#[test]
fn nothing_is_left_of_what_was_dealt_with_nor_of_an_empty_queue() {
    let dir = tempfile::tempdir().unwrap();
    let (long, short) = (packet(10, 1514, 1), packet(10, 60, 2));
    let queue = Queue::of(&[&long, &short]);
    let mut landing = Landing::new(dir.path(), 3);
    for expected in [&long, &short] {
        assert_eq!(read(&mut landing, &queue, PARKED), *expected);
        assert!(landing.is_taken());
        landing.clear();
        assert!(!landing.is_taken());
        assert_eq!(Landing::new(dir.path(), 3).left(), None);
    }
    assert_eq!(landing.read(queue.from.as_fd(), PARKED), Err(Errno::EAGAIN));
    assert!(!landing.is_taken());
    drop(landing);
    assert_eq!(Landing::new(dir.path(), 3).left(), None);
}

#[test]
fn while_a_packet_is_there_others_land_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (packet(10, 60, 1), packet(12, 90, 2));
    let queue = Queue::of(&[&one, &two]);
    let mut landing = Landing::new(dir.path(), 3);
    read(&mut landing, &queue, PARKED);
    let label = Label {
        source: Source::Tap,
        header: 12,
        number: Some(1),
    };
    assert_eq!(read(&mut landing, &queue, label), two);
    let to_inject = Label {
        number: None,
        ..PARKED
    };
    landing.relabel(to_inject);
    drop(landing);
    let left = Landing::new(dir.path(), 3).left();
    assert_eq!(left, Some((one.into(), to_inject)));
}

#[test]
fn a_place_that_was_being_cleared_or_is_of_another_kind_is_empty() {
    let dir = tempfile::tempdir().unwrap();
    let path = Landing::new(dir.path(), 3).path;
    let packet = packet(10, 1514, 1);
    for torn in [0, 5, 10, 700] {
        read(
            &mut Landing::new(dir.path(), 3),
            &Queue::of(&[&packet]),
            PARKED,
        );
        let mut file = std::fs::read(&path).unwrap();
        file[24..32].fill(0xff);
        file[64..64 + torn].fill(FILL);
        std::fs::write(&path, file).unwrap();
        assert_eq!(Landing::new(dir.path(), 3).left(), None);
        // Nor is a later packet taken for a longer one.
        let short = self::packet(10, 60, 1);
        read(
            &mut Landing::new(dir.path(), 3),
            &Queue::of(&[&short]),
            PARKED,
        );
        let mut next = Landing::new(dir.path(), 3);
        assert_eq!(next.left().unwrap().0, short);
        next.clear();
    }
    for other in [vec![], vec![0; 100], vec![1; 64 + ROOM], vec![0; 1 << 20]] {
        std::fs::write(&path, other).unwrap();
        assert_eq!(Landing::new(dir.path(), 3).left(), None);
    }
    let mut last = Landing::new(dir.path(), 3);
    last.remove();
    assert!(!path.exists());
}

#[test]
fn without_a_file_packets_are_read_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "no folder").unwrap();
    let mut landing = Landing::new(&file, 3);
    let packet = packet(10, 60, 1);
    let queue = Queue::of(&[&packet, &packet]);
    for _ in 0..2 {
        assert_eq!(read(&mut landing, &queue, PARKED), packet);
        assert!(!landing.is_taken());
    }
}
