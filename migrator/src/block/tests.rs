//! Disks under threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::*;

const SIZE: u64 = 4 << 20;
const G: u64 = GRANULE;

fn disk() -> (tempfile::TempDir, Arc<Disk>) {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::create(&dir.path().join("disk"), SIZE).unwrap();
    (dir, Arc::new(disk))
}

fn of(first: u64, count: u64) -> Extent {
    Extent {
        offset: first * G,
        len: count * G,
    }
}

fn read(disk: &Disk, offset: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0xee; len];
    disk.read_at(&mut data, offset).unwrap();
    data
}

/// Waits for a condition that another thread brings about.
fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::yield_now();
    }
}

#[test]
fn what_is_written_is_read_and_holes_are_zeros() {
    let (dir, disk) = disk();
    disk.write_at(b"hello", G - 2).unwrap();
    disk.flush().unwrap();
    assert_eq!(read(&disk, G - 2, 6), b"hello\0");
    assert!(disk.allocated_bytes().unwrap() < SIZE);
    let again = Disk::open(&dir.path().join("disk")).unwrap();
    assert_eq!(again.size(), SIZE);
    assert_eq!(read(&again, G - 2, 5), b"hello");
}

#[test]
fn discarded_and_zeroed_ranges_give_their_room_back() {
    let (_dir, disk) = disk();
    disk.write_at(&vec![7; 2 << 20], 0).unwrap();
    let before = disk.allocated_bytes().unwrap();
    disk.discard(0, 1 << 20).unwrap();
    disk.zero(1 << 20, 1 << 19, false).unwrap();
    assert!(disk.allocated_bytes().unwrap() <= before - (1 << 20));
    let end = 3 << 19;
    assert_eq!(read(&disk, 0, end), vec![0; end]);
    assert_eq!(read(&disk, end as u64, 1), [7]);
    let data = disk.allocated().unwrap();
    assert_eq!(data.first().unwrap().offset, end as u64);
    disk.zero(end as u64, 4096, true).unwrap();
    assert_eq!(read(&disk, end as u64, 4097)[4095..], [0, 7]);
}

#[test]
fn nothing_reaches_beyond_the_end() {
    let (_dir, disk) = disk();
    for (offset, len) in [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 1)] {
        let mut data = vec![0; len];
        assert!(disk.read_at(&mut data, offset).is_err());
        assert!(disk.write_at(&data, offset).is_err());
        assert!(disk.discard(offset, len as u64).is_err());
        assert!(disk.zero(offset, len as u64, false).is_err());
    }
    assert!(disk.discard(1, u64::MAX).is_err());
    assert!(disk.supply(SIZE, None).is_err());
    assert!(disk.supply(1, None).is_err());
    assert!(disk.supply(0, Some(&[0; 5])).is_err());
    assert!(disk.expect(&[of(SIZE / G, 1)]).is_err());
}

#[test]
fn each_change_marks_the_granules_that_it_touches_until_they_are_taken() {
    let (_dir, disk) = disk();
    disk.write_at(b"old", 0).unwrap();
    let first = disk.start_tracking();
    assert_eq!(disk.take_dirty(first), Ok(Vec::new()));
    disk.write_at(b"ab", 2 * G - 1).unwrap();
    disk.discard(9 * G, G).unwrap();
    disk.zero(20 * G, 1, false).unwrap();
    assert_eq!(disk.dirty_bytes(), 4 * G);
    assert_eq!(
        disk.take_dirty(first),
        Ok(vec![of(1, 2), of(9, 1), of(20, 1)])
    );
    assert_eq!(disk.take_dirty(first), Ok(Vec::new()));
    let second = disk.start_tracking();
    assert_eq!(disk.take_dirty(first), Err(StaleGeneration));
    assert_eq!(disk.take_dirty(second), Ok(Vec::new()));
}

