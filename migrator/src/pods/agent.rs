//! A pod's way to the agent in its guest, which may not be there yet: a guest that stands still does not
//! answer, and a service that was restarted does not wait for it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use vm_runtime::agent_client::{AgentClient, AgentState};

use super::handle::PodResources;
use super::sink::LogSink;
use crate::api::error::chain;
use crate::daemon::node::Node;

/// How long one attempt to reach an agent lasts.
const ATTEMPT: Duration = Duration::from_secs(30);

/// Where a pod's agent client is kept.
#[derive(Debug, Default)]
pub struct AgentSlot {
    client: watch::Sender<Option<AgentClient>>,
}

impl AgentSlot {
    /// A slot with a client.
    pub fn with(client: AgentClient) -> Self {
        Self {
            client: watch::Sender::new(Some(client)),
        }
    }

    /// The client, once the agent has answered.
    pub fn get(&self) -> Option<AgentClient> {
        self.client.borrow().clone()
    }

    /// The client, or the wait for it.
    pub async fn wait(&self, limit: Duration) -> Option<AgentClient> {
        let mut client = self.client.subscribe();
        let found = tokio::time::timeout(limit, client.wait_for(Option::is_some));
        found.await.ok()?.ok()?.clone()
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Option<AgentClient>> {
        self.client.subscribe()
    }
}

/// Attaches to the agent as soon as it answers: with the `state` of another node's client, or afresh.
/// After a move the guest's clock is set. Gives up only when the VM or the service ends.
pub(super) fn attach_later(
    node: &Arc<Node>,
    resources: &Arc<PodResources>,
    state: Option<AgentState>,
) {
    let resources = Arc::clone(resources);
    let shutdown = node.shutdown.clone();
    node.tasks.spawn(async move {
        let name = resources.spec.name.as_str();
        let attach = async {
            loop {
                match attempt(&resources, state.clone()).await {
                    Ok(client) => return client,
                    Err(error) => tracing::debug!(pod = name, error, "the agent does not answer"),
                }
            }
        };
        tokio::select! {
            client = attach => {
                resources.agent.client.send_replace(Some(client.clone()));
                if state.is_some()
                    && let Err(error) = client.set_clock(SystemTime::now()).await
                {
                    tracing::warn!(pod = name, error = chain(&error), "cannot set the guest's clock");
                }
            }
            _ = resources.vm.wait_exit() => {}
            () = shutdown.cancelled() => {}
        }
    });
}

async fn attempt(
    resources: &PodResources,
    state: Option<AgentState>,
) -> Result<AgentClient, String> {
    let socket = resources.vm.agent_socket();
    let sink = Arc::new(LogSink::new(Arc::clone(&resources.logs)));
    match state {
        Some(state) => AgentClient::resume(&socket, sink, state, ATTEMPT).await,
        None => AgentClient::connect(&socket, sink, ATTEMPT).await,
    }
    .map_err(|e| chain(&e))
}
