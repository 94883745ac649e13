//! Migrations away from here: how one begins, and how an open one goes on after a restart.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::timeout;

use super::offer::{offer, with_lists};
use super::report::Figures;
use super::runner::Side;
use super::source::Run;
use super::steps::owner_to_go_on;
use super::{Options, Outgoing};
use crate::api::error::chain;
use crate::daemon::migrations::Ticket;
use crate::daemon::node::Node;
use crate::memory::compress::Compress;
use crate::migration::journal::SourceRecord;
use crate::migration::mode::ImagesMode;
use crate::migration::rounds::Policy;
use crate::migration::source::{Input, Plan, Source};
use crate::migration::status;
use crate::network::{Port, Stage};
use crate::pods::{MigrationEnd, PodHandle, PodResources};
use crate::wire::message::{Ledger, Offer};
use crate::wire::preamble::{VERSION_DISKS, VERSION_FLOWS, VERSION_SHARED};
use crate::wire::session;

/// For TCP, TLS and the preambles of all connections.
pub(super) const DIAL_DEADLINE: Duration = Duration::from_secs(10);
/// The longest wait for the old way's packets (`SOURCE_LIMIT` in the dataplane), and some more.
const SETTLES_WITHIN: Duration = Duration::from_secs(5);
/// The longest that the old node forwards (`FORWARD_MOST` in its steps), and some more.
const RELEASED_WITHIN: Duration = Duration::from_secs(12);
/// What the rest of the downtime (stop, device state, grant, resume) is expected to take; measured, see
/// `phases` in the report.
const FIXED_US: u64 = 15_000;
/// The least that a limit leaves for memory: below it no guest that writes at all would ever freeze.
const LEAST_MEMORY_US: u64 = 1_000;

/// Drives a migration away from here to its end.
pub(super) async fn outgoing(node: Arc<Node>, job: Outgoing) {
    let Outgoing {
        ticket,
        pod,
        resources,
        to,
        addr,
        options,
    } = job;
    let figures = figures(&node, &ticket, &pod, to.as_str());
    let begun = async {
        let (mut offer, lists) = offer(&node, &pod, &resources, ticket.id, options).await?;
        settled(&node, pod.name(), &resources.port).await;
        let count = usize::from(options.connections);
        let session = session::dial(addr, &node.tls, to.as_str(), count, DIAL_DEADLINE)
            .await
            .map_err(|error| chain(&error))?;
        speaks_disks(&offer, session.version, to.as_str())?;
        speaks_shared(&offer, session.version, to.as_str())?;
        let later = options.images == ImagesMode::Demand;
        let lists = with_lists(&mut offer, lists, later, session.version, to.as_str())?;
        Ok::<_, String>((offer, lists, session))
    };
    let begun = tokio::select! {
        begun = begun => begun,
        () = ticket.cancel.cancelled() => Err("cancelled before it began".to_owned()),
        () = node.shutdown.cancelled() => Err("the service is ending".to_owned()),
    };
    let (offer, lists, session) = match begun {
        Ok(begun) => begun,
        Err(reason) => {
            let epoch = pod.view().epoch;
            end_pod(&pod, MigrationEnd::Kept { epoch }).await;
            let outcome = status::Outcome::Failed(reason);
            let (source, destination) = (Ledger::default(), Ledger::default());
            ticket
                .finish(figures.report(outcome, source, destination))
                .await;
            return;
        }
    };
    if let Err(error) = resources.port.reset_ledger().await {
        tracing::warn!(
            error = chain(&error),
            "the packet books begin with older entries"
        );
    }
    let mut plan = Plan::new(offer, to.to_string(), pod.view().epoch);
    plan.policy = policy(options);
    plan.mode = options.mode;
    plan.on_stall = options.on_stall;
    plan.flows = session.version >= VERSION_FLOWS;
    let mut run = Run::new(
        node,
        pod,
        Some(resources),
        ticket,
        figures,
        Source::new(plan),
        addr,
    );
    run.lists = lists;
    run.connections = options.connections;
    run.compress = options.compress;
    run.on_overflow = options.on_overflow;
    run.content_limit_us = policy(options).memory_limit_us;
    run.attach(session, options.bandwidth);
    run.input(Input::Begin).await;
    run.events().await;
}

/// Whether the other end can take the pod's writable disks: before anything is begun.
fn speaks_disks(offer: &Offer, version: u16, to: &str) -> Result<(), String> {
    match offer.disks.is_empty() || version >= VERSION_DISKS {
        true => Ok(()),
        false => Err(format!(
            "{} has writable disks, and {to} speaks version {version} of the protocol, which does not move them: upgrade migrator on {to}, or \
             choose another node",
            offer.pod.name
        )),
    }
}

/// Whether the other end knows that disks can be on shared storage: an older one would take them for its own, and make them anew.
fn speaks_shared(offer: &Offer, version: u16, to: &str) -> Result<(), String> {
    let shared = offer.vm.writable.iter().any(|disk| disk.shared.is_some());
    match !shared || version >= VERSION_SHARED {
        true => Ok(()),
        false => Err(format!(
            "{} has disks on shared storage, and {to} speaks version {version} of the protocol, which does not know such: upgrade migrator on \
             {to}, or choose another node",
            offer.pod.name
        )),
    }
}