#[test]
fn a_copy_by_dirty_rounds_is_exact_under_concurrent_writers() {
    let (_dir, disk) = disk();
    let (_dir2, copy) = self::disk();
    let generation = disk.start_tracking();
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (1..=3_u64)
        .map(|seed| {
            let (disk, stop) = (Arc::clone(&disk), Arc::clone(&stop));
            thread::spawn(move || {
                let mut state = seed;
                while !stop.load(Ordering::Relaxed) {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    let offset = (state >> 16) % (SIZE - 8192);
                    let _admitted = disk.admit().unwrap();
                    disk.write_at(&state.to_le_bytes().repeat(700), offset)
                        .unwrap();
                }
            })
        })
        .collect();
    let take = || {
        let mut bytes = 0;
        for extent in disk.take_dirty(generation).unwrap() {
            let data = read(&disk, extent.offset, extent.len as usize);
            copy.write_at(&data, extent.offset).unwrap();
            bytes += extent.len;
        }
        bytes
    };
    for _ in 0..50 {
        until("the writers write", || disk.dirty_bytes() > 0);
        take();
    }
    let quiet = disk.quiesce(Duration::from_secs(20)).unwrap();
    take();
    assert_eq!(disk.dirty_bytes(), 0);
    let same = read(&disk, 0, SIZE as usize) == read(&copy, 0, SIZE as usize);
    assert!(same, "the copy differs");
    stop.store(true, Ordering::Relaxed);
    drop(quiet);
    for writer in writers {
        writer.join().unwrap();
    }
}

#[test]
fn quiet_holds_new_requests_up_and_ends_with_its_guard() {
    let (_dir, disk) = disk();
    let admitted = disk.admit().unwrap();
    let busy = disk.quiesce(Duration::ZERO).unwrap_err();
    assert!(matches!(busy, DiskError::Busy { under_way: 1 }), "{busy}");
    drop(admitted);
    // The failed one holds nothing up.
    drop(disk.admit().unwrap());
    let quiet = disk.quiesce(Duration::ZERO).unwrap();
    let entered = Arc::new(AtomicBool::new(false));
    let waits = {
        let (disk, entered) = (Arc::clone(&disk), Arc::clone(&entered));
        thread::spawn(move || {
            let _admitted = disk.admit().unwrap();
            entered.store(true, Ordering::Release);
        })
    };
    // Counted under the hold, were it not held up.
    assert!(!entered.load(Ordering::Acquire));
    drop(quiet);
    waits.join().unwrap();
    assert!(entered.load(Ordering::Acquire));
    disk.close();
    assert!(matches!(disk.admit(), Err(DiskError::Closed)));
}

#[test]
fn reads_wait_for_what_is_missing_and_have_it_asked_for_once() {
    let (_dir, disk) = disk();
    let mut wanted = disk.expect(&[of(1, 2), of(5, 1)]).unwrap();
    assert_eq!(disk.missing_bytes(), 3 * G);
    assert_eq!(read(&disk, 0, 8), [0; 8]);
    let readers: Vec<_> = (0..2)
        .map(|_| {
            let disk = Arc::clone(&disk);
            thread::spawn(move || read(&disk, G - 1, 2))
        })
        .collect();
    assert_eq!(wanted.blocking_recv(), Some(of(1, 1)));
    let data = vec![9; G as usize];
    assert_eq!(disk.supply(G, Some(&data)).unwrap(), Supplied::Placed);
    for reader in readers {
        assert_eq!(reader.join().unwrap(), [0, 9]);
    }
    assert!(wanted.try_recv().is_err(), "asked for once only");
    assert_eq!(disk.supply(G, None).unwrap(), Supplied::AlreadyHere);
    assert_eq!(read(&disk, G, 1), [9]);
    assert_eq!(disk.missing(), [of(2, 1), of(5, 1)]);
}

