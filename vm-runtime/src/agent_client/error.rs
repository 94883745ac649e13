//! Why the agent is not reached, or does not do what it is asked.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use guest_agent::protocol::message::Failure;

/// Why there is no connection to a guest's agent.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The VM's socket cannot be reached.
    #[error("cannot reach the agent's socket {path}: does the VM run?")]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The guest does not answer.
    #[error("the guest's agent did not answer within {limit:?}: see the VM's console log")]
    NoAnswer {
        /// How long it was waited for.
        limit: Duration,
    },
    /// The guest speaks another version.
    #[error(
        "the guest's agent speaks another protocol version: restart the pod with this build's initramfs"
    )]
    Version,
}

/// Why a request to the guest failed.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The guest says no.
    #[error("the guest: {}", .0.message)]
    Refused(Failure),
    /// No answer in time.
    #[error("the guest's agent did not answer within {0:?}")]
    NoAnswer(Duration),
    /// The pod is being moved, or its VMM replaced.
    #[error("the pod is being migrated or upgraded: try again when that is over")]
    Detached,
    /// The connection is gone, and the VM with it.
    #[error("the connection to the guest's agent is gone: the VM has ended")]
    Gone,
    /// The request does not fit into a message.
    #[error("the request is too long for the agent's link: {0} bytes")]
    TooLong(usize),
    /// An answer that does not belong to the request.
    #[error("the guest's agent answered something else than was asked")]
    Confused,
}
