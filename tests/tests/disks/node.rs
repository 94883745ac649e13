//! Nodes, as far as a disk sees them, and what lies between two of them.

use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use migrator::block::nbd::Server;
use migrator::block::transfer::{Incoming, Outgoing};
use migrator::block::{Disk, DiskError};
use migrator::memory::compress::Compress;
use migrator::memory::receive::{self, Arrival, BlockSink, Target};
use migrator::memory::send::PageSender;
use migrator::migration::driver::{Barriers, Disks, RoundOfDisks};
use migrator::wire::conn::{Reader, Writer};
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio::time::timeout;
use vm_runtime::memory::GuestMemory;
use vm_runtime::units::Bytes;
use xtask::cmd;

use super::writer::{RECORD, Records};

/// Size of the disk.
const SIZE: u64 = 64 << 20;
/// Size of the file in it that is written to.
const DATA: u64 = 4 << 20;
/// What a round may take on a busy machine.
const ROUND_WITHIN: Duration = Duration::from_secs(60);

/// A node with the disk.
pub struct Node {
    dir: PathBuf,
    disk: Arc<Disk>,
    server: Option<Server>,
}

/// A disk with a file system that has a file, served.
pub fn filled(dir: &Path) -> Result<Node> {
    let node = Node::empty(dir)?;
    let root = dir.join("root");
    std::fs::create_dir_all(&root)?;
    // No zeros: mke2fs would leave them out, and the file's blocks with them.
    std::fs::write(root.join("data"), vec![0xff; DATA as usize])?;
    let mut make = Command::new("mke2fs");
    make.args(["-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=0", "-d"]);
    cmd::output(make.arg(&root).arg(node.disk.path()))?;
    std::fs::remove_dir_all(&root)?;
    node.serve()
}

impl Node {
    /// A disk that is one hole.
    pub fn empty(dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let disk = Arc::new(Disk::create(&dir.join("disk"), SIZE)?);
        Ok(Self {
            dir: dir.to_owned(),
            disk,
            server: None,
        })
    }

    /// Serves it.
    pub fn serve(mut self) -> Result<Self> {
        self.server = Some(Server::start(Arc::clone(&self.disk), &self.socket())?);
        Ok(self)
    }

    /// As a service that was killed, and the one after it.
    pub fn restart(mut self) -> Result<Self> {
        self.server = None;
        self.disk = Arc::new(Disk::open(self.disk.path())?);
        self.serve()
    }

    /// The source lets go of it.
    pub fn remove(mut self) -> Result<()> {
        self.disk.close();
        self.server = None;
        Ok(std::fs::remove_dir_all(&self.dir)?)
    }

    /// Where it is served.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("nbd")
    }

    /// Where the file's records are on the disk, none of them written yet.
    pub fn records(&self) -> Result<Records> {
        let text = self.debugfs("blocks /data")?;
        let blocks: Vec<u64> = text
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()
            .with_context(|| format!("debugfs says {text}"))?;
        let size = DATA / blocks.len() as u64;
        ensure!(size <= RECORD, "blocks of {size} bytes");
        // Of each record the first block; the others follow it, or it is none.
        let in_a_row = |run: &&[u64]| run.windows(2).all(|pair| pair[0] + 1 == pair[1]);
        let runs = blocks.chunks_exact((RECORD / size) as usize);
        let offsets: Vec<u64> = runs.filter(in_a_row).map(|run| run[0] * size).collect();
        ensure!(offsets.len() > 100, "only {} records", offsets.len());
        Ok(Records::new(offsets))
    }

    /// The file system is whole, and the disk has every record.
    pub fn holds(&self, records: &Records) -> Result<()> {
        let mut check = Command::new("e2fsck");
        cmd::output(check.args(["-f", "-n"]).arg(self.disk.path()))?;
        let dumped = self.dir.join("dumped");
        self.debugfs(&format!("dump /data {}", dumped.display()))?;
        let size = std::fs::metadata(&dumped)?.len();
        ensure!(size == DATA, "the file has {size} bytes");
        std::fs::remove_file(&dumped)?;
        records.compare(|offset, content| self.disk.read_at(content, offset))
    }

    fn debugfs(&self, request: &str) -> Result<String> {
        let mut debugfs = Command::new("debugfs");
        cmd::output(debugfs.args(["-R", request]).arg(self.disk.path()))
    }
}

/// A move of the disk, as the conductors of both nodes make it.
pub struct Crossing {
    runtime: Runtime,
    disks: Disks,
    sender: Arc<PageSender>,
    incoming: Arc<Incoming>,
    arrivals: mpsc::Receiver<Arrival>,
    barriers: Barriers,
}

impl Crossing {
    /// From here on what is written is noted.
    pub fn begin(here: &Node, there: &Node, lanes: usize) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let inside = runtime.enter();
        let (mut writers, mut readers) = (Vec::new(), Vec::new());
        for _ in 0..lanes {
            let (near, far) = UnixStream::pair()?;
            writers.push(Writer::new(near));
            readers.push(Reader::new(far));
        }
        let ram = || GuestMemory::create("disk-test", Bytes::mib(1)).map(Arc::new);
        let incoming = Arc::new(Incoming::new(vec![Arc::clone(&there.disk)]));
        let sink = Arc::clone(&incoming) as Arc<dyn BlockSink>;
        let target = Arc::new(OnceLock::from(Target::new(ram()?, None, Some(sink))));
        let (arrived, arrivals) = mpsc::channel(64);
        receive::start(readers, &target, &arrived);
        let limit = None::<NonZeroU64>;
        let sender = Arc::new(PageSender::start(&ram()?, writers, limit, Compress::Lz4));
        drop(inside);
        let disks = Disks::new(Outgoing::new(vec![Arc::clone(&here.disk)]));
        disks.start();
        Ok(Self {
            runtime,
            disks,
            sender,
            incoming,
            arrivals,
            barriers: Barriers::new(lanes),
        })
    }

    /// A round, until it is durable.
    pub fn round(&mut self) -> Result<RoundOfDisks> {
        let Self {
            runtime,
            disks,
            sender,
            incoming,
            arrivals,
            barriers,
        } = self;
        let placed = async {
            while let Some(arrival) = arrivals.recv().await {
                let Arrival::DiskBarrier { lane, round } = arrival else {
                    bail!("{arrival:?}");
                };
                if let Some(round) = barriers.reached(lane, round) {
                    incoming.sync()?;
                    disks.acknowledge(round);
                    return Ok(());
                }
            }
            bail!("the connections have ended")
        };
        let sent = async { disks.round(sender).await.map_err(anyhow::Error::msg) };
        runtime.block_on(async {
            let both = timeout(ROUND_WITHIN, async { tokio::try_join!(sent, placed) });
            Ok(both.await.context("a round does not end")??.0)
        })
    }

    /// Every byte is the same.
    pub fn is_equal(&self, here: &Node, there: &Node) -> Result<()> {
        let read = |node: &Node| -> Result<Vec<u8>, DiskError> {
            let mut content = vec![0; SIZE as usize];
            node.disk.read_at(&mut content, 0)?;
            Ok(content)
        };
        let (ours, theirs) = (read(here)?, read(there)?);
        let differs = ours.iter().zip(&theirs).position(|(a, b)| a != b);
        ensure!(differs.is_none(), "they differ at {differs:?}");
        Ok(())
    }
}