#[test]
fn whole_overwrites_make_present_and_partial_ones_wait() {
    let (_dir, disk) = disk();
    let mut wanted = disk.expect(&[of(1, 4)]).unwrap();
    disk.write_at(&vec![1; G as usize], G).unwrap();
    disk.discard(2 * G, G).unwrap();
    assert_eq!(disk.missing(), [of(3, 2)]);
    let old = vec![7; G as usize];
    assert_eq!(disk.supply(G, Some(&old)).unwrap(), Supplied::AlreadyHere);
    assert_eq!(read(&disk, G, 1), [1]);
    let partial = {
        let disk = Arc::clone(&disk);
        // The end of granule 3, and the whole of 4.
        thread::spawn(move || disk.write_at(&vec![2; G as usize + 1], 4 * G - 1))
    };
    assert_eq!(wanted.blocking_recv(), Some(of(3, 1)));
    assert_eq!(disk.supply(3 * G, Some(&old)).unwrap(), Supplied::Placed);
    partial.join().unwrap().unwrap();
    assert_eq!(read(&disk, 4 * G - 2, 3), [7, 2, 2]);
    assert_eq!(disk.missing_bytes(), 0);
}

#[test]
fn a_closed_disk_lets_go_of_whoever_waits() {
    let (_dir, disk) = disk();
    let mut wanted = disk.expect(&[of(0, 1)]).unwrap();
    let waits = {
        let disk = Arc::clone(&disk);
        thread::spawn(move || disk.read_at(&mut [0], 0))
    };
    assert_eq!(wanted.blocking_recv(), Some(of(0, 1)));
    disk.close();
    assert!(matches!(waits.join().unwrap(), Err(DiskError::Closed)));
}

#[test]
fn a_new_expectation_has_the_waiting_ask_anew() {
    let (_dir, disk) = disk();
    let mut first = disk.expect(&[of(0, 2)]).unwrap();
    let waits = {
        let disk = Arc::clone(&disk);
        thread::spawn(move || read(&disk, 0, 1))
    };
    assert_eq!(first.blocking_recv(), Some(of(0, 1)));
    let mut second = disk.expect(&[of(0, 1)]).unwrap();
    assert_eq!(second.blocking_recv(), Some(of(0, 1)));
    disk.supply(0, None).unwrap();
    assert_eq!(waits.join().unwrap(), [0]);
}

#[test]
fn disks_under_one_limit_wait_for_each_other_and_end_with_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let disks: Vec<Arc<Disk>> = ["a", "b"]
        .iter()
        .map(|name| Arc::new(Disk::create(&dir.path().join(name), 1 << 20).unwrap()))
        .collect();
    let generations: Vec<_> = disks.iter().map(|disk| disk.start_tracking()).collect();
    let write = |disk: usize, granule: u64| {
        let disk = Arc::clone(&disks[disk]);
        let (told, done) = std::sync::mpsc::channel();
        thread::spawn(move || {
            let written = disk.write_at(&[1], granule * GRANULE);
            told.send(written.map_err(|error| matches!(error, DiskError::Closed)))
        });
        done
    };
    let soon = Duration::from_secs(20);
    Disk::limit_dirty(&disks, Some(GRANULE));
    for (disk, granule) in [(0, 0), (0, 1)] {
        assert_eq!(write(disk, granule).recv_timeout(soon), Ok(Ok(())));
    }
    // The other disk has written nothing, and waits all the same; a take of the first lets it on.
    let waits = write(1, 0);
    assert!(waits.recv_timeout(Duration::from_millis(50)).is_err());
    disks[0].take_dirty(generations[0]).unwrap();
    assert_eq!(waits.recv_timeout(soon), Ok(Ok(())));
    assert_eq!(write(1, 1).recv_timeout(soon), Ok(Ok(())));
    // Another limit, and one that is closed.
    let waits = write(0, 0);
    let ends = write(1, 2);
    assert!(ends.recv_timeout(Duration::from_millis(50)).is_err());
    disks[1].close();
    assert_eq!(ends.recv_timeout(soon), Ok(Err(true)));
    Disk::limit_dirty(&disks, None);
    assert_eq!(waits.recv_timeout(soon), Ok(Ok(())));
}
