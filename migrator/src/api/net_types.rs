//! What the API says about the network.

use serde::{Deserialize, Serialize};

use crate::migration::status::Phase;
use crate::network::{FrameHead, NodeFacts, PortFacts};

/// The node that a pod is being moved to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetPeer {
    /// Its name.
    pub node: String,
    /// The migration.
    pub migration: String,
    /// Where that is. From `forwarding` on, or `postcopy`, this node sends it what still comes here for the pod.
    pub phase: Phase,
}

/// `GET /v1/net/NAME`: one pod's network on this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodNet {
    /// The node that answers.
    pub node: String,
    /// Its port.
    #[serde(flatten)]
    pub port: PortFacts,
    /// Where it goes; absent if it is not leaving.
    pub peer: Option<NetPeer>,
}

/// `GET /v1/net`: the node's network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeNet {
    /// The node that answers.
    pub node: String,
    /// Its own part.
    #[serde(flatten)]
    pub facts: NodeFacts,
    /// Its pods, by slot; those that are on their way here, too.
    pub pods: Vec<PodNet>,
}

/// A frame, and what became of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceFrame {
    /// When a program saw it, in microseconds of Unix time.
    pub unix_us: u64,
    /// `in`: for the guest, seen by the gate; `out`: from it, seen by the guard.
    pub direction: String,
    /// The counter that booked it.
    pub counter: String,
    /// `pass`, `park`, `show` (to the service alone) or `drop`.
    pub verdict: String,
    /// The gate's mode.
    pub mode: String,
    /// The gate's epoch.
    pub epoch: u32,
    /// The bucket that keeps its flow in order; frames from the guest have none.
    pub bucket: Option<u8>,
    /// Its length in bytes, before the kernel cuts it into segments.
    pub length: u32,
    /// What it is; absent if it is too short to tell.
    #[serde(flatten)]
    pub head: Option<FrameHead>,
}

/// One line of `GET /v1/net/NAME/trace`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum TraceLine {
    /// The first line: from here on each frame is told.
    Started {
        /// The pod.
        pod: String,
        /// The node that answers.
        node: String,
    },
    /// A frame.
    Frame(Box<TraceFrame>),
    /// Frames that came between the frames told, and were too many to tell.
    Missed {
        /// How many.
        frames: u64,
    },
    /// The last line.
    Ended {
        /// Frames told.
        frames: u64,
        /// Why it is over.
        reason: TraceEnd,
    },
}

/// Why a trace is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TraceEnd {
    /// As many frames as were wanted.
    Count,
    /// The time is up.
    Time,
    /// The pod has left this node.
    PodGone,
    /// The service ends.
    Shutdown,
}
