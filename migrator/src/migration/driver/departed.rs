//! A pod that has gone, from a service that ended before the destination was told that nothing more comes.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use super::depart::{DIAL_DEADLINE, peer_addr};
use super::link::{Link, LinkEvent};
use super::steps::blocking_journal;
use crate::api::error::chain;
use crate::daemon::node::Node;
use crate::migration::journal::{Entry, SourceRecord, SourceState};
use crate::wire::message::{Control, Ledger, Released};
use crate::wire::preamble::Shape;
use crate::wire::session;

/// How often the destination is tried. Until it is told, it keeps a note of the migration, and nothing else.
const ATTEMPTS: u32 = 60;
/// Between two attempts.
const PAUSE: Duration = Duration::from_secs(1);
/// For its answer.
const ANSWER: Duration = Duration::from_secs(5);

/// Tells the destination, and closes the migration. What fails is tried again by the next service.
pub(super) async fn tell(node: Arc<Node>, record: SourceRecord) {
    let Some(addr) = peer_addr(&node, &record.to) else {
        tracing::warn!(
            migration = %record.migration, pod = record.pod, to = record.to,
            "the pod has moved there, and its note of that stays open: add that node to `peers`"
        );
        return;
    };
    for attempt in 1..=ATTEMPTS {
        match tell_once(&node, &record, addr).await {
            Ok(()) => break,
            Err(reason) if attempt == ATTEMPTS => {
                tracing::warn!(
                    pod = record.pod,
                    to = record.to,
                    reason,
                    "not told that nothing more comes"
                );
                return;
            }
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
    tracing::info!(
        pod = record.pod,
        to = record.to,
        "moved away before the restart"
    );
    let closed = Entry::Source(SourceRecord {
        state: SourceState::Completed,
        ..record
    });
    if let Err(reason) = blocking_journal(&node, move |journal| journal.apply(&closed)).await {
        tracing::error!(reason, "the journal stays behind");
    }
}

async fn tell_once(node: &Node, record: &SourceRecord, addr: SocketAddr) -> Result<(), String> {
    let session = session::dial_shape(addr, &node.tls, &record.to, Shape::Query, DIAL_DEADLINE)
        .await
        .map_err(|error| chain(&error))?;
    let (sender, mut events) = tokio::sync::mpsc::unbounded_channel();
    let link = Link::start(session.control, sender, Some);
    let released = Released {
        migration: record.migration,
        ledger: Ledger::default(),
    };
    link.control
        .send(released)
        .await
        .map_err(|_| "the link was lost".to_owned())?;
    loop {
        match timeout(ANSWER, events.recv()).await {
            Ok(Some(LinkEvent::Message(Control::Bye(_)))) => return Ok(()),
            Ok(Some(LinkEvent::Message(_))) => {}
            Ok(Some(LinkEvent::Lost(reason))) => return Err(reason),
            Ok(None) | Err(_) => return Err("no answer".to_owned()),
        }
    }
}
