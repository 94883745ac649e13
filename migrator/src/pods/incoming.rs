//! A pod on its way to this node: everything it needs here, until it runs here or is discarded.
//!
//! ```text
//!   prepare ──▶ make_memory ──▶ build ──▶ adopt        the guest runs here
//!      └─────────────┴────────────┴────▶ discard      as if it had never been offered
//! ```
//!
//! Whose the pod is, is the migration's business: nothing here writes the journal. A service that is
//! killed in between leaves a folder without an owner record, which its successor removes.

use std::sync::Arc;

use vm_runtime::agent_client::AgentState;
use vm_runtime::memory::GuestMemory;
use vm_runtime::pod::PodSpec;
use vm_runtime::spec::VmSpec;
use vm_runtime::units::Epoch;
use vm_runtime::vm::Vm;

use super::actor::{self, Birth};
use super::agent::{AgentSlot, attach_later};
use super::boot::{self, Parts, check_memory};
use super::disks::{self, Origin, PodDisk};
use super::error::PodError;
use super::handle::{Facts, PodHandle, PodResources};
use super::images::{self, PodImage};
use super::logs::LogStore;
use super::run::make_folder;
use super::state::{PodFile, PodRecord};
use super::{PodRegistry, Reservation};
use crate::block::Disk;
use crate::daemon::node::Node;
use crate::image::{Digest, ImageHold};
use crate::network::{Port, Role};

/// A pod on its way to this node. Dropping it leaves VM, port and folder for the next start of the
/// service to remove: call [`IncomingPod::discard`].
#[derive(Debug)]
pub struct IncomingPod {
    node: Arc<Node>,
    reservation: Reservation,
    facts: Facts,
    record: PodRecord,
    memory: Option<Arc<GuestMemory>>,
    images: Vec<Arc<PodImage>>,
    disks: Vec<Arc<PodDisk>>,
    parts: Parts,
    /// Its images, which come while it does.
    _hold: ImageHold,
}

impl IncomingPod {
    /// Takes name, addresses and a slot, checks the memory, and makes the pod's folder.
    ///
    /// # Errors
    /// What is taken or not enough; nothing is kept then.
    pub async fn prepare(
        node: &Arc<Node>,
        spec: PodSpec,
        vm: VmSpec,
        record: PodRecord,
    ) -> Result<Self, PodError> {
        vm.check()
            .map_err(|e| PodError::step(&spec.name, "accept its VM", e))?;
        let limit = node.config.longest_pod_name();
        if spec.name.len() > limit {
            return Err(PodError::NameTooLong {
                name: spec.name,
                limit,
            });
        }
        let reservation = node.pods.reserve(&spec, node.config.limits.pods)?;
        check_memory(&spec)?;
        let file = PodFile {
            spec,
            vm,
            slot: reservation.slot(),
            booting: false,
            starting_again: false,
            record: record.clone(),
        };
        let disks = file.vm.disks.iter();
        let digests: Vec<Digest> = disks
            .filter_map(|disk| disk.image_digest.parse().ok())
            .collect();
        let hold = node.images.hold(digests);
        let facts = make_folder(node, file).await?;
        Ok(Self {
            node: Arc::clone(node),
            reservation,
            facts,
            record,
            memory: None,
            images: Vec::new(),
            disks: Vec::new(),
            parts: Parts::default(),
            _hold: hold,
        })
    }

    /// Makes its disks, one hole each; named volumes too, which must not be here: they are in the pod's folder until
    /// [`IncomingPod::keep_volumes`]. Shared ones are not touched. They are served from [`IncomingPod::build`] on.
    ///
    /// # Errors
    /// A volume is here already, or a file cannot be made.
    pub async fn make_disks(&mut self) -> Result<(), PodError> {
        self.disks = boot::open_disks(&self.node, &self.facts, Origin::Incoming).await?;
        Ok(())
    }

    /// Its disks whose content comes, once they are made.
    pub fn disks(&self) -> Vec<Arc<Disk>> {
        let disks = self.disks.iter().filter_map(|disk| disk.local());
        disks.cloned().collect()
    }

    /// Its disks on shared storage, which become this node's at the grant.
    pub fn shared_disks(&self) -> Vec<Arc<PodDisk>> {
        let disks = self.disks.iter();
        disks
            .filter(|disk| disk.shared().is_some())
            .cloned()
            .collect()
    }

    /// The pod is this node's, for good or ill: its named volumes are, too.
    pub fn keep_volumes(&self) {
        disks::settle_all(&self.facts.dir, &self.disks, &self.node.volumes);
    }

