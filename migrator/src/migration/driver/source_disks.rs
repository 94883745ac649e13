//! The pod's writable disks at the source: the bulk, the rounds beside those of memory, and the last one in the freeze.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::task::JoinSet;
use vm_runtime::units::PAGE_SIZE;

use super::source::Run;
use super::steps::blocking;
use crate::api::error::chain;
use crate::block::Disk;
use crate::block::transfer::{Outgoing, Piece, Rounds, Sample, Turn};
use crate::memory::send::{PageSender, SendError};
use crate::migration::source::Input;
use crate::migration::status::DiskReport;
use crate::wire::bulk::Blocks;

/// Pieces of a connection that are read before the ones before them are written.
const AHEAD: usize = 4;

/// The disks of a pod that leaves, and what is known of their course. Without any, each call is nothing.
#[derive(Clone, Debug)]
pub struct Disks {
    outgoing: Outgoing,
    /// Those that do not move.
    shared: Arc<[Arc<Disk>]>,
    report: Arc<Mutex<DiskReport>>,
}

/// What one round has sent.
#[derive(Clone, Copy, Debug, Default)]
pub struct RoundOfDisks {
    round: u32,
    /// Bytes of disks, holes included.
    bytes: u64,
}

impl Disks {
    /// The disks of one migration.
    pub fn new(outgoing: Outgoing) -> Self {
        let report = DiskReport {
            disks: outgoing.count(),
            bytes_size: outgoing.size(),
            ..DiskReport::default()
        };
        Self {
            outgoing,
            shared: Arc::default(),
            report: Arc::new(Mutex::new(report)),
        }
    }

    /// The same, with disks on shared storage that this service serves: nothing of them is sent, but all that the guest wrote must be there
    /// before another node opens them.
    pub(super) fn with_shared(mut self, shared: Vec<Arc<Disk>>) -> Self {
        self.shared = shared.into();
        self
    }

    /// What QEMU would otherwise have to flush in the freeze.
    async fn flush_shared(&self) -> Result<(), String> {
        let shared = Arc::clone(&self.shared);
        if shared.is_empty() {
            return Ok(());
        }
        blocking(move || {
            let mut shared = shared.iter();
            shared.try_for_each(|disk| disk.flush().map_err(|error| chain(&error)))
        })
        .await
    }

    /// What is to be sent again, in pages.
    pub(super) fn pages_left(&self) -> u64 {
        self.outgoing.left().div_ceil(PAGE_SIZE as u64)
    }

    /// What is to be sent again, in bytes.
    pub fn bytes_left(&self) -> u64 {
        self.outgoing.left()
    }

    /// What the report says of them; nothing if there are none.
    pub fn report(&self) -> Option<DiskReport> {
        (!self.outgoing.is_empty()).then(|| *self.lock())
    }

    /// The destination has acknowledged a round.
    pub fn acknowledge(&self, round: u32) {
        self.outgoing.acknowledge(round);
    }

    /// The guest writes as fast as it likes.
    pub(super) fn let_go(&self) {
        self.outgoing.limit(None);
    }

    fn lock(&self) -> MutexGuard<'_, DiskReport> {
        // Numbers, each of which is right by itself.
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn turn(&self) -> Result<Turn, String> {
        let outgoing = self.outgoing.clone();
        blocking(move || outgoing.turn().map_err(|error| chain(&error))).await
    }

    /// Sends what is due, and a barrier on each connection.
    async fn send(&self, sender: &Arc<PageSender>, turn: Turn) -> Result<RoundOfDisks, String> {
        let (round, bytes, lanes) = (turn.round, turn.bytes(), sender.lanes());
        let mut tasks = JoinSet::new();
        for lane in 0..lanes {
            let pieces = turn.pieces.iter().skip(lane).step_by(lanes).copied();
            tasks.spawn(send_pieces(
                Arc::clone(sender),
                self.outgoing.clone(),
                lane,
                pieces.collect(),
                round,
            ));
        }
        let mut wire = 0;
        while let Some(sent) = tasks.join_next().await {
            wire += sent.map_err(|panicked| chain(&panicked))??;
        }
        let mut report = self.lock();
        report.rounds += 1;
        report.bytes += bytes;
        report.bytes_sent += wire;
        Ok(RoundOfDisks { round, bytes })
    }

