//! Two or three nodes' stores, real sessions on the loopback between them.

mod sources;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Counted, Lacking, PeerSource, Supply, Wanted, serve};
use crate::block::{DiskError, ReadOnly};
use crate::image::record::{CHUNK_SIZE, ImageConfig};
use crate::image::{Digest, ImageExport, ImageRecord, ImageStore};
use crate::wire::bulk::Data;
use crate::wire::control;
use crate::wire::link_tests::Authority;
use crate::wire::message::Control;
use crate::wire::session::{Limits, Listener, Session};

const CHUNK: usize = CHUNK_SIZE as usize;
const LIMIT: Duration = Duration::from_secs(20);

/// Eight chunks, the last one short.
fn image() -> Vec<u8> {
    (0..7 * CHUNK + 4096)
        .map(|at| (at / 7 % 251) as u8 ^ (at / CHUNK) as u8)
        .collect()
}

fn record() -> ImageRecord {
    let bytes = image();
    let chunks: Vec<Digest> = bytes.chunks(CHUNK).map(Digest::of).collect();
    let size = bytes.len() as u64;
    ImageRecord {
        name: "app:1".to_owned(),
        manifest_digest: Digest::of(b"manifest"),
        config: ImageConfig::default(),
        erofs_size: size,
        chunk_size: CHUNK_SIZE,
        erofs_digest: ImageRecord::digest_of(size, CHUNK_SIZE, &chunks),
        chunks,
    }
}

struct Node {
    folder: tempfile::TempDir,
    images: Arc<ImageStore>,
}

impl Node {
    /// A node that has these chunks of the image.
    fn with(indices: impl IntoIterator<Item = usize>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let images = Arc::new(ImageStore::open(&folder.path().join("images")).unwrap());
        images.adopt(record()).unwrap();
        let node = Self { folder, images };
        node.bring(indices);
        node
    }

    fn bring(&self, indices: impl IntoIterator<Item = usize>) {
        let bytes = image();
        let chunks: Vec<&[u8]> = bytes.chunks(CHUNK).collect();
        for index in indices {
            let chunk = Bytes::copy_from_slice(chunks[index]);
            self.images.chunks().supply(&record(), index as u32, &chunk);
        }
    }

    fn export(&self) -> Arc<ImageExport> {
        let digest = record().erofs_digest;
        Arc::new(self.images.export(&digest, PathBuf::from("i0")).unwrap())
    }

    /// Serves its chunks to node `a`.
    async fn listen(&self, ca: &Authority, name: &str) -> (SocketAddr, JoinHandle<()>) {
        let chunks = Arc::clone(self.images.chunks());
        listen(ca, name, move |session| {
            tokio::spawn(serve(
                Arc::clone(&chunks),
                session,
                CancellationToken::new(),
            ));
        })
        .await
    }

    fn supply(&self) -> Supply {
        self.held_back().0
    }

    /// Nothing is filled as long as the second is there.
    fn held_back(&self) -> (Supply, Counted) {
        let images = Arc::clone(&self.images);
        let supply = Supply::new(images, CancellationToken::new(), TaskTracker::new());
        let arriving = supply.arriving();
        supply.start();
        (supply, arriving)
    }
}

async fn listen(
    ca: &Authority,
    name: &str,
    with: impl Fn(Session) + Send + Sync + 'static,
) -> (SocketAddr, JoinHandle<()>) {
    let any = "127.0.0.1:0".parse().unwrap();
    let peers = vec!["a".to_owned()];
    let listener = Listener::bind(any, ca.node(name), peers, Limits::default());
    let mut listener = listener.await.unwrap();
    let addr = listener.local_addr();
    let task = tokio::spawn(async move {
        loop {
            with(listener.accept().await);
        }
    });
    (addr, task)
}

fn peer(ca: &Authority, name: &str, addr: SocketAddr) -> Arc<PeerSource> {
    Arc::new(PeerSource::start(name, addr, ca.node("a")))
}

