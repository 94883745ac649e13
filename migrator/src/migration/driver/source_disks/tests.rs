//! From disk to disk, over streams in memory: whatever the guest has and writes, both files end equal.

use std::num::NonZeroU64;
use std::path::Path;
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use proptest::prelude::*;
use tokio::io::duplex;
use tokio::sync::mpsc;
use vm_runtime::memory::GuestMemory;
use vm_runtime::units::Bytes;

use super::*;
use crate::block::transfer::Incoming;
use crate::block::{Disk, GRANULE};
use crate::memory::compress::Compress;
use crate::memory::receive::{self, Arrival, BlockSink, ReceiveError, Target};
use crate::migration::driver::destination_disks::Barriers;
use crate::wire::bulk::{BLOCK, Place};
use crate::wire::conn::{Reader, Writer};

const SIZE: u64 = 4 << 20;

/// Two nodes with a disk each, and what lies between them.
struct Pair {
    source: Arc<Disk>,
    destination: Arc<Disk>,
    incoming: Arc<Incoming>,
    disks: Disks,
    sender: Arc<PageSender>,
    arrivals: mpsc::Receiver<Arrival>,
    barriers: Barriers,
    _dir: tempfile::TempDir,
}

fn disk(dir: &Path, name: &str) -> Arc<Disk> {
    Arc::new(Disk::create(&dir.join(name), SIZE).unwrap())
}

impl Pair {
    fn new(lanes: usize, compress: Compress) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (source, destination) = (disk(dir.path(), "a"), disk(dir.path(), "b"));
        let (mut writers, mut readers) = (Vec::new(), Vec::new());
        for _ in 0..lanes {
            // Smaller than a frame: reads and writes end anywhere.
            let (near, far) = duplex(100_003);
            writers.push(Writer::new(near));
            readers.push(Reader::new(far));
        }
        let ram = || Arc::new(GuestMemory::create("disk-test", Bytes::mib(1)).unwrap());
        let incoming = Arc::new(Incoming::new(vec![Arc::clone(&destination)]));
        let sink = Arc::clone(&incoming) as Arc<dyn BlockSink>;
        let target = Arc::new(OnceLock::from(Target::new(ram(), None, Some(sink))));
        let (arrived, arrivals) = mpsc::channel(64);
        receive::start(readers, &target, &arrived);
        Self {
            disks: Disks::new(Outgoing::new(vec![Arc::clone(&source)])),
            source,
            destination,
            incoming,
            sender: Arc::new(PageSender::start(
                &ram(),
                writers,
                None::<NonZeroU64>,
                compress,
            )),
            arrivals,
            barriers: Barriers::new(lanes),
            _dir: dir,
        }
    }

    /// A round, as the two drivers make it.
    async fn round(&mut self) -> RoundOfDisks {
        let (disks, sender) = (self.disks.clone(), Arc::clone(&self.sender));
        let (sent, ()) = tokio::join!(
            async move { disks.round(&sender).await.unwrap() },
            self.placed()
        );
        sent
    }

    /// The destination's part of it.
    async fn placed(&mut self) {
        loop {
            match self.arrivals.recv().await.unwrap() {
                Arrival::DiskBarrier { lane, round } => {
                    if let Some(round) = self.barriers.reached(lane, round) {
                        self.incoming.sync().unwrap();
                        self.disks.acknowledge(round);
                        return;
                    }
                }
                other => panic!("{other:?}"),
            }
        }
    }

    fn assert_equal(&self) {
        let read = |disk: &Disk| {
            let mut content = vec![0; SIZE as usize];
            disk.read_at(&mut content, 0).unwrap();
            content
        };
        let (ours, theirs) = (read(&self.source), read(&self.destination));
        let differs = ours.iter().zip(&theirs).position(|(a, b)| a != b);
        assert_eq!(differs, None, "the first byte that differs");
    }
}

/// What a guest does to its disk.
#[derive(Clone, Copy, Debug)]
enum Change {
    Write {
        block: u64,
        blocks: u64,
        noise: bool,
    },
    Zero {
        block: u64,
        blocks: u64,
    },
    Discard {
        block: u64,
        blocks: u64,
    },
}

fn change() -> impl Strategy<Value = Change> {
    let range = || (0..SIZE / BLOCK - 20, 1u64..20);
    prop_oneof![
        4 => (range(), any::<bool>()).prop_map(|((block, blocks), noise)| Change::Write { block, blocks, noise }),
        1 => range().prop_map(|(block, blocks)| Change::Zero { block, blocks }),
        1 => range().prop_map(|(block, blocks)| Change::Discard { block, blocks }),
    ]
}

