//! Chunks that images share, and files of earlier versions.

use std::fs;

use super::handover::{CHUNK, Node, image, record};
use super::noise;
use crate::image::digest::Digest;
use crate::image::store_files::EROFS;

#[test]
fn an_image_that_an_earlier_version_kept_in_a_file_is_cut_into_chunks() {
    let node = Node::new();
    let whole = record("old:1", &image());
    node.put_file(&whole, &image());
    let node = node.reopen();
    assert_eq!(node.bytes(&whole), image());
    let folder = node.folder.path().join("images").join(whole.id().hex());
    assert!(!folder.join(EROFS).exists());
    let node = node.reopen();
    assert_eq!(node.bytes(&whole), image());
}

#[test]
fn what_is_damaged_in_an_old_file_is_missing_and_the_rest_is_not() {
    let node = Node::new();
    let old = record("old:1", &image());
    let mut rotten = image();
    rotten[CHUNK + 3] ^= 1;
    node.put_file(&old, &rotten);
    let node = node.reopen();
    assert_eq!(node.store.chunks().missing(&old), [1]);
}

#[test]
fn chunks_that_images_share_are_there_once_and_go_with_the_last() {
    let node = Node::new();
    node.put("a:1", &image());
    let mut similar = image();
    similar[5] ^= 1;
    let similar = node.put("b:1", &similar);
    // Four different ones, and the one that was changed.
    assert_eq!(node.chunks(), 5);
    node.store.remove("a:1", &[]).unwrap();
    assert_eq!(node.chunks(), 4);
    assert!(node.store.chunks().missing(&similar).is_empty());
    let node = node.reopen();
    node.store.remove("b:1", &[]).unwrap();
    assert_eq!(node.chunks(), 0);
}

#[test]
fn chunks_that_a_crash_left_without_an_image_go_at_the_next_start() {
    let node = Node::new();
    let record = node.put("a:1", &image());
    let stray = noise(6, CHUNK);
    node.store
        .chunks()
        .put(&Digest::of(&stray), &stray)
        .unwrap();
    fs::write(node.store.chunks().root().join(".tmp-7"), b"half").unwrap();
    let node = node.reopen();
    assert_eq!(node.chunks(), 4);
    assert!(!node.store.chunks().root().join(".tmp-7").exists());
    assert_eq!(node.bytes(&record), image());
}
