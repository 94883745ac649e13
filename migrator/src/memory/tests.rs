//! Sender to receiver, over streams in memory: whatever the guest holds and writes, both memories end equal.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;

use proptest::prelude::*;
use tokio::io::duplex;
use tokio::sync::mpsc;
use vm_runtime::memory::GuestMemory;
use vm_runtime::units::{Bytes, PAGE_SIZE, PageIndex, PageRange};

use super::compress::Compress;
use super::pageset::PageSet;
use super::receive::{self, Arrival, Target};
use super::send::{PageSender, Sent};
use crate::wire::conn::{Reader, Writer};

/// Pages of a test's guest: two boundaries of pieces lie within.
const PAGES: u64 = 600;

fn memory() -> Arc<GuestMemory> {
    let size = Bytes(PAGES * PAGE_SIZE as u64);
    Arc::new(GuestMemory::create("memory-test", size).unwrap())
}

/// What a page can be.
#[derive(Clone, Copy, Debug)]
enum Content {
    Hole,
    Zeros,
    /// One byte, over and over.
    Even(u8),
    /// Bytes that no codec makes smaller.
    Noise(u64),
    /// All zeros but for one byte.
    Sparse(u16),
}

fn content() -> impl Strategy<Value = Content> {
    prop_oneof![
        Just(Content::Hole),
        Just(Content::Zeros),
        (1u8..).prop_map(Content::Even),
        any::<u64>().prop_map(Content::Noise),
        (0u16..PAGE_SIZE as u16).prop_map(Content::Sparse),
    ]
}

fn put(memory: &GuestMemory, page: u64, content: Content) {
    let mut bytes = [0; PAGE_SIZE];
    match content {
        Content::Hole => {
            memory.punch(PageRange::new(page, page + 1)).unwrap();
            return;
        }
        Content::Zeros => {}
        Content::Even(byte) => bytes.fill(byte),
        Content::Noise(seed) => {
            // xorshift64
            let mut state = seed | 1;
            for word in bytes.chunks_exact_mut(8) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                word.copy_from_slice(&state.to_le_bytes());
            }
        }
        Content::Sparse(at) => bytes[usize::from(at)] = 1,
    }
    memory.write(PageIndex(page), &bytes).unwrap();
}

/// Two memories, and the connections between them.
struct Pair {
    source: Arc<GuestMemory>,
    destination: Arc<GuestMemory>,
    sender: PageSender,
    arrivals: mpsc::Receiver<Arrival>,
    lanes: usize,
}

impl Pair {
    fn new(source: Arc<GuestMemory>, lanes: usize, compress: Compress) -> Self {
        let destination = memory();
        let (mut writers, mut readers) = (Vec::new(), Vec::new());
        for _ in 0..lanes {
            // Smaller than a frame: reads and writes end anywhere.
            let (near, far) = duplex(100_003);
            writers.push(Writer::new(near));
            readers.push(Reader::new(far));
        }
        let (sender, arrivals) = mpsc::channel(64);
        let target = Arc::new(OnceLock::new());
        let memory = Arc::clone(&destination);
        assert!(
            target
                .set(Target {
                    memory,
                    hashes: None,
                    pager: OnceLock::new(),
                    disks: None,
                })
                .is_ok()
        );
        receive::start(readers, &target, &sender);
        Self {
            sender: PageSender::start(&source, writers, None::<NonZeroU64>, compress),
            source,
            destination,
            arrivals,
            lanes,
        }
    }

    /// Sends a round and waits until all of it has been placed.
    async fn round(&mut self, round: u32, ranges: &[PageRange]) -> Sent {
        let sent = self.sender.round(round, ranges, round == 1);
        let placed = async {
            let mut left: Vec<usize> = (0..self.lanes).collect();
            while !left.is_empty() {
                match self.arrivals.recv().await.unwrap() {
                    Arrival::Barrier { lane, round: of } => {
                        assert_eq!(of, round);
                        left.retain(|other| *other != lane);
                    }
                    other => panic!("{other:?}"),
                }
            }
        };
        let (sent, ()) = tokio::join!(sent, placed);
        sent.unwrap()
    }

