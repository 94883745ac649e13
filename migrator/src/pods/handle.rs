//! What the rest of the program holds of a pod: its facts, its present state, and a way to ask its
//! actor for something.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use vm_runtime::agent_client::AgentClient;
use vm_runtime::pod::PodSpec;
use vm_runtime::spec::VmSpec;
use vm_runtime::units::Epoch;
use vm_runtime::vm::Vm;

use super::agent::AgentSlot;
use super::disks::PodDisk;
use super::error::PodError;
use super::images::PodImage;
use super::logs::LogStore;
use super::state::PodRecord;
use super::upgrade::{UpgradeOrder, UpgradeReport};
use crate::api::types::{
    ContainerState, ContainerStatus, PodDetail, PodState, PodSummary, QemuInfo,
};
use crate::network::Port;

/// How long a command waits for the agent in a guest that runs.
const AGENT_WITHIN: Duration = Duration::from_secs(10);

/// What a pod with a VM is made of. Handles: whoever has this shares them with the pod's actor.
#[derive(Debug)]
pub struct PodResources {
    /// The pod.
    pub spec: PodSpec,
    /// Its VM's shape.
    pub vm_spec: VmSpec,
    /// Its VM.
    pub vm: Arc<Vm>,
    /// Its place on the network.
    pub port: Port,
    /// Its images, in the order of its VM's specification.
    pub images: Vec<Arc<PodImage>>,
    /// Its disks that can be written, in the order of its VM's specification.
    pub disks: Vec<Arc<PodDisk>>,
    /// The agent inside.
    pub agent: AgentSlot,
    /// What its containers printed.
    pub logs: Arc<LogStore>,
}

/// What never changes about a pod on this node.
#[derive(Debug)]
pub(super) struct Facts {
    pub(super) node: String,
    pub(super) spec: PodSpec,
    pub(super) vm_spec: VmSpec,
    pub(super) slot: u16,
    pub(super) dir: PathBuf,
    pub(super) created_unix_ms: u64,
    pub(super) logs: Arc<LogStore>,
}

/// What does.
#[derive(Clone, Debug)]
pub struct View {
    /// Where it is.
    pub state: PodState,
    /// Why, where there is a reason.
    pub reason: Option<String>,
    /// Its containers.
    pub containers: Vec<ContainerStatus>,
    /// The right by which this node runs it, or ran it last.
    pub epoch: Epoch,
    /// The migration that it is in.
    pub migration: Option<String>,
    /// What it is made of, while it has a VM.
    pub resources: Option<Arc<PodResources>>,
}

/// How a migration of a pod away from here ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MigrationEnd {
    /// The guest runs here, under this epoch. The agent is attached again.
    Kept {
        /// Unchanged, or a higher one after a grant that was discarded.
        epoch: Epoch,
    },
    /// The destination runs it. Its VM has ended and its port is released: only files are left, and
    /// the actor removes those.
    MovedAway {
        /// The destination node.
        to: String,
    },
    /// The guest is lost here, and not elsewhere: the VM ended before the grant, or the grant was discarded.
    Died {
        /// Why.
        reason: String,
        /// The right by which this node may start it again: unchanged, or a higher one after a grant that was discarded.
        epoch: Epoch,
    },
}

#[derive(Debug)]
pub(super) enum Command {
    Stop {
        grace: Duration,
        reply: oneshot::Sender<Result<(), PodError>>,
    },
    Start {
        deadline: Duration,
        reply: oneshot::Sender<Result<(), PodError>>,
    },
    BeginMigration {
        id: String,
        reply: oneshot::Sender<Result<Arc<PodResources>, PodError>>,
    },
    Upgrade {
        order: UpgradeOrder,
        reply: oneshot::Sender<Result<UpgradeReport, PodError>>,
    },
    MarkInDoubt,
    EndMigration {
        end: MigrationEnd,
        reply: oneshot::Sender<Result<(), PodError>>,
    },
}

/// A pod of this node. Cheap to clone.
#[derive(Clone, Debug)]
pub struct PodHandle {
    pub(super) facts: Arc<Facts>,
    pub(super) view: watch::Receiver<View>,
    pub(super) commands: mpsc::Sender<Command>,
}

