//! Making a template: a VM of its shape, without a pod, up to the moment in which a pod would become its business.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use vm_runtime::agent_client::{AgentClient, OutputSink, Stream};
use vm_runtime::memory::{GuestMemory, huge_pages_available};
use vm_runtime::spec::VmSpec;
use vm_runtime::units::Bytes;
use vm_runtime::vm::{Vm, VmResources};

use super::store::Template;
use super::{Key, TemplateError};
use crate::daemon::node::Node;
use crate::network::idle_tap;
use crate::pods::plan::{VMM_OVERHEAD, ordinary_and_huge};

/// From the VMM's start to the agent's answer. Under emulation, beside other guests, a boot may take a minute.
const BOOTS_WITHIN: Duration = Duration::from_secs(120);

/// The guest tells what it has freed two seconds later (`PAGE_REPORTING_DELAY`, mm/page_reporting.c): when its memory has not become
/// less for so long, it has told all.
const QUIET: Duration = Duration::from_millis(3_000);
/// How often to look.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// It is saved then, quiet or not: a template that is larger than need be works as well.
const SETTLES_WITHIN: Duration = Duration::from_secs(20);

/// Makes the template of a shape (see [`super::shape`]), in the place of one that is there.
///
/// # Errors
/// The step that failed; nothing is left of it.
pub async fn build(node: &Node, shape: &VmSpec) -> Result<Template, TemplateError> {
    if !node.templates.is_on() {
        return Err(TemplateError::Off);
    }
    let _one = node.templates.building.lock().await;
    check_memory(shape)?;
    let began = Instant::now();
    // Its folder, and nothing else of it, outlives a killed service, which the next one removes.
    let folder = node.templates.unfinished()?;
    let key = Key::new(&node.qemu, shape);
    let vm = start(node, shape, folder.path()).await?;
    let saved = tokio::select! {
        saved = save(&vm) => saved,
        () = node.shutdown.cancelled() => Err(TemplateError::ShuttingDown),
    };
    let state = match saved {
        Ok(state) => state,
        Err(error) => {
            end(&vm).await;
            return Err(error);
        }
    };
    let (templates, memory) = (Arc::clone(&node.templates), vm.memory());
    let shape = shape.clone();
    let qemu = node.qemu.version_text();
    let installed =
        tokio::task::spawn_blocking(move || templates.install(&key, shape, qemu, &memory, &state))
            .await;
    end(&vm).await;
    let made = installed.map_err(|e| TemplateError::step("write the files", e))??;
    tracing::info!(
        template = %made.key,
        pages = made.file.pages,
        took = ?began.elapsed(),
        "template made"
    );
    Ok(made)
}

fn check_memory(shape: &VmSpec) -> Result<(), TemplateError> {
    let (ordinary, huge) = ordinary_and_huge(shape.memory, shape.hugepages);
    let enough = |need: Bytes, available: Bytes| match available < need {
        true => Err(TemplateError::Memory { need, available }),
        false => Ok(()),
    };
    enough(huge, huge_pages_available())?;
    enough(
        Bytes(ordinary.0 + VMM_OVERHEAD.0),
        crate::doctor::available_memory(),
    )
}

async fn start(node: &Node, shape: &VmSpec, dir: &std::path::Path) -> Result<Vm, TemplateError> {
    let memory = match shape.hugepages {
        false => GuestMemory::create(&shape.name, shape.memory),
        true => GuestMemory::create_huge(&shape.name, shape.memory),
    };
    let memory = memory.map_err(|e| TemplateError::step("make the memory", e))?;
    let tap = idle_tap().map_err(|e| TemplateError::step("make the TAP", e))?;
    let resources = VmResources {
        dir: dir.to_owned(),
        memory: Arc::new(memory),
        tap,
        park: None,
        qemu: node.qemu.clone(),
        kernel: node.guest.kernel.clone(),
        initramfs: node.guest.initramfs.clone(),
        disks: Vec::new(),
        rbd: Vec::new(),
    };
    Vm::template(shape, resources)
        .await
        .map_err(|e| TemplateError::step("start the VM", e))
}

/// Waits until the guest is idle, stops it, and gives its device state back.
async fn save(vm: &Vm) -> Result<Vec<u8>, TemplateError> {
    let socket = vm.agent_socket();
    let agent = tokio::select! {
        agent = AgentClient::connect(&socket, Arc::new(Silence), BOOTS_WITHIN) => {
            agent.map_err(|e| TemplateError::step("reach the agent", e))?
        }
        _ = vm.wait_exit() => {
            return Err(TemplateError::step("boot the guest", "its VM has ended"));
        }
    };
    agent
        .settle()
        .await
        .map_err(|e| TemplateError::step("settle the guest", e))?;
    // A pod's client comes with a session of its own. This one ends before the state is saved.
    agent.close();
    drop(agent);
    // Late is no error, see there.
    let _ = timeout(SETTLES_WITHIN, quiet(vm)).await;
    vm.stop()
        .await
        .map_err(|e| TemplateError::step("stop the guest", e))?;
    let mut state = Vec::new();
    vm.save_state(&mut state)
        .await
        .map_err(|e| TemplateError::step("save the device state", e))?;
    Ok(state)
}

/// Ends when guest memory has not become less for a while.
async fn quiet(vm: &Vm) {
    let memory = vm.memory();
    let (mut least, mut since) = (u64::MAX, Instant::now());
    while since.elapsed() < QUIET {
        let now = memory.allocated_pages().unwrap_or_default();
        if now < least {
            (least, since) = (now, Instant::now());
        }
        sleep(LOOK_EVERY).await;
    }
}

async fn end(vm: &Vm) {
    if let Err(error) = vm.kill().await {
        tracing::error!(%error, "cannot end the VM of a template");
    }
}

/// A guest without containers prints nothing.
struct Silence;

impl OutputSink for Silence {
    fn append(&self, _: &str, _: Stream, _: u64, _: &[u8]) {}

    fn last_offset(&self, _: &str, _: Stream) -> u64 {
        0
    }
}
