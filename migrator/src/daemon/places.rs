//! In a routed cluster: tells the other nodes of this one's pods.

use std::sync::Arc;
use std::time::Duration;

use super::node::Node;
use crate::api::error::chain;

/// When a pod that a former service has left in the programs' table must have been found again.
const FOUND_WITHIN: Duration = Duration::from_secs(10);

/// Once the pods of a former service are found: what is told before would look as if they were gone.
pub(super) fn start(node: &Arc<Node>) {
    let Some(directory) = &node.directory else {
        return;
    };
    for (peer, addr) in &node.config.peers {
        let publish = directory.clone().publish(peer.to_string(), *addr);
        node.tasks.spawn(publish);
    }
    let node = Arc::clone(node);
    node.clone().tasks.spawn(async move {
        tokio::select! {
            () = node.shutdown.cancelled() => return,
            () = tokio::time::sleep(FOUND_WITHIN) => {}
        }
        let Some(endpoints) = node.network.endpoints() else {
            return;
        };
        let ports = node.network.ports();
        let macs = ports.iter().map(|port| port.mac()).collect();
        if let Err(error) = endpoints.keep_own(&macs) {
            tracing::warn!(
                error = chain(&error),
                "pods that are no more stay in the table"
            );
        }
    });
}