    fn first_difference(&self) -> Option<u64> {
        let (mut ours, mut theirs) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
        (0..PAGES).find(|page| {
            self.source.read(PageIndex(*page), &mut ours).unwrap();
            self.destination
                .read(PageIndex(*page), &mut theirs)
                .unwrap();
            ours != theirs
        })
    }
}

/// Stands for the kernel's tracking: a page is marked once it is written, and a scan takes the marks.
struct Marks(Vec<AtomicU64>);

impl Marks {
    fn new() -> Self {
        Self((0..PAGES.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn mark(&self, page: u64) {
        self.0[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::SeqCst);
    }

    fn scan(&self) -> Vec<PageRange> {
        let mut found = PageSet::new(PAGES);
        for (word, marks) in self.0.iter().enumerate() {
            let bits = marks.swap(0, Ordering::SeqCst);
            for bit in (0..64).filter(|bit| bits >> bit & 1 == 1) {
                let page = word as u64 * 64 + bit;
                found.insert(PageRange::new(page, page + 1));
            }
        }
        found.take()
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_time()
        .build()
        .unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn memories_are_equal_after_rounds_beside_writers(
        before in prop::collection::vec((0..PAGES, content()), 0..500),
        writes in prop::collection::vec(prop::collection::vec((0..PAGES, content()), 1..300), 1..3),
        lanes in 1usize..6,
        compress in prop::sample::select(&[Compress::None, Compress::Lz4, Compress::Zstd, Compress::Auto][..]),
    ) {
        let source = memory();
        for (page, content) in before {
            put(&source, page, content);
        }
        let marks = Arc::new(Marks::new());
        let go = Arc::new(AtomicBool::new(false));
        let writers: Vec<_> = writes
            .into_iter()
            .map(|writes| {
                let (source, marks, go) = (Arc::clone(&source), Arc::clone(&marks), Arc::clone(&go));
                thread::spawn(move || {
                    while !go.load(Ordering::SeqCst) {
                        thread::yield_now();
                    }
                    for (page, content) in writes {
                        put(&source, page, content);
                        marks.mark(page);
                    }
                })
            })
            .collect();
        let differs = runtime().block_on(async {
            let mut pair = Pair::new(Arc::clone(&source), lanes, compress);
            // As the driver does: what holds data first, then what was written meanwhile, until nothing is.
            let mut pending = source.data_ranges().unwrap();
            go.store(true, Ordering::SeqCst);
            let mut round = 1;
            loop {
                pair.round(round, &pending).await;
                let quiet = writers.iter().all(thread::JoinHandle::is_finished);
                pending = marks.scan();
                if quiet && pending.is_empty() {
                    break;
                }
                round += 1;
            }
            pair.first_difference()
        });
        prop_assert_eq!(differs, None);
    }
}

#[tokio::test]
async fn pages_that_became_zero_or_holes_arrive_as_zeros() {
    let source = memory();
    for page in 0..8 {
        put(&source, page, Content::Noise(page));
    }
    put(&source, 8, Content::Zeros);
    let mut pair = Pair::new(Arc::clone(&source), 2, Compress::Lz4);
    // Between what a first pass is told to send and its reading, one page becomes a hole and one is zeroed.
    let first = source.data_ranges().unwrap();
    assert_eq!(first, [PageRange::new(0, 9)]);
    put(&source, 6, Content::Hole);
    put(&source, 7, Content::Zeros);
    let sent = pair.round(1, &first).await;
    assert_eq!((sent.pages, sent.zero_pages), (6, 0));
    let data = [PageRange::new(0, 6)];
    assert_eq!(pair.destination.data_ranges().unwrap(), data);
    assert_eq!(pair.first_difference(), None);

    // In later rounds the destination has something else there.
    put(&source, 1, Content::Hole);
    put(&source, 2, Content::Zeros);
    put(&source, 4, Content::Hole);
    put(&source, 5, Content::Even(1));
    let sent = pair.round(2, &[PageRange::new(1, 6)]).await;
    assert_eq!((sent.pages, sent.zero_pages), (5, 3));
    assert_eq!(pair.first_difference(), None);
    let data = [
        PageRange::new(0, 1),
        PageRange::new(3, 4),
        PageRange::new(5, 6),
    ];
    assert_eq!(pair.destination.data_ranges().unwrap(), data);
}

#[tokio::test]
async fn what_a_round_sends_is_counted() {
    let source = memory();
    put(&source, 10, Content::Noise(1));
    put(&source, 11, Content::Noise(2));
    put(&source, 300, Content::Noise(3));
    let mut pair = Pair::new(source, 1, Compress::None);
    let sent = pair.round(1, &[PageRange::new(0, PAGES)]).await;
    assert_eq!((sent.pages, sent.zero_pages), (3, 0));
    // Two frames of pages with 17 bytes before each, and a barrier of 9.
    assert_eq!(sent.bytes, 3 * PAGE_SIZE as u64 + 2 * 17 + 9);
    assert_eq!(pair.sender.bytes_sent(), sent.bytes);
    assert_eq!(pair.sender.bytes_raw(), 3 * PAGE_SIZE as u64);
    // Without leave to skip them, zeros are two frames of 21 bytes between.
    let sent = pair.round(2, &[PageRange::new(9, 13)]).await;
    assert_eq!((sent.pages, sent.zero_pages), (4, 2));
    assert_eq!(sent.bytes, 2 * PAGE_SIZE as u64 + 17 + 2 * 21 + 9);
}

#[tokio::test]
async fn pages_beyond_the_memory_end_the_connection() {
    let large = Bytes((PAGES + 1) * PAGE_SIZE as u64);
    let source = Arc::new(GuestMemory::create("memory-test", large).unwrap());
    put(&source, PAGES, Content::Even(1));
    let mut pair = Pair::new(source, 1, Compress::None);
    let beyond = [PageRange::new(PAGES, PAGES + 1)];
    let sent = pair.sender.round(1, &beyond, true);
    let (_, arrival) = tokio::join!(sent, pair.arrivals.recv());
    let ended = arrival.unwrap();
    assert!(
        matches!(
            ended,
            Arrival::Ended(receive::ReceiveError::OutOfRange { first: PAGES, .. })
        ),
        "{ended:?}"
    );
}

#[tokio::test]
async fn what_compression_saves_is_counted() {
    for (compress, ends) in [(Compress::Lz4, 1), (Compress::Zstd, 1), (Compress::None, 0)] {
        let source = memory();
        for page in 0..200 {
            put(&source, page, Content::Even(page as u8 | 1));
        }
        for page in 400..500 {
            put(&source, page, Content::Noise(page << 32));
        }
        let mut pair = Pair::new(source, 2, compress);
        let ranges = pair.source.data_ranges().unwrap();
        let sent = pair.round(1, &ranges).await;
        assert_eq!(pair.first_difference(), None);
        assert_eq!(pair.sender.bytes_sent(), sent.bytes);
        assert_eq!(pair.sender.bytes_raw(), 300 * PAGE_SIZE as u64);
        assert_eq!(pair.sender.compressed_with(), compress);
        let saved = 200 * PAGE_SIZE as u64 * ends;
        assert!(
            sent.saved <= saved && sent.saved >= saved * 9 / 10,
            "{sent:?}"
        );
        let all = 300 * PAGE_SIZE as u64;
        assert!(
            (all..all + 400).contains(&(sent.bytes + sent.saved)),
            "{sent:?}"
        );
    }
}