impl PodHandle {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.facts.spec.name
    }

    /// What was asked for.
    pub fn spec(&self) -> &PodSpec {
        &self.facts.spec
    }

    /// Its VM's shape.
    pub fn vm_spec(&self) -> &VmSpec {
        &self.facts.vm_spec
    }

    /// Its slot on this node.
    pub fn slot(&self) -> u16 {
        self.facts.slot
    }

    /// What its containers printed.
    pub fn logs(&self) -> Arc<LogStore> {
        Arc::clone(&self.facts.logs)
    }

    /// Its present state.
    pub fn view(&self) -> View {
        self.view.borrow().clone()
    }

    /// Its state, to be watched. The channel closes when the pod has left this node.
    pub fn watch(&self) -> watch::Receiver<View> {
        self.view.clone()
    }

    /// What travels with it in a migration.
    pub fn record(&self) -> PodRecord {
        PodRecord {
            created_unix_ms: self.facts.created_unix_ms,
            containers: self.view.borrow().containers.clone(),
        }
    }

    /// As lists show it.
    pub fn summary(&self) -> PodSummary {
        let facts = &self.facts;
        let view = self.view.borrow();
        PodSummary {
            name: facts.spec.name.clone(),
            node: facts.node.clone(),
            state: view.state,
            reason: view.reason.clone(),
            containers: view.containers.clone(),
            mac: facts.spec.net.mac,
            ipv4: facts.spec.net.ipv4.map(|(address, _)| address),
            ipv6: facts.spec.net.ipv6.map(|(address, _)| address),
            memory_bytes: facts.spec.memory.0,
            vcpus: facts.spec.vcpus,
            created_unix_ms: facts.created_unix_ms,
            epoch: view.epoch,
            migration: view.migration.clone(),
        }
    }

    /// In full.
    pub fn detail(&self) -> PodDetail {
        let resources = self.view.borrow().resources.clone();
        let vmm = resources.as_ref().map(|parts| parts.vm.record());
        let disks = resources.iter().flat_map(|parts| &parts.disks);
        let images = resources.iter().flat_map(|parts| &parts.images);
        let qemu = vmm.as_ref().map(|record| QemuInfo {
            path: record.qemu.path.clone(),
            version: record.qemu.version_text(),
            machine: record.spec.machine.clone(),
        });
        PodDetail {
            summary: self.summary(),
            spec: self.facts.spec.clone(),
            vm: self.facts.vm_spec.clone(),
            vmm_pid: vmm.and_then(|record| u32::try_from(record.pid).ok()),
            qemu,
            dir: self.facts.dir.clone(),
            slot: self.facts.slot,
            disks: disks.map(|disk| disk.info()).collect(),
            images: images.map(|image| image.info()).collect(),
        }
    }

    /// The agent inside, for a command in `container`. Waits for it: after a move or a restart it takes a moment.
    ///
    /// # Errors
    /// There is no such container, the guest does not run, or its agent stays silent.
    pub async fn agent_for(
        &self,
        container: Option<&str>,
    ) -> Result<(AgentClient, String), PodError> {
        let containers = &self.facts.spec.containers;
        let found = match container {
            Some(name) => containers.iter().find(|c| c.name == name),
            None => containers.first(),
        };
        let Some(found) = found else {
            return Err(PodError::NoContainer {
                pod: self.name().to_owned(),
                container: container.unwrap_or_default().to_owned(),
            });
        };
        let (state, resources) = {
            let view = self.view.borrow();
            (view.state, view.resources.clone())
        };
        match (state, resources) {
            (PodState::Running | PodState::Migrating | PodState::Upgrading, Some(resources)) => {
                let agent = resources.agent.wait(AGENT_WITHIN).await;
                let agent = agent.ok_or_else(|| PodError::NoAgent(self.name().to_owned()))?;
                Ok((agent, found.name.clone()))
            }
            (state, _) => Err(self.busy(state, "run a command in")),
        }
    }

    /// Whether it has a container of that name.
    ///
    /// # Errors
    /// [`PodError::NoContainer`].
    pub fn check_container(&self, name: &str) -> Result<(), PodError> {
        if self.facts.spec.containers.iter().any(|c| c.name == name) {
            return Ok(());
        }
        Err(PodError::NoContainer {
            pod: self.name().to_owned(),
            container: name.to_owned(),
        })
    }

    fn busy(&self, state: PodState, verb: &'static str) -> PodError {
        PodError::Busy {
            pod: self.name().to_owned(),
            state,
            verb,
        }
    }

    /// Stops its containers (SIGTERM, after `grace` SIGKILL), ends its VM and removes it.
    ///
    /// # Errors
    /// It is migrating, or something of it could not be removed.
    pub async fn stop(&self, grace: Duration) -> Result<(), PodError> {
        self.ask(|reply| Command::Stop { grace, reply }).await
    }

    /// Boots it again, with the disks that it has, if its VM is gone; returns when its containers have started, which may take `deadline`.
    ///
    /// # Errors
    /// It has a VM, or cannot be started; nothing of it is removed then.
    pub async fn start(&self, deadline: Duration) -> Result<(), PodError> {
        self.ask(|reply| Command::Start { deadline, reply }).await
    }

    /// Replaces its VMM under the running guest; see [`super::upgrade`].
    ///
    /// # Errors
    /// It is not running; or it was not upgraded, and goes on as it was.
    pub async fn upgrade(&self, order: UpgradeOrder) -> Result<UpgradeReport, PodError> {
        self.ask(|reply| Command::Upgrade { order, reply }).await
    }

    /// Marks it as migrating and lends what it is made of: from here to [`PodHandle::end_migration`]
    /// the actor neither touches VM, port and agent nor reacts to the VM's end.
    ///
    /// # Errors
    /// It is not running.
    pub async fn begin_migration(&self, id: String) -> Result<Arc<PodResources>, PodError> {
        self.ask(|reply| Command::BeginMigration { id, reply })
            .await
    }

    /// Shows a migrating pod as in doubt: the grant was sent, and no answer came. Nothing else changes.
    pub async fn mark_in_doubt(&self) {
        // A pod whose actor is gone needs no mark.
        let _ = self.commands.send(Command::MarkInDoubt).await;
    }

    /// Ends what [`PodHandle::begin_migration`] began.
    ///
    /// # Errors
    /// No migration was begun; or the pod's files cannot be removed, and it took effect all the same.
    pub async fn end_migration(&self, end: MigrationEnd) -> Result<(), PodError> {
        self.ask(|reply| Command::EndMigration { end, reply }).await
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, PodError>>) -> Command,
    ) -> Result<T, PodError> {
        let (reply, answer) = oneshot::channel();
        // An actor that is gone has removed its pod.
        let gone = || PodError::NotFound(self.name().to_owned());
        self.commands
            .send(command(reply))
            .await
            .map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// The containers of a spec, none started.
pub(super) fn waiting(spec: &PodSpec) -> Vec<ContainerStatus> {
    spec.containers
        .iter()
        .map(|c| ContainerStatus {
            name: c.name.clone(),
            image: c.image.clone(),
            state: ContainerState::Waiting,
            condition: Default::default(),
        })
        .collect()
}
