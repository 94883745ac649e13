//! Between the agent's client and a pod's log.

use std::sync::Arc;

use vm_runtime::agent_client::{self, OutputSink, Stream};

use super::logs::{LogStore, LogStream, StreamKey};
use super::state::unix_ms;
use crate::api::types::{ContainerCondition, ContainerState};

/// Stores the containers' output in the pod's log.
#[derive(Clone, Debug)]
pub struct LogSink {
    log: Arc<LogStore>,
}

impl LogSink {
    /// A sink that writes to `log`.
    pub fn new(log: Arc<LogStore>) -> Self {
        Self { log }
    }
}

fn key(container: &str, stream: Stream) -> StreamKey {
    StreamKey {
        container: container.to_owned(),
        stream: log_stream(stream),
    }
}

impl OutputSink for LogSink {
    fn append(&self, container: &str, stream: Stream, offset: u64, data: &[u8]) {
        let stored = self
            .log
            .append(&key(container, stream), offset, data, unix_ms());
        if let Err(error) = stored {
            // A full disk must not stop the pod: the gap shows in the log's offsets.
            tracing::error!(container, offset, bytes = data.len(), %error, "output is lost");
        }
    }

    fn last_offset(&self, container: &str, stream: Stream) -> u64 {
        self.log.next_offset(&key(container, stream))
    }
}

/// The agent's word for a stream in ours.
pub(crate) fn log_stream(stream: Stream) -> LogStream {
    match stream {
        Stream::Stdout => LogStream::Stdout,
        Stream::Stderr => LogStream::Stderr,
    }
}

/// The agent's word for how a container fares in the API's.
pub(super) fn condition(condition: &agent_client::Condition) -> ContainerCondition {
    ContainerCondition {
        restarts: condition.restarts,
        ready: Some(condition.ready),
        reason: condition.reason.map(|reason| reason.name().to_owned()),
        last_code: condition.last_code,
    }
}

/// The agent's word for a container's state in the API's.
pub(super) fn container_state(state: agent_client::ContainerState) -> ContainerState {
    match state {
        agent_client::ContainerState::Waiting => ContainerState::Waiting,
        agent_client::ContainerState::Running { .. } => ContainerState::Running,
        agent_client::ContainerState::Exited { code } => ContainerState::Exited { code },
    }
}
