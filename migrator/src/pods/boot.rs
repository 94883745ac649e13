//! Building a pod's parts, one after the other, and taking them down in reverse when one fails.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;
use vm_runtime::agent_client::{AgentClient, Beginning, Configuration};
use vm_runtime::memory::{GuestMemory, huge_pages_available};
use vm_runtime::pod::PodSpec;
use vm_runtime::spec::VmSpec;
use vm_runtime::units::{Bytes, Epoch};
use vm_runtime::vm::{Vm, VmExit, VmResources};

use super::agent::AgentSlot;
use super::console;
use super::disks::{self, Origin, PodDisk};
use super::error::PodError;
use super::handle::{Facts, PodResources};
use super::images::{self, PodImage};
use super::plan::{VMM_OVERHEAD, ordinary_and_huge};
use super::sink::LogSink;
use super::warm;
use crate::daemon::node::Node;
use crate::network::{ExistingDevices, NewDevices, PodNetId, Port, Role};
use crate::templates::make_later;

/// What a boot needs beside the pod's facts.
#[derive(Debug)]
pub(super) struct BootOrder {
    pub(super) configuration: Box<Configuration>,
    pub(super) images: Vec<Arc<PodImage>>,
    /// Already made.
    pub(super) disks: Vec<Arc<PodDisk>>,
    /// From the VMM's start to the last container's.
    pub(super) deadline: Duration,
}

/// What has been built so far. Port and guest are built side by side.
#[derive(Debug, Default)]
pub(super) struct Parts {
    pub(super) port: Option<Port>,
    pub(super) guest: Guest,
}

/// What has been built so far of a guest, in the order of the steps.
#[derive(Debug, Default)]
pub(super) struct Guest {
    pub(super) vm: Option<Arc<Vm>>,
    pub(super) agent: Option<AgentClient>,
}

impl Parts {
    /// Takes everything down again, in reverse. What cannot be removed is logged: there is nobody
    /// left to ask.
    pub(super) async fn undo(self, pod: &str) {
        let Self { port, guest } = self;
        let Guest { vm, agent } = guest;
        drop(agent);
        if let Some(vm) = vm
            && let Err(error) = vm.kill().await
        {
            tracing::error!(pod, %error, "cannot end the VM");
        }
        if let Some(port) = port
            && let Err(error) = port.discard().await
        {
            tracing::error!(pod, %error, "cannot remove the network port");
        }
    }
}

/// Starts a pod's guest, from a template if there is one of its shape, and its containers; what was built is in `parts` at any moment.
///
/// # Errors
/// The step that failed; the caller takes `parts` down.
pub(super) async fn boot(
    node: &Arc<Node>,
    facts: &Facts,
    order: &BootOrder,
    epoch: Epoch,
    parts: &mut Parts,
) -> Result<PodResources, PodError> {
    let name = facts.spec.name.as_str();
    let until = Instant::now() + order.deadline;
    let _starting = node.supply.starting();
    let filling = warm::begin(node, facts).await;
    disks::serve(name, &order.disks)?;
    let (devices, theirs) = make_devices(node, facts)?;
    let Parts { port, guest } = parts;
    // Side by side: a VMM that awaits a state sends and takes nothing.
    let (done, ready) = oneshot::channel();
    let attached = async {
        let port = make_port(node, facts, Role::Local, devices, port).await?;
        // Its first packets may be answered from anywhere.
        port.claim(epoch)
            .map_err(|e| PodError::step(name, "tell other nodes of it", e))?;
        // Who boots does not wait for it.
        let _ = done.send(());
        Ok::<Port, PodError>(port)
    };
    let warm = async {
        let filling = filling?;
        warm::start(node, facts, order, (&theirs, ready), filling, guest).await
    };
    let (port, warm) = tokio::join!(attached, warm);
    let port = port?;
    let vm = match &guest.vm {
        Some(vm) => Arc::clone(vm),
        None => {
            let memory = memory(&facts.vm_spec)?;
            let res = resources(node, facts, memory, theirs)?;
            let vm = Vm::boot(&facts.vm_spec, res)
                .await
                .map_err(|e| PodError::step(name, "start its VM", e))?;
            let vm = Arc::new(vm);
            guest.vm = Some(Arc::clone(&vm));
            vm
        }
    };
    let is_cold = warm.is_none();
    let start = start_containers(facts, &vm, warm, order, guest);
    let started = tokio::select! {
        started = tokio::time::timeout_at(until, start) => started,
        exit = vm.wait_exit() => return Err(PodError::Died {
            pod: name.to_owned(),
            reason: death(exit.ok().as_ref(), &facts.dir),
        }),
    };
    let agent = match started {
        Ok(agent) => agent?,
        Err(_) => {
            return Err(PodError::Slow {
                pod: name.to_owned(),
                seconds: order.deadline.as_secs(),
                console: console::last_lines(&facts.dir),
            });
        }
    };
    if is_cold && !facts.spec.cold_start {
        make_later(node, &facts.vm_spec);
    }
    Ok(PodResources {
        spec: facts.spec.clone(),
        vm_spec: facts.vm_spec.clone(),
        vm,
        port,
        images: order.images.clone(),
        disks: order.disks.clone(),
        agent: AgentSlot::with(agent),
        logs: Arc::clone(&facts.logs),
    })
}

