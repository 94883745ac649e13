//! Starting a pod's guest from a template.
//!
//! Up to the guest's new identity everything is undone if a step fails, and the pod boots from its kernel. The template is removed if it
//! is to blame: it is damaged, or its guest dies or answers otherwise than it should. One that takes too long may do so because the node
//! is busy, and is removed only if that happens again and again.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use vm_runtime::agent_client::{AgentClient, Beginning, Blob, Configuration, Identity};
use vm_runtime::memory::GuestMemory;
use vm_runtime::vm::Vm;

use super::boot::{self, BootOrder, Guest};
use super::error::{Cause, PodError};
use super::handle::Facts;
use super::sink::LogSink;
use crate::api::error::chain;
use crate::daemon::node::Node;
use crate::network::ExistingDevices;
use crate::templates::{Key, Opened, TemplateError, shape};

/// What a start from a template may take: many times what it takes under emulation on a busy machine. The rest of the pod's
/// deadline is for the boot that follows if it does not come to anything.
const WITHIN: Duration = Duration::from_secs(20);

/// How many random bytes the guest's kernel gets: twice the key of its generator.
const ENTROPY: usize = 64;

/// A start from a template that has begun: guest memory is being filled.
pub(super) struct Filling {
    key: Key,
    steps: Steps,
    memory: Arc<GuestMemory>,
    filled: JoinHandle<Result<(Opened, Instant), TemplateError>>,
}

/// Why a start from a template comes to nothing.
enum Failure {
    /// The template is of no use.
    Template(PodError),
    /// A boot would fare no better, or the next start from it may.
    Node(PodError),
    /// It took longer than this.
    Slow(Duration),
}

/// Begins to start a guest from the template of its shape, with what needs neither network nor disks. `None`: there is no such template,
/// or it is of no use, or it is not wanted.
pub(super) async fn begin(node: &Node, facts: &Facts) -> Option<Filling> {
    if facts.spec.cold_start || !node.templates.is_on() {
        return None;
    }
    let key = Key::new(&node.qemu, &shape(&facts.vm_spec));
    let steps = Steps::begin();
    let (templates, wanted) = (Arc::clone(&node.templates), key.clone());
    let opened = blocking(move || templates.start(&wanted)).await;
    let template = match opened {
        Ok(template) => template?,
        Err(error) => {
            let error = PodError::step(&facts.spec.name, "open the template", error);
            give_up(node, facts, &key, Failure::Template(error)).await;
            return None;
        }
    };
    // The boot would say why there is none.
    let memory = boot::memory(&facts.vm_spec).ok()?;
    let filled = tokio::task::spawn_blocking({
        let memory = Arc::clone(&memory);
        move || {
            template.fill(&memory)?;
            Ok((template, Instant::now()))
        }
    });
    Some(Filling {
        key,
        steps,
        memory,
        filled,
    })
}

/// Starts the guest; it is in `guest` then, has an identity of its own, and was asked to start its containers. `None`: it does not start,
/// and everything is as before.
pub(super) async fn start(
    node: &Node,
    facts: &Facts,
    order: &BootOrder,
    network: (&ExistingDevices, oneshot::Receiver<()>),
    filling: Filling,
    guest: &mut Guest,
) -> Option<(AgentClient, Beginning)> {
    let (key, began) = (filling.key.clone(), filling.steps.began);
    let within = WITHIN.min(order.deadline / 2);
    let restored = timeout(within, restore(node, facts, order, network, filling, guest)).await;
    let failure = match restored {
        Ok(Ok(started)) => {
            tracing::info!(
                pod = facts.spec.name,
                template = %key,
                took = ?began.elapsed(),
                "its guest was started from a template"
            );
            node.templates.used(&key);
            return Some(started);
        }
        Ok(Err(failure)) => failure,
        Err(_) => Failure::Slow(within),
    };
    guest.agent = None;
    if let Some(vm) = guest.vm.take()
        && let Err(error) = vm.kill().await
    {
        tracing::error!(pod = facts.spec.name, %error, "cannot end the VM");
    }
    give_up(node, facts, &key, failure).await;
    None
}

/// Says that the pod is booted, and removes the template if it is to blame.
async fn give_up(node: &Node, facts: &Facts, key: &Key, failure: Failure) {
    let (error, useless) = match failure {
        Failure::Template(error) => (chain(&error), true),
        Failure::Node(error) => (chain(&error), false),
        Failure::Slow(within) => {
            let error = format!("it took longer than {within:?}");
            (error, node.templates.late(key))
        }
    };
    let pod = facts.spec.name.as_str();
    if !useless {
        tracing::warn!(pod, template = %key, error, "no start from the template; the pod is booted");
        return;
    }
    tracing::warn!(
        pod,
        template = %key,
        error,
        "the template is of no use and removed; the pod is booted"
    );
    let (templates, key) = (Arc::clone(&node.templates), key.clone());
    if let Err(error) = blocking(move || templates.remove(&key)).await {
        tracing::warn!(error = chain(&*error), "the template cannot be removed");
    }
}

