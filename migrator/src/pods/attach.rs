//! Taking back what an earlier service has left of a pod that runs.

use std::sync::Arc;

use vm_runtime::vm::{AttachError, RunState, Vm, VmRecord};

use super::agent::{AgentSlot, attach_later};
use super::boot;
use super::disks::Origin;
use super::handle::{Facts, PodResources};
use crate::api::error::chain;
use crate::daemon::node::Node;
use crate::network::{Port, Role, Stage};

/// Takes VM, port and agent back. The error is the reason that the pod is shown as failed with.
pub(super) async fn attach(
    node: &Arc<Node>,
    facts: &Facts,
    migrating: bool,
    role: Role,
    origin: Origin,
) -> Result<Arc<PodResources>, String> {
    let name = facts.spec.name.as_str();
    // Before the VMM is talked to: it may wait for them.
    let disks = boot::open_disks(node, facts, origin).await;
    if let Err(error) = &disks
        && super::disks::is_refusal(error)
    {
        // Its guest must not write any more, and where QEMU does that by itself nobody else keeps it from it.
        tracing::error!(
            pod = name,
            "a disk of it is another pod's by now: its VM is ended"
        );
        if let Ok(record) = VmRecord::load(&facts.dir)
            && let Err(error) = record.kill().await
        {
            tracing::error!(pod = name, %error, "cannot end its VM");
        }
    }
    let disks = disks.and_then(|disks| super::disks::serve(name, &disks).map(|()| disks));
    let disks = disks.map_err(|e| format!("its disks are not served: {}", chain(&e)))?;
    let images = super::images::serve(node, name, &facts.dir, &facts.vm_spec).await;
    // A VMM of an earlier version reads a file that it has open.
    let images = images.unwrap_or_else(|error| {
        tracing::error!(
            pod = name,
            error = chain(&error),
            "its images are not served"
        );
        Vec::new()
    });
    let vm = match Vm::find(&facts.dir).await {
        Ok(vm) => Arc::new(vm),
        Err(error) => {
            // Nothing of a dead VM may stay behind on the bridge.
            clean_network(node, facts.slot, name).await;
            let reason = match error {
                AttachError::Gone { .. } => boot::death(None, &facts.dir),
                other => chain(&other),
            };
            tracing::error!(pod = name, reason, "its VM is not there any more");
            return Err(reason);
        }
    };
    let fds = boot::existing(&vm).map_err(|e| format!("cannot take its TAP back: {e}"))?;
    let port = node
        .network
        .attach(&boot::net_id(&facts.spec), facts.slot, role, Some(fds))
        .await
        .map_err(|e| format!("cannot take its network port back: {}", chain(&e)))?;
    if !migrating {
        resume(name, &vm, &port).await;
    }
    tracing::info!(pod = name, pid = vm.pid(), "found again");
    let resources = Arc::new(PodResources {
        spec: facts.spec.clone(),
        vm_spec: facts.vm_spec.clone(),
        vm,
        port,
        images,
        disks,
        agent: AgentSlot::default(),
        logs: Arc::clone(&facts.logs),
    });
    attach_later(node, &resources, None);
    Ok(resources)
}

/// A guest that this node owns, and that no migration holds, has no reason to stand still or to wait for
/// its packets.
async fn resume(pod: &str, vm: &Vm, port: &Port) {
    if port.stage() == Stage::Holding
        && let Err(error) = port.rollback().await
    {
        tracing::error!(pod, error = chain(&error), "its packets do not go on");
    }
    match vm.query_status().await {
        Ok(RunState::Paused | RunState::Saved) => {
            tracing::warn!(pod, "its guest stood still: it goes on");
            if let Err(error) = vm.cont().await {
                tracing::error!(pod, error = chain(&error), "its guest does not go on");
            }
        }
        // It found the node's file system full: it finds out whether it still is.
        Ok(RunState::Other(state)) if state == "io-error" => {
            if let Err(error) = vm.cont().await {
                tracing::error!(pod, error = chain(&error), "its guest does not go on");
            }
        }
        Ok(RunState::Running | RunState::Saving | RunState::Incoming | RunState::Other(_)) => {}
        Err(error) => tracing::error!(pod, error = chain(&error), "its VMM does not answer"),
    }
}

/// Removes what is left of a pod's port.
pub(super) async fn clean_network(node: &Node, slot: u16, pod: &str) {
    if let Err(error) = node.network.forget(slot).await {
        tracing::error!(
            pod,
            error = chain(&error),
            "cannot remove what is left of its port"
        );
    }
}
