use std::sync::Arc;

use proptest::prelude::*;

use super::files::{Chunk, ChunkFiles};
use super::order::UseOrder;
use crate::image::digest::Digest;

#[test]
fn what_is_pinned_is_not_removed() {
    let folder = tempfile::tempdir().unwrap();
    let files = Arc::new(ChunkFiles::open(folder.path().join("chunks")).unwrap());
    let digest = Digest::of(b"one");
    let mut pin = files.pin(Vec::new());
    pin.add(digest);
    files.put(&digest, b"one").unwrap();
    assert_eq!(files.remove([digest]), 0);
    assert_eq!(files.read(&digest, 3), Chunk::Here(b"one"[..].into()));
    drop(pin);
    assert_eq!(files.remove([digest]), 1);
    assert_eq!(files.read(&digest, 3), Chunk::Missing);
}

#[test]
fn a_chunk_whose_length_a_record_gets_wrong_is_not_set_aside() {
    let folder = tempfile::tempdir().unwrap();
    let files = ChunkFiles::open(folder.path().join("chunks")).unwrap();
    let digest = Digest::of(b"one");
    files.put(&digest, b"one").unwrap();
    assert_eq!(files.read(&digest, 2), Chunk::Misfit);
    assert_eq!(files.read(&digest, 3), Chunk::Here(b"one"[..].into()));
}

#[test]
fn a_file_that_a_power_cut_emptied_is_no_chunk() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("chunks");
    let files = ChunkFiles::open(root.clone()).unwrap();
    let digest = Digest::of(b"one");
    files.put(&digest, b"one").unwrap();
    let hex = digest.hex();
    std::fs::write(root.join(&hex[..2]).join(&hex), b"").unwrap();
    let files = ChunkFiles::open(root).unwrap();
    assert!(files.has(&digest));
    assert_eq!(files.read(&digest, 3), Chunk::Damaged);
    assert!(!files.has(&digest));
    // It comes again.
    files.put(&digest, b"one").unwrap();
    assert_eq!(files.read(&digest, 3), Chunk::Here(b"one"[..].into()));
}

proptest! {
    #[test]
    fn an_order_of_use_outlives_the_service_and_junk_in_its_file(
        used in proptest::collection::vec(0u32..40, 0..60), cut in 0usize..4,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("order");
        let order = UseOrder::open(&path, 32);
        let mut expected = Vec::new();
        for index in &used {
            order.mark(*index);
            // Those past the end of the set's words are never marked; the caller asks for none.
            if *index < 32 && !expected.contains(index) {
                expected.push(*index);
            }
        }
        let listed: Vec<u32> = order.list().into_iter().filter(|index| *index < 32).collect();
        prop_assert_eq!(&listed, &expected);
        drop(order);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.extend(vec![0xff; cut]);
        std::fs::write(&path, bytes).unwrap();
        prop_assert_eq!(UseOrder::open(&path, 32).list(), expected);
    }
}
