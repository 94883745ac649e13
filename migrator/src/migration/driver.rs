//! Stub.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::config::NodeName;
use crate::daemon::migrations::Ticket;
use crate::daemon::node::Node;
use crate::migration::status::{MemoryReport, MigrationReport, Outcome, PacketReport};
use crate::pods::recover::OpenMigration;
use crate::pods::{MigrationEnd, PodHandle, PodResources};
use crate::wire::session::Session;

/// How a migration is to go, nothing left open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Compare every page by hash before the grant.
    pub verify: bool,
    /// Freeze only when the predicted downtime is at most this.
    pub max_downtime_ms: u32,
    /// Data connections.
    pub connections: u8,
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
    let Outgoing {
        ticket, pod, to, ..
    } = job;
    let epoch = pod.view().epoch;
    let report = MigrationReport {
        id: ticket.id.to_string(),
        pod: pod.name().to_owned(),
        from: node.name().to_owned(),
        to: to.to_string(),
        mode: "precopy".to_owned(),
        outcome: Outcome::Failed("migration is not built yet".to_owned()),
        total_ms: 0.0,
        downtime_ms: 0.0,
        frozen_at_unix_us: 0,
        memory: MemoryReport::default(),
        packets: PacketReport::default(),
        phases: Vec::new(),
    };
    if let Err(error) = pod.end_migration(MigrationEnd::Kept { epoch }).await {
        tracing::error!(%error, "cannot end the migration");
    }
    ticket.finish(report).await;
}

/// Serves a session that another node dialed.
pub async fn incoming(_node: Arc<Node>, session: Session) {
    tracing::warn!(peer = session.peer, "dropping a session");
}

/// Ends a migration that an earlier service left open.
pub async fn recover(_node: Arc<Node>, migration: OpenMigration) {
    tracing::warn!(?migration, "left open");
}
