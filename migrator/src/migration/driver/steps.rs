//! What the steps of both sides share.

use std::sync::Arc;

use crate::api::error::chain;
use crate::daemon::node::Node;
use crate::migration::journal::{Journal, JournalError, OwnerRecord};
use crate::network;
use crate::wire::message::Ledger;

/// Runs what blocks on a thread of its own.
pub(super) async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(call)
        .await
        .unwrap_or_else(|error| Err(chain(&error)))
}

/// The pod's owner record, for a migration that is taken up again; `None` when the journal cannot be read, which is logged.
pub(super) async fn owner_to_go_on(node: &Node, pod: &str) -> Option<Option<OwnerRecord>> {
    let name = pod.to_owned();
    blocking_journal(node, move |journal| journal.owner(&name))
        .await
        .inspect_err(|reason| {
            tracing::error!(pod, reason, "its journal cannot be read: left alone");
        })
        .ok()
}

/// Calls the journal, which blocks for an fsync.
pub(super) async fn blocking_journal<T: Send + 'static>(
    node: &Node,
    call: impl FnOnce(&Journal) -> Result<T, JournalError> + Send + 'static,
) -> Result<T, String> {
    let journal = Arc::clone(&node.journal);
    blocking(move || call(&journal).map_err(|error| chain(&error))).await
}

/// The books as they cross the wire.
pub(super) fn wire_ledger(booked: &network::Ledger) -> Ledger {
    Ledger {
        seen: booked.seen,
        delivered: booked.delivered,
        held: booked.held,
        forwarded: booked.forwarded,
        refused: booked.refused,
        lost: booked.lost,
    }
}
