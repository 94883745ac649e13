//! What the nodes of a routed cluster tell each other: where the pods are. See [`crate::wire`], "Places".

use serde::{Deserialize, Serialize};
use vm_runtime::units::Epoch;

/// A pod, as its node tells of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodPlace {
    /// Its MAC address, which names it.
    pub mac: [u8; 6],
    /// Its IPv4 address.
    pub v4: Option<[u8; 4]>,
    /// Its IPv6 address.
    pub v6: Option<[u8; 16]>,
    /// The epoch in which the node has it.
    pub epoch: Epoch,
}

/// The pods of the node that sends this: all of them, or what has changed since the last one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Places {
    /// Counts up on this connection, from 1.
    pub seq: u64,
    /// The tunnel's network identifier, which must be the same everywhere.
    pub vni: u32,
    /// These are all: what is not here is not there.
    pub whole: bool,
    /// Pods that it has.
    pub here: Vec<PodPlace>,
    /// Pods that it had.
    pub gone: Vec<[u8; 6]>,
}

/// What it says of the pods is done: frames for them take the new way from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacesAck {
    /// The message's.
    pub seq: u64,
}

/// A node that a pod has left asks for end markers: frames behind the last one that the receiver sends the pod by way of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndWanted {
    /// The pod, in the epoch that was granted.
    pub pod: PodPlace,
    /// Name of the node that it was granted to.
    pub at: String,
    /// What the markers are to carry.
    pub nonce: u64,
}
