//! Writable disks that move with the pod. From version 3 on.

use serde::{Deserialize, Serialize};

/// A writable disk of the pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskOffer {
    /// Its name, unique in the pod.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// Bytes of it that are in use at the source: the destination must have as many to spare.
    pub allocated: u64,
}

/// Everything of this round of disks, and of those before, is in the destination's files, and durable there. Only then may the next one
/// begin: so what is left to be made durable in the freeze is what was written in the freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskAck {
    /// The round.
    pub round: u32,
}

/// The guest stands still, and this round of its disks was the last. There is no grant before all of it is durable at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DisksDone {
    /// The last round.
    pub round: u32,
    /// Bytes of disks in it, holes included.
    pub bytes: u64,
}
