use std::time::{Duration, SystemTime};

use super::handover::{CHUNK, Node, image, record};
use crate::image::digest::Digest;
use crate::image::record::ImageRecord;

fn released(node: &Node, in_use: &[Digest]) -> Vec<ImageRecord> {
    let released = node.store.release_arriving(in_use, SystemTime::now());
    released.unwrap()
}

#[test]
fn an_image_whose_pod_has_not_come_goes_at_the_next_start() {
    let node = Node::new();
    let kept = node.put("kept:1", &image()[..CHUNK]);
    let brought = record("brought:1", &image());
    let (_, hold) = node.store.adopt_arriving(brought.clone()).unwrap();
    assert!(released(&node, &[]).is_empty(), "its pod is on its way");
    drop(hold);
    let node = node.reopen();
    assert_eq!(released(&node, &[]), [brought]);
    assert!(node.store.resolve("brought:1").is_err());
    let node = node.reopen();
    assert_eq!(node.store.list(), [kept]);
    assert_eq!(node.chunks(), 1);
}

#[test]
fn an_image_stays_that_has_come_or_that_anybody_else_has() {
    let hour = Duration::from_secs(3_600);
    let brought = record("brought:1", &image());
    type Case = fn(&Node, &ImageRecord);
    let cases: [(&str, Case); 3] = [
        ("its pod has come", |node, record| {
            node.store.arrived(record);
        }),
        ("a lease", |node, record| {
            let now = SystemTime::now();
            let hour = Duration::from_secs(3_600);
            node.store.lease(&record.name, now, hour).unwrap();
        }),
        ("a tag", |node, record| {
            node.store.add_name(record, "mine:1").unwrap();
        }),
    ];
    for (why, keeps) in cases {
        let node = Node::new();
        drop(node.store.adopt_arriving(brought.clone()).unwrap());
        keeps(&node, &brought);
        let node = node.reopen();
        assert!(released(&node, &[]).is_empty(), "{why}");
        assert!(node.store.record(&brought.erofs_digest).is_ok(), "{why}");
    }
    let node = Node::new();
    drop(node.store.adopt_arriving(brought.clone()).unwrap());
    let node = node.reopen();
    assert!(released(&node, &[brought.erofs_digest]).is_empty());
    // From then on it is an image like any other.
    let node = node.reopen();
    let later = SystemTime::now() + 2 * hour;
    assert!(node.store.release_arriving(&[], later).unwrap().is_empty());
    // So is one that was here before the pod.
    let node = Node::new();
    let here = node.put("brought:1", &image());
    drop(node.store.adopt_arriving(here).unwrap());
    let node = node.reopen();
    assert!(released(&node, &[]).is_empty());
}
