use super::*;

fn key(container: &str, stream: LogStream) -> StreamKey {
    StreamKey {
        container: container.to_owned(),
        stream,
    }
}

fn text(log: &LogStore, of: &StreamKey) -> String {
    let (entries, _) = log.read_all().unwrap();
    entries
        .into_iter()
        .filter(|e| e.key == *of)
        .map(|e| String::from_utf8(e.data).unwrap())
        .collect()
}

#[test]
fn a_piece_that_comes_twice_is_stored_once() {
    let dir = tempfile::tempdir().unwrap();
    let log = LogStore::open(dir.path(), 1 << 20).unwrap();
    let out = key("web", LogStream::Stdout);
    assert_eq!(log.append(&out, 0, b"hello ", 1).unwrap(), 6);
    assert_eq!(log.append(&out, 0, b"hello ", 1).unwrap(), 6);
    assert_eq!(log.append(&out, 3, b"lo world", 2).unwrap(), 11);
    assert_eq!(text(&log, &out), "hello world");
}

#[test]
fn a_reopened_log_goes_on_where_it_stood_and_cuts_an_unfinished_record() {
    let dir = tempfile::tempdir().unwrap();
    let out = key("web", LogStream::Stdout);
    let err = key("web", LogStream::Stderr);
    {
        let log = LogStore::open(dir.path(), 1 << 20).unwrap();
        log.append(&out, 0, b"one\n", 1).unwrap();
        log.append(&err, 0, b"two\n", 1).unwrap();
    }
    let file = std::fs::read_dir(dir.path())
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    let mut bytes = std::fs::read(file.path()).unwrap();
    bytes.extend_from_slice(&[200, 0, 0, 0, 1, 2]);
    std::fs::write(file.path(), bytes).unwrap();

    let log = LogStore::open(dir.path(), 1 << 20).unwrap();
    assert_eq!(log.next_offset(&out), 4);
    assert_eq!(log.append(&out, 4, b"three\n", 2).unwrap(), 10);
    assert_eq!(text(&log, &out), "one\nthree\n");
    assert_eq!(text(&log, &err), "two\n");
}

#[test]
fn the_log_stays_within_its_bound_and_keeps_the_offsets() {
    let dir = tempfile::tempdir().unwrap();
    let limit = 64 << 10;
    let out = key("a", LogStream::Stdout);
    let quiet = key("b", LogStream::Stdout);
    let log = LogStore::open(dir.path(), limit).unwrap();
    log.append(&quiet, 0, b"once", 0).unwrap();
    let mut at = 0;
    for _ in 0..1000 {
        at = log.append(&out, at, &[b'x'; 1000], 0).unwrap();
    }
    let size: u64 = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|f| f.unwrap().metadata().unwrap().len())
        .sum();
    assert!(size <= limit + 4096, "{size}");
    drop(log);
    let log = LogStore::open(dir.path(), limit).unwrap();
    assert_eq!(log.next_offset(&quiet), 4);
    assert_eq!(log.next_offset(&out), 1_000_000);
    assert!(!text(&log, &out).is_empty());
}

#[test]
fn a_reader_follows_across_rotation() {
    let dir = tempfile::tempdir().unwrap();
    let out = key("a", LogStream::Stdout);
    let log = LogStore::open(dir.path(), 16 << 10).unwrap();
    let mut cursor = log.start();
    let mut got = Vec::new();
    let mut at = 0;
    for n in 0..100u32 {
        at = log
            .append(&out, at, format!("{n:0>500}\n").as_bytes(), 0)
            .unwrap();
        loop {
            let (entries, next) = log.read(cursor, 4096).unwrap();
            got.extend(entries.into_iter().flat_map(|e| e.data));
            if next == cursor {
                break;
            }
            cursor = next;
        }
    }
    let lines: Vec<u32> = String::from_utf8(got)
        .unwrap()
        .lines()
        .map(|l| l.parse().unwrap())
        .collect();
    assert_eq!(lines, (0..100).collect::<Vec<_>>());
}

#[test]
fn the_tail_moves_to_another_node_with_exact_offsets() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let out = key("a", LogStream::Stdout);
    let err = key("a", LogStream::Stderr);
    let source = LogStore::open(one.path(), 1 << 20).unwrap();
    source.append(&err, 0, b"long ago", 0).unwrap();
    let mut at = 0;
    for _ in 0..10 {
        at = source.append(&out, at, &[b'y'; 100], 0).unwrap();
    }
    let blob = source.tail(250).unwrap();
    let there = LogStore::open(two.path(), 1 << 20).unwrap();
    there.install(&blob).unwrap();
    assert_eq!(there.offsets(), source.offsets());
    assert_eq!(text(&there, &out).len(), 200);
    assert_eq!(text(&there, &err), "");
    // The guest sends the last piece again, and more.
    assert_eq!(there.append(&out, 900, &[b'z'; 200], 1).unwrap(), 1100);
    assert_eq!(text(&there, &out).len(), 300);
    // After a restart it is all still known.
    drop(there);
    let there = LogStore::open(two.path(), 1 << 20).unwrap();
    assert_eq!(there.next_offset(&out), 1100);
    assert_eq!(there.next_offset(&err), 8);
}

#[test]
fn a_tail_that_is_longer_than_the_bound_leaves_its_end() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let out = key("a", LogStream::Stdout);
    let source = LogStore::open(one.path(), 1 << 20).unwrap();
    let mut at = 0;
    for number in 0..400 {
        let line = format!("{number:0999}\n");
        at = source.append(&out, at, line.as_bytes(), 0).unwrap();
    }
    let there = LogStore::open(two.path(), 64 << 10).unwrap();
    there.install(&source.tail(1 << 20).unwrap()).unwrap();
    let files = std::fs::read_dir(two.path()).unwrap();
    let size: u64 = files
        .map(|file| file.unwrap().metadata().unwrap().len())
        .sum();
    assert!(size <= (64 << 10) + 4096, "{size}");
    let kept = text(&there, &out);
    let numbers: Vec<u32> = kept.lines().map(|line| line.parse().unwrap()).collect();
    assert!(numbers.len() > 30, "{numbers:?}");
    assert_eq!(numbers.last(), Some(&399));
    assert!(numbers.is_sorted_by(|a, b| a + 1 == *b), "{numbers:?}");
    drop(there);
    let there = LogStore::open(two.path(), 64 << 10).unwrap();
    assert_eq!(there.offsets(), source.offsets());
    assert_eq!(text(&there, &out), kept);
}

#[test]
fn junk_from_a_peer_is_refused_and_stores_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let log = LogStore::open(dir.path(), 1 << 20).unwrap();
    for junk in [&b"\xff\xff\xff\xff"[..], &[9, 0, 0, 0, 1], &[0; 64]] {
        assert!(matches!(log.install(junk), Err(InstallError::Malformed(_))));
    }
    assert!(log.offsets().is_empty());
}
