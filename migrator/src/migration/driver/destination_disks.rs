//! The pod's writable disks at the destination: where their content goes, and when it is durable.

use std::error::Error;
use std::sync::{Arc, OnceLock};

use tokio::sync::mpsc::UnboundedSender;

use super::destination::Run;
use super::steps::blocking;
use crate::api::error::chain;
use crate::block::Disk;
use crate::block::transfer::Incoming;
use crate::memory::receive::BlockSink;
use crate::migration::destination::Input;
use crate::wire::bulk::Blocks;

impl BlockSink for Incoming {
    fn place(&self, blocks: &Blocks) -> Result<(), Box<dyn Error + Send + Sync>> {
        Ok(Self::place(self, blocks)?)
    }
}

/// Counts the barriers of rounds of disks.
#[derive(Debug)]
pub struct Barriers {
    reached: Vec<u32>,
    placed: u32,
}

impl Barriers {
    /// For so many data connections.
    pub fn new(lanes: usize) -> Self {
        Self {
            reached: vec![0; lanes],
            placed: 0,
        }
    }

    /// A connection has delivered one: the round that is complete by it, if there is one.
    pub fn reached(&mut self, lane: usize, round: u32) -> Option<u32> {
        *self.reached.get_mut(lane)? = round;
        let all = self.reached.iter().copied().min().unwrap_or(0);
        (all > self.placed).then(|| {
            self.placed = all;
            all
        })
    }
}

/// The disks, once they are made.
pub(super) type Filling = Arc<OnceLock<Arc<Incoming>>>;

/// Where content of these disks goes; nowhere if there are none.
pub(super) fn fill(made: Vec<Arc<Disk>>, disks: &Filling) -> Option<Arc<dyn BlockSink>> {
    if made.is_empty() {
        return None;
    }
    let incoming = disks.get_or_init(|| Arc::new(Incoming::new(made)));
    Some(Arc::clone(incoming) as Arc<dyn BlockSink>)
}

/// Makes a round durable, and tells the machine.
pub(super) fn make_durable(disks: &Filling, round: u32, inputs: &UnboundedSender<Input>) {
    let (disks, inputs) = (Arc::clone(disks), inputs.clone());
    // Not in the way of what comes meanwhile. Of a run that is over, nobody hears the end.
    tokio::spawn(async move {
        let synced = blocking(move || match disks.get() {
            Some(disks) => disks.sync().map_err(|error| chain(&error)),
            None => Err("a round of disks came for a pod without any".to_owned()),
        });
        let input = match synced.await {
            Ok(()) => Input::BlocksPlaced { round },
            Err(reason) => Input::Failed { reason },
        };
        drop(inputs.send(input));
    });
}

impl Run {
    /// The source is not heard of, and this node has the right.
    pub(super) fn fence_source(&self) {
        let disks = self.shared_disks.clone();
        if !disks.is_empty() {
            let tasks = &self.runner.node.tasks;
            tasks.spawn(super::shared_disks::fence_source(disks));
        }
    }

    /// The pod is this node's, and gone: what it had of shared storage is free again.
    pub(super) async fn give_back_disks(&mut self) {
        self.shared_disks = Vec::new();
        let Some(offer) = &self.offer else { return };
        let (vm, epoch) = (offer.vm.clone(), self.machine.epoch());
        let storage = Arc::clone(&self.runner.node.storage);
        let given = blocking(move || {
            storage.give_back_all(&vm, epoch);
            Ok(())
        });
        if let Err(reason) = given.await {
            tracing::error!(
                reason,
                "what the pod had of shared storage is not given back"
            );
        }
    }

    /// All of the disks is here: nothing more is placed.
    pub(super) fn seal_disks(&self) {
        if let Some(disks) = self.disks.get() {
            disks.seal();
        }
    }
}
