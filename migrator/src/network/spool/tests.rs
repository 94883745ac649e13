//! What is written is read again, whole or up to where it is torn.

use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::network::log::FIRST_FRAME_SEQ;

fn item(kind: LogKind, seq: u64, len: usize) -> LogItem {
    LogItem {
        seq,
        kind,
        frame: Bytes::from(vec![seq as u8; len]),
    }
}

fn records() -> Vec<Record> {
    vec![
        (item(LogKind::Frame, FIRST_FRAME_SEQ, 24), Some(255)),
        (item(LogKind::Residue, 1, FRAME_MAX), None),
        (item(LogKind::Residue, 2, 60), Some(0)),
        (item(LogKind::ResidueEnd, 3, 0), None),
        (item(LogKind::End, FIRST_FRAME_SEQ + 1, 0), None),
    ]
}

fn filled(dir: &Path) -> Spool {
    let mut spool = Spool::new(&dir.join("spool"), 7);
    assert!(spool.begin());
    for (item, bucket) in records() {
        spool.push(&item, bucket);
        spool.write();
    }
    spool
}

#[test]
fn what_was_written_comes_back_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = filled(dir.path()).path;
    let mode = path.metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut next = Spool::new(&dir.path().join("spool"), 7);
    assert_eq!(next.restore(), Some(records()));
    let late = (item(LogKind::Frame, FIRST_FRAME_SEQ + 2, 90), Some(4));
    next.push(&late.0, late.1);
    next.write();
    let mut last = Spool::new(&dir.path().join("spool"), 7);
    let all: Vec<_> = records().into_iter().chain([late]).collect();
    assert_eq!(last.restore(), Some(all));
    last.remove();
    assert_eq!(last.restore(), None);
}

#[test]
fn a_torn_file_gives_its_whole_records_and_is_cut_behind_them() {
    let mut whole = MAGIC.to_vec();
    let mut ends = vec![whole.len()];
    for (item, bucket) in records().iter().filter(|(i, _)| i.frame.len() < 100) {
        encode(&mut whole, item, *bucket);
        ends.push(whole.len());
    }
    for cut in 0..whole.len() {
        let (found, at) = decode_all(&Bytes::copy_from_slice(&whole[..cut]));
        let expected = ends.iter().filter(|end| **end <= cut).count();
        assert_eq!(found.len(), expected.saturating_sub(1), "cut at {cut}");
        assert_eq!(at, expected.checked_sub(1).map_or(0, |last| ends[last]));
        let mut flipped = whole.clone();
        flipped[cut] ^= 0x10;
        assert!(decode_all(&Bytes::from(flipped)).0.len() < ends.len() - 1);
    }
    let dir = tempfile::tempdir().unwrap();
    let path = filled(dir.path()).path;
    let length = path.metadata().unwrap().len();
    File::options()
        .write(true)
        .open(&path)
        .and_then(|file| file.set_len(length - 1))
        .unwrap();
    let mut next = Spool::new(path.parent().unwrap(), 7);
    assert_eq!(next.restore().map(|found| found.len()), Some(4));
    next.push(&records()[4].0, None);
    next.write();
    assert_eq!(path.metadata().unwrap().len(), length);
}

#[test]
fn a_long_file_is_shortened_to_its_marks() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = filled(dir.path());
    let marks = [item(LogKind::Frame, FIRST_FRAME_SEQ + 90, 0)];
    spool.shorten(&marks);
    assert!(spool.length > FRAME_MAX as u64, "short as it is");
    while spool.length < SHORT {
        spool.push(&item(LogKind::Frame, FIRST_FRAME_SEQ + 2, FRAME_MAX), None);
        spool.write();
    }
    spool.shorten(&marks);
    let [mark] = marks;
    assert_eq!(spool.restore(), Some(vec![(mark, None)]));
}

#[test]
fn a_hold_forgets_the_one_before_and_does_without_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = filled(dir.path());
    assert!(spool.begin());
    assert_eq!(spool.restore(), Some(Vec::new()));
    // A full disk.
    spool.file = OpenOptions::new().write(true).open("/dev/full").ok();
    for (item, bucket) in records() {
        spool.push(&item, bucket);
        spool.write();
    }
    assert!(spool.file.is_none() && spool.batch.is_empty());
    assert!(spool.begin(), "the next hold tries again");
    std::fs::write(dir.path().join("file"), "").unwrap();
    assert!(!Spool::new(&dir.path().join("file"), 7).begin());
}

#[test]
fn a_batch_longer_than_one_call_takes_is_written_whole() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = Spool::new(dir.path(), 7);
    assert!(spool.begin());
    let many = RECORDS_AT_A_TIME as u64 * 2 + 3;
    let all: Vec<Record> = (0..many)
        .map(|i| {
            let length = if i % 3 == 0 { 0 } else { i as usize };
            let frame = item(LogKind::Frame, FIRST_FRAME_SEQ + i, length);
            (frame, Some(i as u8))
        })
        .collect();
    for (item, bucket) in &all {
        spool.push(item, *bucket);
    }
    spool.write();
    spool.push(&item(LogKind::End, FIRST_FRAME_SEQ + many, 0), None);
    spool.write();
    let file = std::fs::metadata(&spool.path).unwrap();
    assert_eq!(file.len(), spool.length);
    let mut restored = spool.restore().unwrap();
    assert_eq!(restored.pop().unwrap().0.kind, LogKind::End);
    assert_eq!(restored, all);
}
