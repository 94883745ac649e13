//! Replacing the VMM under a running guest: another QEMU takes the guest over on the same memory and the same TAP.
//!
//! ```text
//!   prepare   start the new QEMU beside the old one; it waits for a state          the guest runs
//!   detach    the agent's link is quiet
//!   hold      frames park, the guest empties its TAP
//!   setup     the old QEMU does what can be done before it stops the guest
//!   state     device state goes from one to the other                              it stands still
//!   tap       the new one gets the TAP
//!   suspend   the old one gets SIGSTOP: it leaves the TAP alone, and a service that starts takes the new one
//!   resume    the new one runs                                                     it runs
//!   open      parked frames go into the TAP, then the gate opens
//!   record    the agent's link goes to the new one, whose record takes the place of the old one's
//!   end       the old one is killed
//! ```
//!
//! Whatever fails before `resume` is undone: the new QEMU is ended, and the guest goes on in the old one. A service that is
//! killed in between leaves two QEMUs or one; the next service finds the one that is the pod's, see [`Vm::find`].

mod report;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

pub use report::{UpgradeQemu, UpgradeReport};
use report::{Watch, us};

use tokio::time::timeout;
use vm_runtime::qemu::{QemuBinary, QemuConfig, QemuError};
use vm_runtime::vm::{
    ControlError, SpawnError, StateError, SuccessionError, Successor, SuccessorResources, Vm,
    VmRecord,
};

use super::agent::{AgentSlot, attach_later};
use super::boot::{check_available, sockets};
use super::error::PodError;
use super::handle::PodResources;
use super::plan::VMM_OVERHEAD;
use crate::api::error::chain;
use crate::api::types::ErrorCode;
use crate::daemon::node::Node;
use crate::network::{PortError, Stage};

/// How long the guest's agent gets to acknowledge what it was sent. What is left is sent again.
const AGENT_LIMIT: Duration = Duration::from_millis(200);
/// How long a running guest gets to empty its TAP queue. Its frames wait in the park meanwhile.
const DRAIN_LIMIT: Duration = Duration::from_millis(100);
/// How long an upgrade waits for the guest to take what was parked; it goes on taking it after that.
const LOCAL_LIMIT: Duration = Duration::from_secs(1);

/// Which QEMU a pod is to get.
#[derive(Clone, Debug, Default)]
pub struct UpgradeOrder {
    /// `None`: the one of the node's configuration, as it is installed now.
    pub qemu: Option<QemuConfig>,
}

