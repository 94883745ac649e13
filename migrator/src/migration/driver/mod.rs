//! Runs the two machines: carries out what they ask for, and tells them what happened.
//!
//! ```text
//!   outgoing ──▶ source::Run ── Output ──▶ steps (tasks) ── Input ──▶ source::Run ── ...
//!   incoming ──▶ destination::Run, the same way
//!   recover  ──▶ either one, from the journal
//! ```
//!
//! A step is a task that ends by putting one input into the machine's queue. The order of things is the
//! machine's; here is only how each thing is done. What both sides do in the same way is in `runner`.

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::sync::Arc;

use crate::config::NodeName;
use crate::daemon::migrations::Ticket;
use crate::daemon::node::Node;
use crate::memory::compress::Compress;
use crate::migration::journal::{Journal, Recovery};
use crate::migration::mode::{ImagesMode, Mode, OnStall};
use crate::network::OnOverflow;
use crate::pods::recover::OpenMigration;
use crate::pods::{PodHandle, PodResources};
use crate::wire::session::Session;

mod arrive;
mod checks;
mod clock;
mod depart;
mod departed;
mod destination;
mod destination_disks;
mod destination_pages;
mod destination_pod;
mod device_state;
mod early_pages;
mod flows;
mod handoff;
mod images;
mod link;
mod offer;
mod packets;
mod prepare;
mod report;
mod runner;
mod shared_disks;
mod source;
mod source_disks;
mod source_link;
mod source_pages;
mod source_status;
mod source_steps;
mod source_throttle;
mod steps;

pub use arrive::Arrivals;
pub use destination_disks::Barriers;
pub use source_disks::{Disks, RoundOfDisks};

/// How a migration is to go, nothing left open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Compare every page by hash before the grant.
    pub verify: bool,
    /// Freeze only when the predicted downtime is at most this.
    pub max_downtime_ms: u32,
    /// When the memory crosses.
    pub mode: Mode,
    /// What is done when pre-copy does not get on.
    pub on_stall: OnStall,
    /// Data connections.
    pub connections: u8,
    /// Bytes a second that memory may take on the wire while the guest runs; none: as fast as it goes.
    pub bandwidth: Option<NonZeroU64>,
    /// What pages are compressed with.
    pub compress: Compress,
    /// What is done when more packets come than may be kept.
    pub on_overflow: OnOverflow,
    /// When the images cross.
    pub images: ImagesMode,
}

/// A migration away from here, to be driven. The pod is marked as migrating.
#[derive(Debug)]
pub struct Outgoing {
    /// What watchers see, and the wish to cancel.
    pub ticket: Ticket,
    /// The pod.
    pub pod: PodHandle,
    /// What it is made of.
    pub resources: Arc<PodResources>,
    /// The destination.
    pub to: NodeName,
    /// Where it listens.
    pub addr: SocketAddr,
    /// How.
    pub options: Options,
}

/// Drives a migration away from here to its end: ends with `pod.end_migration` and `ticket.finish`.
pub async fn outgoing(node: Arc<Node>, job: Outgoing) {
    depart::outgoing(node, job).await;
}

/// Serves a session that another node dialed.
pub async fn incoming(node: Arc<Node>, session: Session) {
    arrive::incoming(node, session).await;
}

/// Begins to page for guests that lack pages, before anything else is done with them.
pub async fn page_early(node: &Arc<Node>, journal: &Recovery) {
    early_pages::page_early(node, journal).await;
}

/// Ends a migration that an earlier service left open.
pub async fn recover(node: Arc<Node>, migration: OpenMigration) {
    match migration {
        OpenMigration::Source {
            record,
            handed_over,
            pod,
        } => depart::recover(node, record, handed_over, pod).await,
        OpenMigration::Departed { record } => departed::tell(node, record).await,
        OpenMigration::Destination { record, pod } => arrive::recover(node, record, pod).await,
        OpenMigration::Lacking { record, pod } => {
            let pod = pod.find(&node).await;
            arrive::recover(node, record, pod).await;
        }
        OpenMigration::Discarded { record } => {
            tracing::info!(migration = %record.migration, pod = record.pod, "discarded: no grant had come");
            // From here on the journal answers for it, and may forget it.
            let asked = move |journal: &Journal| journal.answer(record.migration, &record.from);
            if let Err(reason) = steps::blocking_journal(&node, asked).await {
                tracing::error!(reason, "the journal stays behind");
            }
        }
    }
}
