//! What travels in [`Handover::agent`](crate::wire::message::Handover::agent): the link to the guest's
//! agent, and the end of the containers' output.

use serde::{Deserialize, Serialize};
use vm_runtime::agent_client::AgentState;

/// Bytes of each pod's logs that move with it.
pub(super) const LOG_TAIL: u64 = 256 << 10;

/// The blob, in postcard: at most a frame of the control connection.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Handoff {
    /// Where the agent's link stands; absent when the source had none.
    pub(super) agent: Option<AgentState>,
    /// The end of the logs.
    pub(super) logs: Vec<u8>,
}

impl Handoff {
    pub(super) fn encode(&self) -> Result<Vec<u8>, String> {
        postcard::to_stdvec(self)
            .map_err(|error| format!("cannot encode the agent's state: {error}"))
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        postcard::from_bytes(bytes)
            .map_err(|error| format!("the source sent an agent state that cannot be read: {error}"))
    }
}