/// Waits for a pod that has just come here until its packets have, too: those of its old way are awaited for some seconds if
/// its source is lost. What the old node still relays after that would find a guest that is gone: so it must have let go of the pod.
async fn settled(node: &Node, pod: &str, port: &Port) {
    if matches!(port.stage(), Stage::Opened | Stage::Settling) {
        // If it is not, the hold says so.
        let _ = timeout(SETTLES_WITHIN, port.reached(Stage::Local)).await;
    }
    if timeout(RELEASED_WITHIN, node.arrivals.over(pod))
        .await
        .is_err()
    {
        tracing::warn!(
            pod,
            "its old node has not let go of it: packets that it still relays may be lost"
        );
    }
}

/// Where another node's service listens.
pub(super) fn peer_addr(node: &Node, peer: &str) -> Option<SocketAddr> {
    let mut peers = node.config.peers.iter();
    peers.find_map(|(name, addr)| (name.as_str() == peer).then_some(*addr))
}

/// Ends a migration away from here that an earlier service left open.
pub(super) async fn recover(
    node: Arc<Node>,
    record: SourceRecord,
    handed_over: bool,
    pod: Option<(PodHandle, Option<Arc<PodResources>>)>,
) {
    let Some(addr) = peer_addr(&node, &record.to) else {
        tracing::error!(
            migration = %record.migration, pod = record.pod, to = record.to,
            "cannot ask who runs the pod: add that node to `peers` and start the service again"
        );
        return;
    };
    let Some((pod, resources)) = pod else {
        tracing::warn!(migration = %record.migration, pod = record.pod, "nothing of it is here any more");
        return;
    };
    let Some(owner) = owner_to_go_on(&node, &record.pod).await else {
        return;
    };
    let ticket = node
        .migrations
        .begin(record.migration, &record.pod, node.name(), &record.to);
    let figures = figures(&node, &ticket, &pod, &record.to);
    let to = record.to.clone();
    let vm_alive = resources.is_some();
    let (machine, first) = Source::recover(0, record, owner, vm_alive);
    tracing::info!(
        pod = pod.name(),
        to,
        handed_over,
        vm_alive,
        "going on with an open migration"
    );
    let mut run = Run::new(node, pod, resources, ticket, figures, machine, addr);
    run.carry_out(first).await;
    run.events().await;
}

pub(super) fn figures(node: &Node, ticket: &Ticket, pod: &PodHandle, to: &str) -> Figures {
    Figures {
        id: ticket.id.to_string(),
        pod: pod.name().to_owned(),
        from: node.name().to_owned(),
        to: to.to_owned(),
        started: Instant::now(),
        frozen_at_unix_us: 0,
        memory: status::MemoryReport {
            bytes_ram: pod.spec().memory.0,
            compress: Compress::None,
            ..status::MemoryReport::default()
        },
        disk: None,
        images: None,
        phases: Vec::new(),
        downtime_us: 0,
        postcopy: false,
        total: None,
        books: Arc::default(),
        conntrack: status::ConntrackReport::default(),
    }
}

fn policy(options: Options) -> Policy {
    let limit = u64::from(options.max_downtime_ms) * 1_000;
    Policy {
        memory_limit_us: limit.saturating_sub(FIXED_US).max(LEAST_MEMORY_US),
        fixed_us: FIXED_US,
        ..Policy::default()
    }
}

pub(super) async fn end_pod(pod: &PodHandle, end: MigrationEnd) {
    if let Err(error) = pod.end_migration(end).await {
        tracing::error!(
            pod = pod.name(),
            error = chain(&error),
            "cannot end the migration"
        );
    }
}

#[cfg(test)]
mod tests {
    use vm_runtime::spec::{SharedDisk, SharedDriver, WritableDisk};
    use vm_runtime::units::Bytes;

    use super::*;
    use crate::wire::golden;
    use crate::wire::message::DiskOffer;
    use crate::wire::preamble::VERSION_MAX;

    #[test]
    fn a_pod_with_disks_does_not_move_to_a_node_that_would_leave_them() {
        let mut offer = golden::offer();
        assert_eq!(speaks_disks(&offer, VERSION_DISKS - 1, "b"), Ok(()));
        offer.disks.push(DiskOffer {
            name: "root".to_owned(),
            size: 1 << 20,
            allocated: 0,
        });
        assert_eq!(speaks_disks(&offer, VERSION_MAX, "b"), Ok(()));
        let refused = speaks_disks(&offer, VERSION_DISKS - 1, "b").unwrap_err();
        for word in ["web", "version 2", "upgrade migrator on b"] {
            assert!(refused.contains(word), "{refused}");
        }
        assert_eq!(speaks_shared(&offer, VERSION_SHARED - 1, "b"), Ok(()));
        offer.vm.writable.push(WritableDisk {
            serial: "w0".to_owned(),
            name: "data".to_owned(),
            size: Bytes::mib(64),
            shared: Some(SharedDisk {
                class: "ceph".to_owned(),
                class_id: "id".to_owned(),
                volume: "db".to_owned(),
                driver: SharedDriver::Rbd,
                ephemeral: false,
            }),
        });
        assert_eq!(speaks_shared(&offer, VERSION_MAX, "b"), Ok(()));
        let refused = speaks_shared(&offer, VERSION_SHARED - 1, "b").unwrap_err();
        assert!(refused.contains("upgrade migrator on b"), "{refused}");
    }
}
