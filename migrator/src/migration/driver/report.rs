//! The figures of a migration, gathered at the source while it runs.

use std::sync::{Arc, OnceLock};

use crate::memory::postcopy::quantile;
use crate::migration::status::{
    ConntrackReport, DiskReport, FaultReport, ImageReport, MemoryReport, MigrationReport, Outcome,
    PacketReport,
};
use crate::network;
use crate::wire::message::{BoundTaken, FaultFigures, FlowsTaken, ImagesMoved, Ledger, Running};

/// The source's own books, with every reason; the wire has only their sums.
pub(super) type Books = Arc<OnceLock<network::Ledger>>;

/// What is known so far.
#[derive(Debug)]
pub(super) struct Figures {
    pub(super) id: String,
    pub(super) pod: String,
    pub(super) from: String,
    pub(super) to: String,
    pub(super) started: std::time::Instant,
    pub(super) frozen_at_unix_us: u64,
    pub(super) memory: MemoryReport,
    pub(super) disk: Option<DiskReport>,
    pub(super) images: Option<ImageReport>,
    pub(super) phases: Vec<(String, u64)>,
    pub(super) downtime_us: u64,
    /// Frames that this node sent through the tunnel.
    /// Pages crossed after the resume.
    pub(super) postcopy: bool,
    /// From the request to the end of the source's VM.
    pub(super) total: Option<std::time::Duration>,
    pub(super) books: Books,
    pub(super) conntrack: ConntrackReport,
}

impl Figures {
    /// Takes in the destination's word that the guest runs there.
    pub(super) fn running(&mut self, running: &Running) {
        self.phases.extend(running.steps.iter().cloned());
        self.downtime_us = running
            .resumed_at_unix_us
            .saturating_sub(self.frozen_at_unix_us);
    }

    /// Takes in the destination's word that its guest lacks nothing any more.
    pub(super) fn complete(&mut self, faults: &FaultFigures) {
        let of = |part| quantile(&faults.buckets, part);
        self.memory.faults = Some(FaultReport {
            missing: faults.missing,
            count: faults.count,
            p50_us: of(0.5),
            p99_us: of(0.99),
            p999_us: of(0.999),
            max_us: faults.max_us,
            histogram: faults.buckets.clone(),
            took_us: faults.took_us,
            mismatched: faults.mismatched,
        });
    }

    /// Takes in what of the images was at the destination.
    pub(super) fn images_moved(&mut self, moved: ImagesMoved) {
        let ImagesMoved {
            size,
            here,
            before_resume,
        } = moved;
        self.images = Some(ImageReport {
            bytes_size: size,
            bytes_here: here,
            bytes_before_resume: before_resume,
        });
    }

    /// Takes in what became of the flows at the destination.
    pub(super) fn flows_taken(&mut self, taken: FlowsTaken) {
        let FlowsTaken {
            moved,
            failed,
            untracked,
        } = taken;
        self.conntrack.moved = moved;
        self.conntrack.failed = failed;
        self.conntrack.untracked = untracked;
    }

    /// Takes in what became of the bound flows there. `late`: those that began while the pod moved, and how many of these this node does not serve.
    pub(super) fn bound_taken(&mut self, taken: BoundTaken, late: (u64, u64)) {
        let (begun, unserved) = late;
        self.conntrack.bound += begun;
        self.conntrack.bound_unserved += unserved + taken.unserved;
    }

    /// The final report; the two ledgers are the two nodes' own.
    pub(super) fn report(
        self,
        outcome: Outcome,
        source: Ledger,
        destination: Ledger,
    ) -> MigrationReport {
        let total = self.total.unwrap_or_else(|| self.started.elapsed());
        MigrationReport {
            id: self.id,
            pod: self.pod,
            from: self.from,
            to: self.to,
            mode: match self.postcopy {
                true => "postcopy".to_owned(),
                false => "precopy".to_owned(),
            },
            outcome,
            total_ms: total.as_secs_f64() * 1e3,
            downtime_ms: self.downtime_us as f64 / 1e3,
            frozen_at_unix_us: self.frozen_at_unix_us,
            memory: self.memory,
            disk: self.disk,
            images: self.images,
            packets: packets(source, destination, self.books.get()),
            conntrack: self.conntrack,
            phases: self.phases,
        }
    }
}

/// Adds the two nodes' books up. What the source forwarded is what the destination got from it, so it
/// is seen once, at the source.
fn packets(source: Ledger, destination: Ledger, books: Option<&network::Ledger>) -> PacketReport {
    let forwarded = source.forwarded;
    let reasons = books.map(|books| books.reasons).unwrap_or_default();
    let mut report = PacketReport {
        seen: (source.seen + destination.seen).saturating_sub(forwarded),
        delivered: source.delivered + destination.delivered,
        held: source.held + destination.held,
        forwarded,
        tunnelled: reasons.forwarded_tunnel,
        refused: source.refused + destination.refused,
        lost: source.lost + destination.lost,
        lost_overflow: reasons.lost_overflow,
        lost_park: reasons.lost_park,
        unaccounted: 0,
    };
    let booked = report.delivered + report.held + report.refused + report.lost;
    report.unaccounted = report.seen as i64 - booked as i64;
    if report.unaccounted != 0 {
        tracing::error!(
            ?source,
            ?destination,
            unaccounted = report.unaccounted,
            "the packet books do not balance"
        );
    }
    report
}