    /// Makes guest memory, all zeros. Pages may be placed in it from now on, also while the VM is being built: a VMM that awaits a
    /// state leaves guest memory alone.
    ///
    /// # Errors
    /// The system has no memory to give.
    pub fn make_memory(&mut self) -> Result<Arc<GuestMemory>, PodError> {
        let memory = boot::memory(&self.facts.vm_spec)?;
        self.memory = Some(Arc::clone(&memory));
        Ok(memory)
    }

    /// Makes the port (in the role Incoming), and starts a VM that awaits its state. Memory must be here, and every image known.
    ///
    /// # Errors
    /// The step that failed; what was built before it stays, for [`IncomingPod::discard`].
    pub async fn build(&mut self) -> Result<(Arc<Vm>, Port), PodError> {
        let name = self.facts.spec.name.as_str();
        let memory = match &self.memory {
            Some(memory) => Arc::clone(memory),
            None => boot::memory(&self.facts.vm_spec)?,
        };
        disks::serve(name, &self.disks)?;
        let (dir, vm) = (&self.facts.dir, &self.facts.vm_spec);
        self.images = images::serve(&self.node, name, dir, vm).await?;
        let (devices, theirs) = boot::make_devices(&self.node, &self.facts)?;
        let res = boot::resources(&self.node, &self.facts, memory, theirs)?;
        let Parts { port, guest } = &mut self.parts;
        let (node, facts) = (&self.node, &self.facts);
        // Side by side: a VMM that awaits a state sends and takes nothing.
        let attached = boot::make_port(node, facts, Role::Incoming, devices, port);
        let started = async {
            let vm = Vm::incoming(&facts.vm_spec, res).await;
            let vm = vm.map_err(|e| PodError::step(name, "start a VM for it", e))?;
            let vm = Arc::new(vm);
            guest.vm = Some(Arc::clone(&vm));
            Ok(vm)
        };
        let (port, vm) = tokio::join!(attached, started);
        let (port, vm) = (port?, vm?);
        Ok((vm, port))
    }

    /// The pod.
    pub fn spec(&self) -> &PodSpec {
        &self.facts.spec
    }

    /// Where its output goes on: install the source's tail before [`IncomingPod::adopt`].
    pub fn logs(&self) -> Arc<LogStore> {
        Arc::clone(&self.facts.logs)
    }

    /// Enters it into the register as a pod that runs here, which the journal must say by now, and attaches
    /// to its agent with the `link` of the source's client, if there is one. With a `migration`, pages of its guest are still to
    /// come in that: it counts as migrating until that ends. Call it after [`IncomingPod::build`].
    ///
    /// # Errors
    /// It was not built: the pod, to be discarded.
    pub fn adopt(
        mut self,
        epoch: Epoch,
        link: Option<AgentState>,
        migration: Option<String>,
    ) -> Result<PodHandle, Box<Self>> {
        let (Some(vm), Some(port)) = (self.parts.guest.vm.take(), self.parts.port.take()) else {
            return Err(Box::new(self));
        };
        self.keep_volumes();
        let resources = Arc::new(PodResources {
            spec: self.facts.spec.clone(),
            vm_spec: self.facts.vm_spec.clone(),
            vm,
            port,
            images: std::mem::take(&mut self.images),
            disks: std::mem::take(&mut self.disks),
            agent: AgentSlot::default(),
            logs: Arc::clone(&self.facts.logs),
        });
        attach_later(&self.node, &resources, link);
        let birth = match migration {
            None => Birth::Running(resources),
            Some(migration) => Birth::Migrating {
                resources,
                migration,
                in_doubt: false,
            },
        };
        Ok(actor::spawn(
            &self.node,
            self.reservation,
            self.facts,
            epoch,
            Some(self.record.containers),
            birth,
        ))
    }

    /// Removes everything.
    ///
    /// # Errors
    /// The folder cannot be removed; VM and port are gone.
    pub async fn discard(self) -> Result<(), PodError> {
        let name = self.facts.spec.name.clone();
        self.parts.undo(&name).await;
        self.disks.iter().for_each(|disk| disk.close());
        super::run::remove_folder(&self.facts.dir).await
    }
}

impl PodRegistry {
    /// Whether an offered pod's name and addresses are free here, for a refusal before anything is made.
    ///
    /// # Errors
    /// What is taken, and by whom.
    pub fn check_free(&self, spec: &PodSpec, limit: u16) -> Result<(), PodError> {
        self.reserve(spec, limit).map(drop)
    }
}