async fn restore(
    node: &Node,
    facts: &Facts,
    order: &BootOrder,
    (devices, attached): (&ExistingDevices, oneshot::Receiver<()>),
    filling: Filling,
    guest: &mut Guest,
) -> Result<(AgentClient, Beginning), Failure> {
    let name = facts.spec.name.as_str();
    let fail = |step| move |source: Cause| Failure::Template(PodError::step(name, step, source));
    let Filling {
        mut steps,
        memory,
        filled,
        ..
    } = filling;
    let devices = devices.try_clone();
    let devices = devices.map_err(|e| PodError::step(name, "share its TAP with the VMM", e));
    let devices = devices.map_err(Failure::Node)?;
    let res = boot::resources(node, facts, memory, devices).map_err(Failure::Node)?;
    // Side by side: a VMM that awaits a state leaves guest memory alone.
    let (vm, filled) = tokio::join!(Vm::incoming(&facts.vm_spec, res), filled);
    let vm = vm.map_err(|e| PodError::step(name, "start a VM for the template", e));
    let vm = Arc::new(vm.map_err(Failure::Node)?);
    guest.vm = Some(Arc::clone(&vm));
    let filled = filled.map_err(|e| PodError::step(name, "fill its memory", e));
    let filled = filled.map_err(Failure::Node)?;
    let (template, filled_at) = filled.map_err(|e| fail("fill its memory")(e.into()))?;
    steps.add("memory", filled_at);
    steps.passed("VMM");
    vm.load_state(&mut template.state())
        .await
        .map_err(|e| fail("load the template's state")(e.into()))?;
    vm.announce_disks()
        .await
        .map_err(|e| fail("tell its guest of its disks")(e.into()))?;
    steps.passed("state");
    let attached = attached.await;
    attached.map_err(|e| Failure::Node(PodError::step(name, "wait for its network port", e)))?;
    steps.passed("port");
    vm.cont()
        .await
        .map_err(|e| fail("let its guest run")(e.into()))?;
    let woken = tokio::select! {
        woken = wake(facts, order, &vm, guest, &mut steps) => woken,
        exit = vm.wait_exit() => Err(boot::death(exit.ok().as_ref(), &facts.dir).into()),
    };
    let woken = woken.map_err(fail("wake its guest"))?;
    tracing::debug!(pod = name, %steps, "started from a template");
    Ok(woken)
}

/// From a guest that runs to one with an identity of its own, which begins with its containers.
async fn wake(
    facts: &Facts,
    order: &BootOrder,
    vm: &Vm,
    guest: &mut Guest,
    steps: &mut Steps,
) -> Result<(AgentClient, Beginning), Cause> {
    let identity = identity(facts)?;
    let sink = Arc::new(LogSink::new(Arc::clone(&facts.logs)));
    let agent = AgentClient::connect(&vm.agent_socket(), sink, order.deadline).await?;
    steps.passed("agent");
    guest.agent = Some(agent.clone());
    let configuration = Configuration::clone(&order.configuration);
    let mut beginning = agent.begin(Some(identity), configuration)?;
    beginning.identified().await?;
    steps.passed("identity");
    Ok((agent, beginning))
}

/// When each step was done, in milliseconds from the first one's begin.
struct Steps {
    began: Instant,
    text: String,
}

impl Steps {
    fn begin() -> Self {
        Self {
            began: Instant::now(),
            text: String::new(),
        }
    }

    fn passed(&mut self, step: &str) {
        self.add(step, Instant::now());
    }

    fn add(&mut self, step: &str, at: Instant) {
        let ms = at.duration_since(self.began).as_secs_f64() * 1e3;
        if !self.text.is_empty() {
            self.text.push_str(", ");
        }
        self.text.push_str(&format!("{step} {ms:.0}"));
    }
}

impl fmt::Display for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

fn identity(facts: &Facts) -> std::io::Result<Identity> {
    use std::io::Read;
    let mut entropy = vec![0; ENTROPY];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut entropy)?;
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    Ok(Identity {
        entropy: Blob(entropy),
        unix_ns: u64::try_from(since.unwrap_or_default().as_nanos()).unwrap_or(u64::MAX),
        uuid: facts.vm_spec.uuid.clone(),
        old_mac: crate::templates::MAC.0,
        mac: facts.vm_spec.mac.0,
    })
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, TemplateError> + Send + 'static,
) -> Result<T, Cause> {
    Ok(tokio::task::spawn_blocking(work).await??)
}