/// Why a pod's VMM was not replaced.
#[derive(Debug, thiserror::Error)]
pub enum UpgradeError {
    /// What was named is no QEMU.
    #[error("there is no QEMU to upgrade to")]
    Qemu(#[source] QemuError),
    /// A disk that QEMU itself has open: the old one, which is stopped in between, would not let go of Ceph's lock.
    #[error(
        "disk `{disk}` is on Ceph, which QEMU has open by itself: move the pod to another node and back instead"
    )]
    Ceph {
        /// The disk.
        disk: String,
    },
    /// It does not start.
    #[error("the new QEMU does not start")]
    Start(#[source] SpawnError),
    /// The state does not get across.
    #[error("the new QEMU does not take the state of the old one")]
    State(#[source] StateError),
    /// The new one cannot be put in the old one's place.
    #[error("the new QEMU cannot take the place of the old one")]
    Place(#[source] SuccessionError),
    /// The new one does not run.
    #[error("the new QEMU does not run the guest")]
    Resume(#[source] ControlError),
    /// The network.
    #[error("the pod's packets cannot be held")]
    Network(#[source] PortError),
    /// A part of the node's.
    #[error(transparent)]
    Node(#[from] Box<PodError>),
}

impl UpgradeError {
    /// What kind of failure it is for a client.
    pub(super) fn code(&self) -> ErrorCode {
        match self {
            Self::Qemu(_) | Self::Ceph { .. } | Self::Start(_) | Self::State(_) => {
                ErrorCode::Refused
            }
            Self::Place(_) | Self::Resume(_) | Self::Network(_) => ErrorCode::Internal,
            Self::Node(error) => error.code(),
        }
    }
}

/// How an upgrade ended.
pub(super) enum Upgraded {
    /// The pod has another VM.
    Done(Arc<PodResources>, UpgradeReport),
    /// It is as it was.
    Kept(UpgradeError),
    /// The new VM was told to run, and fails: the pod has that one, and no other.
    Broken(Arc<PodResources>, UpgradeError),
}

/// Replaces the VMM of a pod that runs. Ends early only while nothing of the pod was touched yet.
pub(super) async fn upgrade(
    node: &Arc<Node>,
    parts: &Arc<PodResources>,
    order: UpgradeOrder,
) -> Upgraded {
    let mut watch = Watch::new();
    let prepared = tokio::select! {
        prepared = prepare(node, parts, order) => prepared,
        () = node.shutdown.cancelled() => Err(Box::new(PodError::ShuttingDown).into()),
    };
    let next = match prepared {
        Ok(next) => next,
        Err(error) => return Upgraded::Kept(error),
    };
    watch.step("prepare");
    if let Err(error) = take_over(parts, &next, &mut watch).await {
        undo(parts, next).await;
        return Upgraded::Kept(error);
    }
    let ran = next.cont().await;
    watch.step("resume");
    let ran = match ran {
        Err(ControlError::Qmp { verb, source }) if source.is_refusal() => {
            undo(parts, next).await;
            let error = ControlError::Qmp { verb, source };
            return Upgraded::Kept(UpgradeError::Resume(error));
        }
        // If it does not say no, it may have run for a moment: then what the old one knows is not true any more.
        ran => ran,
    };
    let downtime_us = watch.since("state");
    open(parts).await;
    watch.step("open");
    let held_us = watch.since("hold");
    let report = UpgradeReport {
        pod: parts.spec.name.clone(),
        from: UpgradeQemu::of(&parts.vm.record().qemu),
        to: UpgradeQemu::of(next.qemu()),
        total_us: 0,
        downtime_us,
        held_us,
        state_bytes: watch.state_bytes,
        phases: Vec::new(),
    };
    let replaced = settle(node, parts, next, &mut watch).await;
    match ran {
        Ok(()) => Upgraded::Done(
            replaced,
            UpgradeReport {
                total_us: us(watch.began.elapsed()),
                phases: watch.phases,
                ..report
            },
        ),
        Err(error) => Upgraded::Broken(replaced, UpgradeError::Resume(error)),
    }
}

/// Starts the new QEMU. The pod does not notice.
async fn prepare(
    node: &Arc<Node>,
    parts: &PodResources,
    order: UpgradeOrder,
) -> Result<Successor, UpgradeError> {
    let name = parts.spec.name.as_str();
    if let Some(disk) = parts.disks.iter().find(|disk| disk.served().is_none()) {
        let disk = disk.name.clone();
        return Err(UpgradeError::Ceph { disk });
    }
    let config = order.qemu.unwrap_or_else(|| QemuConfig {
        binary: node.config.qemu.binary.clone(),
        lib_dir: node.config.qemu.lib_dir.clone(),
        data_dirs: node.config.qemu.data_dirs.clone(),
    });
    let qemu = QemuBinary::open(&config)
        .await
        .map_err(UpgradeError::Qemu)?;
    check_available(name, VMM_OVERHEAD).map_err(Box::new)?;
    let disks = sockets(parts.vm.record().home(), &parts.vm_spec);
    let spare_tap = parts.port.spare_tap().map_err(UpgradeError::Network)?;
    let resources = SuccessorResources {
        qemu,
        kernel: node.guest.kernel.clone(),
        initramfs: node.guest.initramfs.clone(),
        disks,
        spare_tap,
    };
    let started = parts.vm.successor(resources).await;
    started.map_err(UpgradeError::Start)
}

/// From the running guest to the one that the new QEMU needs only be told to run.
async fn take_over(
    parts: &PodResources,
    next: &Successor,
    watch: &mut Watch,
) -> Result<(), UpgradeError> {
    let name = parts.spec.name.as_str();
    let PodResources { vm, port, .. } = parts;
    if let Some(agent) = parts.agent.get() {
        agent.detach(AGENT_LIMIT).await;
        // What it says is not needed, as the link goes on. What is written to the old VMM from here on, it could put into the memory of a guest that
        // runs under the new one already.
        if let Err(error) = agent.state().await {
            tracing::warn!(
                pod = name,
                error = chain(&error),
                "the agent's link is lost"
            );
        }
    }
    watch.step("detach");
    let drained = port.hold_still(DRAIN_LIMIT).await;
    if !drained.map_err(UpgradeError::Network)? {
        tracing::info!(pod = name, "the guest does not empty its queue");
    }
    watch.step("hold");
    let passed = vm.hand_over(next).await.map_err(UpgradeError::State)?;
    watch.state_bytes = passed.bytes.map(|bytes| bytes.0);
    watch.step_until("setup", passed.stopped);
    watch.step("state");
    next.take_tap().await.map_err(UpgradeError::Place)?;
    watch.step("tap");
    vm.suspend().map_err(UpgradeError::Place)?;
    watch.step("suspend");
    Ok(())
}

/// As if nothing had happened: the guest goes on in the old QEMU. What cannot be undone is logged; there is nobody left to ask.
async fn undo(parts: &PodResources, next: Successor) {
    let name = parts.spec.name.as_str();
    let failed = |step: &str, error: String| {
        tracing::error!(pod = name, error, "cannot {step} after a failed upgrade");
    };
    // First: as long as it is suspended, a service that starts takes the other one.
    if let Err(error) = parts.vm.wake() {
        failed("wake the old QEMU", chain(&error));
    }
    if let Err(error) = next.give_up().await {
        failed("end the new QEMU", chain(&error));
    }
    if let Err(error) = resume(&parts.vm).await {
        failed("resume the guest", chain(&error));
    }
    open(parts).await;
    if let Some(agent) = parts.agent.get()
        && let Err(error) = agent.reattach()
    {
        failed("attach to the agent", chain(&error));
    }
}

async fn resume(vm: &Vm) -> Result<(), ControlError> {
    // Without a save under way this does nothing; a guest that runs goes on.
    vm.abort_save().await?;
    vm.cont().await
}

/// Opens the gate, if it holds. The guest gets what was parked, in order.
async fn open(parts: &PodResources) {
    if parts.port.stage() == Stage::Holding
        && let Err(error) = parts.port.rollback().await
    {
        tracing::error!(
            pod = parts.spec.name,
            error = chain(&error),
            "its packets do not go on"
        );
    }
}

/// The pod's parts with the new VM, whose record decides from now on; the agent's link goes there.
async fn settle(
    node: &Arc<Node>,
    parts: &PodResources,
    next: Successor,
    watch: &mut Watch,
) -> Arc<PodResources> {
    let name = parts.spec.name.as_str();
    let agent = parts.agent.get();
    if let Some(agent) = &agent
        && let Err(error) = agent.reattach_at(next.agent_socket())
    {
        tracing::warn!(
            pod = name,
            error = chain(&error),
            "the agent's link is gone"
        );
    }
    let decided = next.prevail().await;
    watch.step("record");
    let old = parts.vm.record();
    let ended = match decided {
        Ok(()) => VmRecord::kill_others(old.home()).await,
        Err(error) => {
            // The record of the old one leads to the new one as well, and stays.
            tracing::error!(pod = name, error = chain(&error), "after an upgrade");
            old.process().kill().await
        }
    };
    if let Err(error) = ended {
        tracing::error!(pod = name, %error, "cannot end the old QEMU");
    }
    let vm = next.into_vm().await;
    let replaced = Arc::new(PodResources {
        spec: parts.spec.clone(),
        vm_spec: parts.vm_spec.clone(),
        vm: Arc::new(vm),
        port: parts.port.clone(),
        images: parts.images.clone(),
        disks: parts.disks.clone(),
        agent: agent.clone().map(AgentSlot::with).unwrap_or_default(),
        logs: Arc::clone(&parts.logs),
    });
    match agent {
        Some(agent) => {
            let name = name.to_owned();
            node.tasks.spawn(async move {
                if let Err(error) = agent.set_clock(SystemTime::now()).await {
                    tracing::warn!(
                        pod = name,
                        error = chain(&error),
                        "cannot set the guest's clock"
                    );
                }
            });
        }
        None => attach_later(node, &replaced, None),
    }
    // What comes next may want to hold again.
    let local = parts.port.reached(Stage::Local);
    if timeout(LOCAL_LIMIT, local).await.is_err() {
        tracing::info!(pod = name, "the guest is slow to take what was parked");
    }
    watch.step("end");
    replaced
}