/// Configures the guest and starts its containers; a guest that was started from a template was asked to already.
async fn start_containers(
    facts: &Facts,
    vm: &Vm,
    warm: Option<(AgentClient, Beginning)>,
    order: &BootOrder,
    guest: &mut Guest,
) -> Result<AgentClient, PodError> {
    let name = facts.spec.name.as_str();
    let (agent, mut beginning) = match warm {
        Some(warm) => warm,
        None => {
            let sink = Arc::new(LogSink::new(Arc::clone(&facts.logs)));
            let agent = AgentClient::connect(&vm.agent_socket(), sink, order.deadline)
                .await
                .map_err(|e| PodError::step(name, "reach the agent in its guest", e))?;
            let beginning = agent
                .begin(None, Configuration::clone(&order.configuration))
                .map_err(|e| PodError::step(name, "configure its guest", e))?;
            (agent, beginning)
        }
    };
    guest.agent = Some(agent.clone());
    beginning
        .configured()
        .await
        .map_err(|e| PodError::step(name, "configure its guest", e))?;
    tracing::debug!(pod = name, "configured");
    beginning
        .started()
        .await
        .map_err(|e| PodError::step(name, "start its containers", e))?;
    Ok(agent)
}

/// Makes guest memory, which is a hole all over.
pub(super) fn memory(spec: &VmSpec) -> Result<Arc<GuestMemory>, PodError> {
    let name = spec.name.as_str();
    let memory = match spec.hugepages {
        false => GuestMemory::create(name, spec.memory),
        true => GuestMemory::create_huge(name, spec.memory),
    };
    let memory = memory.map_err(|e| PodError::step(name, "make its memory", e))?;
    Ok(Arc::new(memory))
}

/// Makes the devices of a pod's port, and gives what its VMM is to have of them.
pub(super) fn make_devices(
    node: &Node,
    facts: &Facts,
) -> Result<(NewDevices, ExistingDevices), PodError> {
    let devices = node.network.make_devices(facts.slot);
    let devices =
        devices.map_err(|e| PodError::step(&facts.spec.name, "make its network devices", e))?;
    let theirs = devices.share();
    let theirs =
        theirs.map_err(|e| PodError::step(&facts.spec.name, "share its TAP with the VMM", e))?;
    Ok((devices, theirs))
}

/// Makes the port, for devices that its VMM may have by now; nothing comes to them, or from them, before that.
pub(super) async fn make_port(
    node: &Node,
    facts: &Facts,
    role: Role,
    devices: NewDevices,
    made: &mut Option<Port>,
) -> Result<Port, PodError> {
    let port = node
        .network
        .attach_new(&net_id(&facts.spec), role, devices)
        .await
        .map_err(|e| PodError::step(&facts.spec.name, "make its network port", e))?;
    *made = Some(port.clone());
    Ok(port)
}

