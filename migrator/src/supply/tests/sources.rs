//! Sources that fail or wait on purpose: who is left alone for it, and what is asked for once.

use std::sync::atomic::{AtomicUsize, Ordering};

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::Semaphore;

use super::*;
use crate::supply::{ChunkSource, Lacking, SourceError};

type Answer = Result<Option<Bytes>, SourceError>;

/// Two repositories of one source: it has all that is asked of one of them, and the other is broken.
#[derive(Debug, Default)]
struct Halved;

impl ChunkSource for Halved {
    fn address<'a>(&'a self, wanted: &'a Wanted) -> BoxFuture<'a, String> {
        std::future::ready(format!("registry half/{}", wanted.index % 2)).boxed()
    }

    fn fetch<'a>(&'a self, wanted: &'a Wanted, _urgent: bool) -> BoxFuture<'a, Answer> {
        let answer = match wanted.index % 2 {
            0 => Ok(Some(bytes(wanted.index))),
            _ => Err(SourceError("it broke off".to_owned())),
        };
        std::future::ready(answer).boxed()
    }
}

fn bytes(index: u32) -> Bytes {
    Bytes::copy_from_slice(image().chunks(CHUNK).nth(index as usize).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_breaks_off_is_left_alone_and_the_same_sources_other_places_are_not() {
    let here = Node::with([]);
    let (supply, _arriving) = here.held_back();
    supply.add(Arc::new(Halved));
    let lacking = supply.fetch(&chunk(1)).await.unwrap_err();
    assert_eq!(lacking.to_string(), "registry half/1: it broke off");
    assert_eq!(supply.fetch(&chunk(2)).await, Ok(()));
    let state = supply.lock();
    let paused = |address| {
        state
            .standing
            .paused(address, std::time::Duration::from_millis(1))
    };
    assert_eq!(paused("registry half/1"), Some("it broke off"));
    assert_eq!(paused("registry half/0"), None);
}

/// Gives what it is asked for when it may, and counts.
#[derive(Debug)]
struct Held {
    may: Semaphore,
    asked: AtomicUsize,
    hurried: AtomicUsize,
}

impl Held {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            may: Semaphore::new(0),
            asked: AtomicUsize::new(0),
            hurried: AtomicUsize::new(0),
        })
    }
}

impl ChunkSource for Held {
    fn address<'a>(&'a self, _wanted: &'a Wanted) -> BoxFuture<'a, String> {
        std::future::ready("held".to_owned()).boxed()
    }

    fn fetch<'a>(&'a self, wanted: &'a Wanted, _urgent: bool) -> BoxFuture<'a, Answer> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        async move {
            let _may = self.may.acquire().await;
            Ok(Some(bytes(wanted.index)))
        }
        .boxed()
    }

    fn hurry(&self, _wanted: &Wanted) {
        self.hurried.fetch_add(1, Ordering::Relaxed);
    }
}

/// A chunk that the background has asked for, and that somebody waits for by now: the source, and both of them.
async fn wanted_by_both(
    here: &Node,
    supply: &Supply,
) -> (
    Arc<Held>,
    JoinHandle<Result<(), Lacking>>,
    JoinHandle<Result<Vec<u8>, DiskError>>,
) {
    let source = Held::new();
    supply.add(source.clone());
    let background = tokio::spawn({
        let supply = supply.clone();
        async move { supply.fetch(&chunk(3)).await }
    });
    until("it is asked for", || {
        source.asked.load(Ordering::Relaxed) == 1
    })
    .await;
    let data = read(&here.export(), 3 * CHUNK, 100);
    until("somebody waits", || {
        source.hurried.load(Ordering::Relaxed) == 1
    })
    .await;
    (source, background, data)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_under_way_in_the_background_is_hurried_and_not_fetched_twice() {
    let here = Node::with([]);
    let (supply, _arriving) = here.held_back();
    let (source, background, data) = wanted_by_both(&here, &supply).await;
    source.may.add_permits(1);
    assert_eq!(
        data.await.unwrap().unwrap(),
        image()[3 * CHUNK..3 * CHUNK + 100]
    );
    assert_eq!(background.await.unwrap(), Ok(()));
    assert_eq!(source.asked.load(Ordering::Relaxed), 1);
    assert_eq!(supply.fetched(&record().erofs_digest), CHUNK as u64);
    assert!(supply.lock().flights.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fetch_that_is_given_up_is_begun_anew_by_who_waits_for_it() {
    let here = Node::with([]);
    let (supply, _arriving) = here.held_back();
    let (source, background, data) = wanted_by_both(&here, &supply).await;
    background.abort();
    until("it is asked for anew", || {
        source.asked.load(Ordering::Relaxed) == 2
    })
    .await;
    source.may.add_permits(1);
    assert!(data.await.unwrap().is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn while_a_pod_starts_only_what_pods_read_before_is_filled() {
    let here = Node::with([]);
    let record = record();
    let order = here.images.order(&record.erofs_digest).unwrap();
    order.add(&[6, 2], record.chunks.len());
    let (supply, arriving) = here.held_back();
    let source = Held::new();
    source.may.add_permits(1);
    supply.add(source.clone());
    let starting = supply.starting();
    drop(arriving);
    until("what was read before is here", || {
        here.images.chunks().missing(&record) == [0, 1, 3, 4, 5, 7]
    })
    .await;
    assert_eq!(source.asked.load(Ordering::Relaxed), 2);
    drop(starting);
    until("all of it is here", || {
        here.images.chunks().missing(&record).is_empty()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_reads_on_finds_the_next_chunks_there() {
    let here = Node::with([]);
    let (supply, _arriving) = here.held_back();
    let source = Held::new();
    source.may.add_permits(1);
    supply.add(source.clone());
    let export = here.export();
    read(&export, 0, 100).await.unwrap().unwrap();
    read(&export, CHUNK, 100).await.unwrap().unwrap();
    // Nothing more is read.
    until("two more are here", || {
        here.images.chunks().missing(&record()) == [4, 5, 6, 7]
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_that_is_found_damaged_is_filled_also_if_nobody_waits_for_it() {
    let here = Node::with(0..8);
    // Not what is in memory: that was verified.
    let Node { folder, images } = here;
    drop(images);
    let images = Arc::new(ImageStore::open(&folder.path().join("images")).unwrap());
    let here = Node { folder, images };
    let record = record();
    let supply = here.supply();
    let source = Held::new();
    source.may.add_permits(1);
    supply.add(source.clone());
    let hex = record.chunks[5].hex();
    let path = here.images.chunks().root().join(&hex[..2]).join(&hex);
    std::fs::write(path, b"rot").unwrap();
    assert_eq!(here.images.verify(&record).damaged, [5]);
    until("it is here again", || {
        here.images.chunks().missing(&record).is_empty()
    })
    .await;
    until("nothing is filled any more", || {
        supply.lock().fills.is_empty()
    })
    .await;
    assert!(here.images.verify(&record).is_whole());
    assert_eq!(source.asked.load(Ordering::Relaxed), 1);
}
