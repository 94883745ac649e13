//! Starting a pod's guest from a template.
//!
//! Up to the guest's new identity everything is undone if a step fails, the template is removed, and the pod boots from its kernel.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::{Instant, timeout};
use vm_runtime::agent_client::{AgentClient, Blob, Identity};
use vm_runtime::memory::GuestMemory;
use vm_runtime::vm::Vm;

use super::boot::{self, BootOrder, Parts};
use super::error::{Cause, PodError};
use super::handle::Facts;
use super::sink::LogSink;
use crate::api::error::chain;
use crate::daemon::node::Node;
use crate::network::Port;
use crate::templates::{Key, TemplateError, shape};

/// What a start from a template may take: many times what it takes under emulation on a busy machine. The rest of the pod's
/// deadline is for the boot that follows if it does not come to anything.
const WITHIN: Duration = Duration::from_secs(20);

/// How many random bytes the guest's kernel gets: twice the key of its generator.
const ENTROPY: usize = 64;

/// Starts the guest from the template of its shape; it is in `parts` then, and has an identity of its own. `None`: there is no such
/// template, or it is of no use, and everything is as before.
pub(super) async fn start(
    node: &Node,
    facts: &Facts,
    order: &BootOrder,
    port: &Port,
    parts: &mut Parts,
) -> Option<AgentClient> {
    if facts.spec.cold_start || !node.templates.is_on() {
        return None;
    }
    let key = Key::new(&node.qemu, &shape(&facts.vm_spec));
    let began = Instant::now();
    let within = WITHIN.min(order.deadline / 2);
    let started = timeout(within, restore(node, facts, order, port, &key, parts)).await;
    let error = match started {
        Ok(Ok(agent)) => {
            if agent.is_some() {
                tracing::info!(
                    pod = facts.spec.name,
                    template = %key,
                    took = ?began.elapsed(),
                    "its guest was started from a template"
                );
                node.templates.used(&key);
            }
            return agent;
        }
        Ok(Err(error)) => chain(&error),
        Err(_) => format!("it took longer than {within:?}"),
    };
    tracing::warn!(
        pod = facts.spec.name,
        template = %key,
        error,
        "the template is of no use and removed; the pod is booted"
    );
    parts.agent = None;
    if let Some(vm) = parts.vm.take()
        && let Err(error) = vm.kill().await
    {
        tracing::error!(pod = facts.spec.name, %error, "cannot end the VM");
    }
    let (templates, key) = (Arc::clone(&node.templates), key);
    let removed = tokio::task::spawn_blocking(move || templates.remove(&key)).await;
    if let Ok(Err(error)) = removed {
        tracing::warn!(error = chain(&error), "the template cannot be removed");
    }
    None
}

async fn restore(
    node: &Node,
    facts: &Facts,
    order: &BootOrder,
    port: &Port,
    key: &Key,
    parts: &mut Parts,
) -> Result<Option<AgentClient>, PodError> {
    let name = facts.spec.name.as_str();
    let fail = |step| move |source: Cause| PodError::step(name, step, source);
    let (templates, wanted) = (Arc::clone(&node.templates), key.clone());
    let opened = blocking(move || templates.start(&wanted)).await;
    let Some(template) = opened.map_err(fail("open the template"))? else {
        return Ok(None);
    };
    let memory = boot::memory(&facts.vm_spec)?;
    let res = boot::resources(node, facts, Arc::clone(&memory), port)?;
    // Side by side: a VMM that awaits a state leaves guest memory alone.
    let filled = blocking({
        let memory: Arc<GuestMemory> = memory;
        move || template.fill(&memory).map(|()| template)
    });
    let mut steps = Steps::begin();
    let filled = async {
        let filled = filled.await;
        (filled, Instant::now())
    };
    let (vm, (filled, filled_at)) = tokio::join!(Vm::incoming(&facts.vm_spec, res), filled);
    steps.add("memory", filled_at);
    steps.passed("VMM");
    let vm = Arc::new(vm.map_err(|e| fail("start a VM for the template")(e.into()))?);
    parts.vm = Some(Arc::clone(&vm));
    let template = filled.map_err(fail("fill its memory"))?;
    vm.load_state(&mut template.state())
        .await
        .map_err(|e| fail("load the template's state")(e.into()))?;
    steps.passed("state");
    vm.cont()
        .await
        .map_err(|e| fail("let its guest run")(e.into()))?;
    let sink = Arc::new(LogSink::new(Arc::clone(&facts.logs)));
    let agent = AgentClient::connect(&vm.agent_socket(), sink, order.deadline)
        .await
        .map_err(|e| fail("reach the agent in its guest")(e.into()))?;
    steps.passed("agent");
    parts.agent = Some(agent.clone());
    let identity = identity(facts).map_err(|e| fail("draw random bytes")(e.into()))?;
    agent
        .identify(identity)
        .await
        .map_err(|e| fail("give its guest an identity")(e.into()))?;
    steps.passed("identity");
    tracing::debug!(pod = name, %steps, "started from a template");
    Ok(Some(agent))
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