/// Reads from an image as a VMM's request does: on a thread that may wait.
fn read(
    export: &Arc<ImageExport>,
    offset: usize,
    len: usize,
) -> JoinHandle<Result<Vec<u8>, DiskError>> {
    let export = Arc::clone(export);
    tokio::task::spawn_blocking(move || {
        let mut data = vec![0; len];
        export.read_at(&mut data, offset as u64).map(|()| data)
    })
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let end = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < end, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn chunk(index: u32) -> Wanted {
    Wanted {
        record: Arc::new(record()),
        index,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_vm_reads_comes_from_a_peer_while_it_waits() {
    let ca = Authority::new();
    let (here, there) = (Node::with([]), Node::with(0..8));
    let (addr, _listening) = there.listen(&ca, "b").await;
    let (supply, _arriving) = here.held_back();
    supply.add(peer(&ca, "b", addr));
    let export = here.export();
    // Across two chunks, and the end.
    let from = 2 * CHUNK - 100;
    let data = read(&export, from, 4096).await.unwrap().unwrap();
    assert_eq!(data, image()[from..from + 4096]);
    let from = image().len() - 512;
    let data = read(&export, from, 512).await.unwrap().unwrap();
    assert_eq!(data, image()[from..]);
    assert!(matches!(
        read(&export, from, 513).await.unwrap(),
        Err(DiskError::Range { .. })
    ));
    let record = record();
    assert_eq!(
        here.images.order(&record.erofs_digest).unwrap().list(),
        [1, 2, 7]
    );
    // And the two behind those that were read one after the other.
    until("five of eight are here", || {
        here.images.chunks().missing(&record) == [0, 5, 6]
    })
    .await;
    assert_eq!(
        supply.fetched(&record.erofs_digest),
        4 * CHUNK as u64 + 4096
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rest_fills_from_whoever_has_it_and_a_restart_goes_on() {
    let ca = Authority::new();
    let (here, b, c) = (Node::with([]), Node::with(0..5), Node::with([1, 5, 6, 7]));
    let (b_addr, _b) = b.listen(&ca, "b").await;
    let (c_addr, _c) = c.listen(&ca, "c").await;
    let record = Arc::new(record());
    {
        let supply = here.supply();
        supply.add(peer(&ca, "b", b_addr));
        supply.fill(&record);
        until("what b has is here", || {
            here.images.chunks().missing(&record) == [5, 6, 7]
        })
        .await;
        until("it says what holds it up", || {
            let problem = supply.problem(&record.erofs_digest);
            problem.is_some_and(|problem| problem.contains("peer b: does not have it"))
        })
        .await;
        supply.inner.shutdown.cancel();
    }
    // The service is started again, with another peer.
    let Node { folder, images } = here;
    let end = Instant::now() + LIMIT;
    let mut images = images;
    let images = loop {
        match Arc::try_unwrap(images) {
            Ok(store) => {
                drop(store);
                break Arc::new(ImageStore::open(&folder.path().join("images")).unwrap());
            }
            Err(shared) => images = shared,
        }
        assert!(Instant::now() < end, "tasks of the service end");
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    let here = Node { folder, images };
    let supply = here.supply();
    supply.add(peer(&ca, "c", c_addr));
    until("all of it is here", || {
        here.images.chunks().missing(&record).is_empty()
    })
    .await;
    until("nothing is filled any more", || {
        supply.lock().fills.is_empty()
    })
    .await;
    assert!(here.images.verify(&record).is_whole());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_read_first_comes_first_and_only_a_part_before_the_guest() {
    let ca = Authority::new();
    let (here, there) = (Node::with([]), Node::with(0..8));
    let (addr, _listening) = there.listen(&ca, "b").await;
    let (supply, arriving) = here.held_back();
    supply.add(peer(&ca, "b", addr));
    let record = Arc::new(record());
    let order = here.images.order(&record.erofs_digest).unwrap();
    // One that the image does not have is left out.
    order.add(&[6, 2, 9, 6, 4], record.chunks.len());
    let lacking = supply.missing(&record).await.unwrap();
    assert_eq!(lacking, [6, 2, 4, 0, 1, 3, 5, 7]);
    supply.fill(&record);
    supply.head(&record, 2 * CHUNK as u64 + 5).await;
    assert_eq!(here.images.chunks().missing(&record), [0, 1, 3, 4, 5, 7]);
    // Nothing of what nobody reads has come before the guest runs.
    assert_eq!(supply.fetched(&record.erofs_digest), 2 * CHUNK as u64);
    drop(arriving);
    until("all of it is here", || {
        here.images.chunks().missing(&record).is_empty()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_a_lying_peer_is_kept_or_served_and_it_is_left_alone() {
    let ca = Authority::new();
    let (here, honest) = (Node::with([]), Node::with(0..8));
    let (honest_addr, _honest) = honest.listen(&ca, "c").await;
    let lies = |session: Session| {
        tokio::spawn(async move {
            let (_sender, mut receiver) = control::start(session.control);
            let data = session.data.into_iter().next().unwrap();
            let (_reader, mut writer) = data.split();
            while let Ok(Control::ChunksWanted(wanted)) = receiver.recv().await {
                for digest in wanted.digests {
                    let raw = Bytes::from(vec![7; CHUNK]);
                    writer.send(&Data::Chunk { digest, raw }).await.unwrap();
                }
            }
        });
    };
    let (liar_addr, _liar) = listen(&ca, "b", lies).await;
    let supply = here.supply();
    supply.add(peer(&ca, "b", liar_addr));
    let lacking = supply.fetch(&chunk(3)).await.unwrap_err();
    assert!(lacking.to_string().contains("peer b: gave"), "{lacking}");
    let record = record();
    assert_eq!(here.images.chunks().missing(&record).len(), 8);
    // It is not asked again: what it said is remembered.
    let before = Instant::now();
    let again = supply.fetch(&chunk(4)).await.unwrap_err();
    assert!(again.to_string().contains("peer b: gave"), "{again}");
    assert!(before.elapsed() < LIMIT);
    supply.add(peer(&ca, "c", honest_addr));
    let data = read(&here.export(), 0, image().len());
    assert_eq!(data.await.unwrap().unwrap(), image());
    assert!(here.images.verify(&record).is_whole());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_breaks_off_costs_nothing_but_time() {
    let ca = Authority::new();
    let (here, there) = (Node::with([]), Node::with(0..8));
    let (addr, _there) = there.listen(&ca, "c").await;
    // Takes one request, and is gone.
    let breaks = |session: Session| {
        tokio::spawn(async move {
            let (_sender, mut receiver) = control::start(session.control);
            let _ = receiver.recv().await;
        });
    };
    let (broken, _broken) = listen(&ca, "b", breaks).await;
    let supply = here.supply();
    supply.add(peer(&ca, "b", broken));
    supply.add(peer(&ca, "c", addr));
    let data = read(&here.export(), 0, image().len());
    assert_eq!(data.await.unwrap().unwrap(), image());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_of_what_nobody_has_waits_says_why_and_goes_on_when_somebody_has_it() {
    let ca = Authority::new();
    let (here, there) = (Node::with([]), Node::with([0]));
    let (addr, _listening) = there.listen(&ca, "b").await;
    let supply = here.supply();
    let export = here.export();
    let data = read(&export, CHUNK, 4096);
    let problem = |word: &'static str| {
        let images = Arc::clone(&here.images);
        move || {
            let waiting = images.chunks().waiting(&record());
            let problem = waiting.first().and_then(|waiting| waiting.problem.clone());
            problem.is_some_and(|problem| problem.contains(word))
        }
    };
    until("nobody is configured", problem("there is nobody to ask")).await;
    supply.add(peer(&ca, "b", addr));
    until("b was asked", problem("peer b: does not have it")).await;
    there.bring([1]);
    assert_eq!(data.await.unwrap().unwrap(), image()[CHUNK..CHUNK + 4096]);
    assert!(here.images.chunks().waiting(&record()).is_empty());

    // A VM that is gone waits no more.
    let data = read(&export, 2 * CHUNK, 4096);
    until("it waits", || {
        !here.images.chunks().waiting(&record()).is_empty()
    })
    .await;
    export.close();
    assert!(matches!(data.await.unwrap(), Err(DiskError::Closed)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_chunk_is_set_aside_and_fetched_again() {
    let ca = Authority::new();
    let (here, there) = (Node::with(0..8), Node::with(0..8));
    let (addr, _listening) = there.listen(&ca, "b").await;
    let record = record();
    // Not what is in memory: that was verified.
    let Node { folder, images } = here;
    drop(images);
    let images = Arc::new(ImageStore::open(&folder.path().join("images")).unwrap());
    let here = Node { folder, images };
    for (index, rot) in [(2, &b"rot"[..]), (3, b"")] {
        let hex = record.chunks[index].hex();
        let path = here.images.chunks().root().join(&hex[..2]).join(&hex);
        std::fs::write(path, rot).unwrap();
    }
    let supply = here.supply();
    supply.add(peer(&ca, "b", addr));
    let data = read(&here.export(), 0, 3 * CHUNK);
    assert_eq!(data.await.unwrap().unwrap(), image()[..3 * CHUNK]);
    let bad = here.images.chunks().root().join("bad");
    assert!(bad.join(record.chunks[2].hex()).exists());
    // A look at all of it finds the other one.
    let verified = here.images.verify(&record);
    assert_eq!((verified.bad(), verified.damaged), (vec![3], vec![3]));
    assert_eq!(supply.fetch(&chunk(3)).await, Ok::<_, Lacking>(()));
    assert!(here.images.verify(&record).is_whole());
}
