use super::*;

fn content() -> (tempfile::TempDir, Arc<Content>) {
    let dir = tempfile::tempdir().unwrap();
    let content = Arc::new(Content::open(dir.path()).unwrap());
    (dir, content)
}

#[test]
fn a_blob_that_broke_off_goes_on_behind_its_last_byte() {
    let (dir, content) = content();
    let digest = Digest::of(b"hello world");
    let mut partial = content.begin(digest, 11).unwrap();
    partial.append(b"hello").unwrap();
    drop(partial);
    assert!(!content.has(digest));
    // As after a restart.
    let content = Arc::new(Content::open(dir.path()).unwrap());
    let mut partial = content.begin(digest, 11).unwrap();
    assert_eq!(partial.length(), 5);
    partial.append(b" world").unwrap();
    partial.finish().unwrap();
    assert_eq!(content.read(digest, 11).unwrap(), b"hello world");
}

#[test]
fn what_is_not_what_it_must_be_never_becomes_a_blob() {
    let (_dir, content) = content();
    let digest = Digest::of(b"hello");
    let mut partial = content.begin(digest, 5).unwrap();
    partial.append(b"hullo").unwrap();
    let error = partial.finish().unwrap_err();
    assert!(matches!(error, ContentError::Tampered { .. }));
    assert!(!content.has(digest));
    // And nothing of it is left to go on with.
    let mut partial = content.begin(digest, 5).unwrap();
    assert_eq!(partial.length(), 0);
    let error = partial.append(b"hello!").unwrap_err();
    assert!(matches!(error, ContentError::TooLong { .. }));
    partial.append(b"hello").unwrap();
    partial.finish().unwrap();
}

#[test]
fn what_comes_from_this_machine_is_verified_too() {
    let (_dir, content) = content();
    let digest = Digest::of(b"hello");
    let put = |size, bytes: &[u8]| content.put(digest, size, bytes);
    assert!(matches!(
        put(5, b"hullo"),
        Err(ContentError::Tampered { .. })
    ));
    assert!(matches!(
        put(4, b"hello"),
        Err(ContentError::TooLong { .. })
    ));
    assert!(!content.has(digest));
    put(5, b"hello").unwrap();
    assert!(content.has(digest));
}

#[test]
fn only_what_nobody_needs_is_cleared() {
    let (_dir, content) = content();
    let [kept, used, other] = [b"a", b"b", b"c"].map(|bytes| {
        let digest = Digest::of(bytes);
        content.put(digest, 1, &bytes[..]).unwrap();
        digest
    });
    let young = Digest::of(b"young");
    drop(content.begin(young, 5).unwrap());
    let hold = content.hold([used]);
    let needed = BTreeSet::from([kept]);
    let now = SystemTime::now();
    assert_eq!(content.unneeded(&needed, now).unwrap(), [(other, 1)]);
    assert_eq!(content.clear(&needed, now).unwrap(), [(other, 1)]);
    assert!(content.has(kept) && content.has(used) && !content.has(other));
    content.release(&[used]).unwrap();
    assert!(content.has(used));
    drop(hold);
    let later = now + PARTIAL_KEPT + Duration::from_secs(60);
    let mut cleared = content.clear(&needed, later).unwrap();
    cleared.sort();
    let mut expected = vec![(used, 1), (young, 0)];
    expected.sort();
    assert_eq!(cleared, expected);
}
