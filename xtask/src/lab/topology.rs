//! How the lab's pods are on its network.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::Node;

/// A lab's topology.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum Topology {
    /// Two nodes and a client on one flat layer 2; pods are ports of their node's bridge
    #[default]
    Bridge,
    /// Three nodes; each pod is a route, and the client's packets come to a node that runs none
    Routed,
}

impl Topology {
    /// The lab's nodes.
    pub fn nodes(self) -> &'static [Node] {
        match self {
            Topology::Bridge => &Node::ALL,
            Topology::Routed => &Node::EVERY,
        }
    }

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Topology::Bridge => "bridge",
            Topology::Routed => "routed",
        }
    }

    /// The client's own addresses.
    pub fn client(self) -> [&'static str; 2] {
        match self {
            Topology::Bridge => ["10.77.0.1", "fd77::1"],
            Topology::Routed => ["10.78.0.100", "fd78::100"],
        }
    }
}
