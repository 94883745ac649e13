//! The memory engine between two memories, without nodes: streams in memory carry the frames.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use migrator::memory::compress::Compress;
use migrator::memory::receive::{self, Arrival, Target};
use migrator::memory::send::{PageSender, Sent};
use migrator::memory::track::Tracking;
use migrator::wire::{Reader, Writer};
use tokio::io::duplex;
use tokio::sync::mpsc;
use tokio::time::timeout;
use vm_runtime::memory::GuestMemory;

/// For a round, on a busy machine.
const ROUND: Duration = Duration::from_secs(60);

/// What a migration has between two nodes.
pub struct Link {
    sender: PageSender,
    arrivals: mpsc::Receiver<Arrival>,
    pub destination: Arc<GuestMemory>,
    round: u32,
}

impl Link {
    pub fn new(source: &Arc<GuestMemory>, destination: GuestMemory) -> Result<Self> {
        let destination = Arc::new(destination);
        let (near, far) = duplex(1 << 20);
        let target = Arc::new(OnceLock::new());
        let set = target.set(Target::new(Arc::clone(&destination), None, None));
        ensure!(set.is_ok(), "it was empty");
        let (sender, arrivals) = mpsc::channel(8);
        receive::start(vec![Reader::new(far)], &target, &sender);
        let writers = vec![Writer::new(near)];
        Ok(Self {
            sender: PageSender::start(source, writers, None, Compress::Auto),
            arrivals,
            destination,
            round: 0,
        })
    }

    /// Sends everything pending, and waits until it is placed.
    pub async fn round(&mut self, tracking: &Tracking) -> Result<Sent> {
        self.round += 1;
        let pending = tracking.take();
        let sent = self.sender.round(self.round, &pending, self.round == 1);
        let (sent, placed) = tokio::join!(sent, timeout(ROUND, self.arrivals.recv()));
        match placed?.context("the receiver is there")? {
            Arrival::Barrier { round, .. } => ensure!(round == self.round, "round {round}"),
            other => bail!("{other:?}"),
        }
        Ok(sent?)
    }
}