/// Gathers what the VMM needs.
pub(super) fn resources(
    node: &Node,
    facts: &Facts,
    memory: Arc<GuestMemory>,
    devices: ExistingDevices,
) -> Result<VmResources, PodError> {
    let name = facts.spec.name.as_str();
    Ok(VmResources {
        dir: facts.dir.clone(),
        memory,
        tap: devices.tap,
        park: Some(devices.park),
        qemu: node.qemu.clone(),
        kernel: node.guest.kernel.clone(),
        initramfs: node.guest.initramfs.clone(),
        disks: sockets(&facts.dir, &facts.vm_spec),
        rbd: node
            .storage
            .rbd_images(&facts.vm_spec)
            .map_err(|e| PodError::step(name, "find its disks", e))?,
    })
}

/// The descriptors of a running VM's port.
pub(super) fn existing(vm: &Vm) -> std::io::Result<ExistingDevices> {
    let park = vm.park()?;
    Ok(ExistingDevices {
        tap: vm.tap()?,
        park: park.ok_or_else(|| std::io::Error::other("the VMM holds no park"))?,
    })
}

/// Opens or makes a pod's disks, off the runtime's threads.
///
/// # Errors
/// As [`disks::open`].
pub(super) async fn open_disks(
    node: &Node,
    facts: &Facts,
    origin: Origin,
) -> Result<Vec<Arc<PodDisk>>, PodError> {
    let (spec, vm) = (facts.spec.clone(), facts.vm_spec.clone());
    let (dir, volumes) = (facts.dir.clone(), node.volumes.clone());
    let storage = Arc::clone(&node.storage);
    tokio::task::spawn_blocking(move || disks::open(&spec, &vm, &dir, &volumes, &storage, origin))
        .await
        .map_err(|e| PodError::step(&facts.spec.name, "open its disks", e))?
}

/// A pod as the network knows it.
pub(super) fn net_id(spec: &PodSpec) -> PodNetId {
    PodNetId {
        name: spec.name.clone(),
        mac: spec.net.mac,
        v4: spec.net.ipv4.map(|(address, _)| address),
        v6: spec.net.ipv6.map(|(address, _)| address),
    }
}

/// Where the VMM finds its images and its disks.
pub(super) fn sockets(dir: &Path, vm: &VmSpec) -> Vec<PathBuf> {
    let images = images::sockets(dir, vm);
    images.chain(disks::sockets(dir, vm)).collect()
}

/// Refuses a pod that this node has no memory for.
///
/// # Errors
/// [`PodError::Memory`], [`PodError::HugePages`].
pub(super) fn check_memory(spec: &PodSpec) -> Result<(), PodError> {
    let (ordinary, huge) = ordinary_and_huge(spec.memory, spec.hugepages);
    let available = huge_pages_available();
    if available < huge {
        return Err(PodError::HugePages {
            pod: spec.name.clone(),
            need: huge,
            available,
        });
    }
    check_available(&spec.name, Bytes(ordinary.0 + VMM_OVERHEAD.0))
}

/// Refuses what this node has not so much memory for.
///
/// # Errors
/// [`PodError::Memory`].
pub(super) fn check_available(pod: &str, need: Bytes) -> Result<(), PodError> {
    let available = crate::doctor::available_memory();
    if available < need {
        return Err(PodError::Memory {
            pod: pod.to_owned(),
            need,
            available,
        });
    }
    Ok(())
}

/// Why a VM is gone, in the words of the VMM and of the guest.
pub(super) fn death(exit: Option<&VmExit>, dir: &Path) -> String {
    let mut text = match exit {
        Some(VmExit {
            reason: Some(reason),
            ..
        }) => reason.clone(),
        Some(VmExit {
            status: Some(status),
            ..
        }) => format!("the VMM ended with {status}"),
        Some(_) | None => "the VMM is gone".to_owned(),
    };
    let console = console::last_lines(dir);
    if !console.is_empty() {
        text.push_str("; its console ends with: ");
        text.push_str(&console);
    }
    text
}