    /// Notes from here on what is written.
    pub fn start(&self) {
        self.outgoing.start();
    }

    /// A round, until it is durable at the destination: the first is what is allocated, each other what was written since.
    ///
    /// # Errors
    /// In words: a disk cannot be read, or a connection is lost.
    pub async fn round(&self, sender: &Arc<PageSender>) -> Result<RoundOfDisks, String> {
        let turn = self.turn().await?;
        let sent = self.send(sender, turn).await?;
        // Meanwhile: what QEMU would otherwise have to flush in the freeze.
        let outgoing = self.outgoing.clone();
        let flushed = blocking(move || outgoing.flush().map_err(|error| chain(&error)));
        let (flushed, ()) = tokio::join!(flushed, self.outgoing.acknowledged(sent.round));
        flushed?;
        Ok(sent)
    }

    /// A round beside one of memory, if there are disks.
    pub(super) async fn beside(&self, sender: &Arc<PageSender>) -> Result<RoundOfDisks, String> {
        self.flush_shared().await?;
        match self.outgoing.is_empty() || self.outgoing.left() == 0 {
            true => Ok(RoundOfDisks::default()),
            false => self.round(sender).await,
        }
    }
}

impl RoundOfDisks {
    /// From 1.
    pub fn number(self) -> u32 {
        self.round
    }

    /// As pages of memory.
    pub(super) fn pages(self) -> u64 {
        self.bytes.div_ceil(PAGE_SIZE as u64)
    }

    /// Bytes of disks, holes included.
    pub fn bytes(self) -> u64 {
        self.bytes
    }
}

async fn send_pieces(
    sender: Arc<PageSender>,
    outgoing: Outgoing,
    lane: usize,
    pieces: Vec<Piece>,
    round: u32,
) -> Result<u64, String> {
    let told = |error: SendError| chain(&error);
    let mut under_way = VecDeque::new();
    let mut wire = 0;
    for piece in pieces {
        let outgoing = outgoing.clone();
        let frames = blocking(move || outgoing.read(piece).map_err(|error| chain(&error))).await?;
        if frames.is_empty() {
            continue;
        }
        under_way.push_back(sender.disk(lane, frames).await.map_err(told)?);
        if under_way.len() > AHEAD
            && let Some(first) = under_way.pop_front()
        {
            wire += first.bytes().await.map_err(told)?;
        }
    }
    let barrier = vec![Blocks::Barrier { round }];
    under_way.push_back(sender.disk(lane, barrier).await.map_err(told)?);
    for written in under_way {
        wire += written.bytes().await.map_err(told)?;
    }
    Ok(wire)
}

impl Run {
    /// The bulk, and rounds until little is left.
    pub(super) fn send_disks(&mut self) {
        let (disks, sender) = (self.disks.clone(), self.sender());
        let limit_us = self.content_limit_us;
        self.runner.step(async move {
            let sender = sender.ok_or("the link is gone")?;
            disks.start();
            let mut rounds = Rounds::default();
            loop {
                let began = Instant::now();
                let sent = disks.round(&sender).await?;
                let another = rounds.another(Sample {
                    bytes: sent.bytes,
                    duration_us: began.elapsed().as_micros() as u64,
                    left: disks.outgoing.left(),
                });
                if !another {
                    break;
                }
            }
            disks.outgoing.limit(Some(rounds.most_left(limit_us)));
            Ok(Input::DisksSent)
        });
    }

    /// What is left when nobody writes any more.
    pub(super) fn send_last_blocks(&mut self) {
        let (disks, sender) = (self.disks.clone(), self.sender());
        self.runner.step(async move {
            let sender = sender.ok_or("the link is gone")?;
            sender.lift_limit();
            let turn = disks.turn().await?;
            let RoundOfDisks { round, bytes } = disks.send(&sender, turn).await?;
            disks.lock().frozen_bytes = bytes;
            Ok(Input::LastBlocksSent { round, bytes })
        });
    }
}

#[cfg(test)]
mod tests;