fn make(disk: &Disk, change: Change) {
    match change {
        Change::Write {
            block,
            blocks,
            noise,
        } => {
            let mut state = block + 1;
            let content: Vec<u8> = (0..blocks * BLOCK)
                .map(|_| {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    if noise { (state >> 56) as u8 } else { 7 }
                })
                .collect();
            disk.write_at(&content, block * BLOCK).unwrap();
        }
        Change::Zero { block, blocks } => {
            disk.zero(block * BLOCK, blocks * BLOCK, true).unwrap();
        }
        Change::Discard { block, blocks } => disk.discard(block * BLOCK, blocks * BLOCK).unwrap(),
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
    fn disks_are_equal_after_rounds_beside_a_writer(
        before in prop::collection::vec(change(), 0..20),
        during in prop::collection::vec(change(), 0..60),
        lanes in 1usize..4,
        compress in prop::sample::select(&[Compress::None, Compress::Lz4, Compress::Zstd][..]),
    ) {
        runtime().block_on(async move {
            let mut pair = Pair::new(lanes, compress);
            before.into_iter().for_each(|change| make(&pair.source, change));
            pair.disks.outgoing.start();
            let source = Arc::clone(&pair.source);
            let writer = thread::spawn(move || during.into_iter().for_each(|change| make(&source, change)));
            pair.round().await;
            while !writer.is_finished() {
                pair.round().await;
            }
            writer.join().unwrap();
            // The guest stands still.
            pair.round().await;
            pair.assert_equal();
            let report = pair.disks.report().unwrap();
            assert!(report.rounds >= 2 && report.bytes_sent > 0);
        });
    }
}

#[test]
fn holes_do_not_cross_and_stay_holes() {
    runtime().block_on(async {
        let mut pair = Pair::new(2, Compress::None);
        pair.source
            .write_at(&[1; BLOCK as usize], 3 * GRANULE)
            .unwrap();
        // Allocated, and all zeros.
        pair.source.write_at(&vec![0; 1 << 20], 1 << 20).unwrap();
        pair.disks.outgoing.start();
        let sent = pair.round().await;
        assert!(sent.bytes() < SIZE / 2, "{sent:?}");
        let wire = pair.disks.report().unwrap().bytes_sent;
        assert!(
            (BLOCK..2 * BLOCK).contains(&wire),
            "{wire} bytes on the wire"
        );
        assert!(pair.destination.allocated_bytes().unwrap() < GRANULE);
        pair.assert_equal();

        // What is discarded later is given back there, too.
        pair.source.discard(0, SIZE).unwrap();
        pair.round().await;
        assert_eq!(pair.destination.allocated().unwrap(), []);
        pair.assert_equal();
    });
}

#[test]
fn a_quiet_disk_has_no_second_round_and_one_that_is_written_to_only_what_was_written() {
    runtime().block_on(async {
        let mut pair = Pair::new(1, Compress::None);
        make(
            &pair.source,
            Change::Write {
                block: 0,
                blocks: 64,
                noise: true,
            },
        );
        pair.disks.outgoing.start();
        pair.round().await;
        let beside = pair.disks.beside(&pair.sender).await.unwrap();
        assert_eq!(beside.bytes(), 0);
        pair.source.write_at(&[1], 100).unwrap();
        assert_eq!(pair.disks.bytes_left(), GRANULE);
        assert_eq!(pair.round().await.bytes(), GRANULE);
    });
}

#[test]
fn writes_beyond_the_limit_wait_for_the_next_round() {
    runtime().block_on(async {
        let mut pair = Pair::new(1, Compress::None);
        pair.disks.outgoing.start();
        pair.round().await;
        pair.disks.outgoing.limit(Some(2 * GRANULE));
        let source = Arc::clone(&pair.source);
        let (told, mut written) = mpsc::unbounded_channel();
        let writer = thread::spawn(move || {
            for granule in 0..8 {
                source.write_at(&[9; 512], granule * GRANULE).unwrap();
                told.send(granule).unwrap();
            }
        });
        for granule in 0..3 {
            assert_eq!(written.recv().await, Some(granule));
        }
        assert_eq!(pair.disks.bytes_left(), 3 * GRANULE);
        // It stands, whatever the time: it has to be let on.
        let waits = tokio::time::timeout(Duration::from_millis(50), written.recv()).await;
        assert!(waits.is_err(), "{waits:?}");
        pair.round().await;
        assert_eq!(written.recv().await, Some(3));
        // Nothing holds a guest up that is about to stop.
        pair.disks.let_go();
        while written.recv().await.is_some() {}
        writer.join().unwrap();
        pair.round().await;
        pair.assert_equal();
    });
}

#[test]
fn nothing_is_placed_beyond_a_disk_or_after_the_last_round() {
    let dir = tempfile::tempdir().unwrap();
    let destination = disk(dir.path(), "b");
    let incoming = Incoming::new(vec![destination]);
    let raw = bytes::Bytes::from(vec![1; BLOCK as usize]);
    let at = |disk, offset| Place { disk, offset };
    let place = |at: Place| {
        let raw = raw.clone();
        Incoming::place(&incoming, &Blocks::Raw { at, raw })
    };
    place(at(0, SIZE - BLOCK)).unwrap();
    for (bad, says) in [(at(0, SIZE), "beyond"), (at(1, 0), "disk 1")] {
        let error = chain(&place(bad).unwrap_err());
        assert!(error.contains(says), "{error}");
    }
    let at = at(0, 0);
    let beyond = Blocks::Hole {
        at,
        len: SIZE + BLOCK,
    };
    assert!(Incoming::place(&incoming, &beyond).is_err());
    incoming.seal();
    let error = chain(&place(at).unwrap_err());
    assert!(error.contains("after the last"), "{error}");
}

#[test]
fn blocks_for_a_pod_without_disks_end_the_connection() {
    runtime().block_on(async {
        let (near, far) = duplex(1 << 20);
        let ram = Arc::new(GuestMemory::create("disk-test", Bytes::mib(1)).unwrap());
        let target = Arc::new(OnceLock::from(Target::new(Arc::clone(&ram), None, None)));
        let (arrived, mut arrivals) = mpsc::channel(4);
        receive::start(vec![Reader::new(far)], &target, &arrived);
        let sender = PageSender::start(&ram, vec![Writer::new(near)], None, Compress::None);
        let at = Place { disk: 0, offset: 0 };
        let hole = vec![Blocks::Hole { at, len: BLOCK }];
        let written = sender.disk(0, hole).await.unwrap();
        written.bytes().await.unwrap();
        let arrival = arrivals.recv().await.unwrap();
        assert!(
            matches!(arrival, Arrival::Ended(ReceiveError::NoDisk)),
            "{arrival:?}"
        );
    });
}
