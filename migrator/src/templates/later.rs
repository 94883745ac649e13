//! Templates that nobody asked for: made when the node has nothing better to do.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use vm_runtime::spec::VmSpec;

use super::{Key, build, shape};
use crate::api::error::chain;
use crate::api::types::PodState;
use crate::daemon::node::Node;

/// A boot takes the time of a processor from others: it begins when no pod has started, moved or stopped for so long.
const IDLE: Duration = Duration::from_secs(10);
/// How often to look.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A node that is never idle makes none; the next pod of the shape tries again.
const PATIENCE: Duration = Duration::from_secs(600);

/// Makes the template of a VM that was booted without one, in the background, if the configuration wants that.
pub fn make_later(node: &Arc<Node>, vm: &VmSpec) {
    let shape = shape(vm);
    let key = Key::new(&node.qemu, &shape);
    if !node.templates.wants(&key) {
        return;
    }
    let node = Arc::clone(node);
    node.tasks.clone().spawn(async move {
        let waiting = tokio::select! {
            idle = timeout(PATIENCE, idle(&node)) => idle,
            () = node.shutdown.cancelled() => return,
        };
        // Another pod of the shape may have been first.
        if waiting.is_err() || !node.templates.wants(&key) {
            return;
        }
        if let Err(error) = build(&node, &shape).await {
            tracing::warn!(error = chain(&error), "no template was made");
            node.templates.give_up(&key);
        }
    });
}

async fn idle(node: &Node) {
    let mut since = Instant::now();
    while since.elapsed() < IDLE {
        let busy = |state| !matches!(state, PodState::Running | PodState::Failed);
        if node.pods.list().iter().any(|pod| busy(pod.view().state)) {
            since = Instant::now();
        }
        sleep(LOOK_EVERY).await;
    }
}
