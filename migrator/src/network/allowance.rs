//! How much may be kept of the packets of pods that are being moved: for each pod, and for the node.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// Bytes of parked packets that are kept at most, with their virtio-net headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParkLimits {
    /// For all pods of the node.
    pub bytes: u64,
    /// For one pod.
    pub bytes_per_pod: u64,
}

/// What is done when more comes for a pod on its way than may be kept.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum OnOverflow {
    /// The migration ends, and the pod gets everything where it is. Once the pod is handed over, packets wait in the kernel's queue.
    #[default]
    Abort,
    /// The newest packets are dropped, and counted.
    Drop,
}

/// Why more has come than may be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Overflow {
    /// The log of this pod, or the logs of all.
    #[error(
        "more packets came for the pod than may be kept while it moves ({} bytes a pod, {} on the node): none is lost; raise `limits.park_bytes_per_pod` \
         or `limits.park_bytes`, move it at a calmer time, or with --on-overflow drop",
        .0.bytes_per_pod, .0.bytes
    )]
    Log(ParkLimits),
    /// The kernel's queue: the service was too slow for what came.
    #[error(
        "the queue of parked packets was full, and {lost} of them are lost: move the pod at a calmer time, or when the node has less to do"
    )]
    Queue {
        /// Frames.
        lost: u64,
    },
}

/// What a node may keep, and does.
#[derive(Debug)]
pub(crate) struct Allowance {
    limits: ParkLimits,
    used: AtomicU64,
}

impl Allowance {
    pub(crate) fn new(limits: ParkLimits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            used: AtomicU64::new(0),
        })
    }

    pub(crate) fn limits(&self) -> ParkLimits {
        self.limits
    }

    /// A pod's part, which is nothing yet.
    pub(crate) fn share(self: &Arc<Self>) -> Share {
        Share {
            of: Arc::clone(self),
            mine: 0,
        }
    }
}

/// One pod's part of what the node keeps. Given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    of: Arc<Allowance>,
    mine: u64,
}

impl Share {
    /// The pod's log has so many bytes now.
    pub(crate) fn set(&mut self, bytes: usize) {
        let bytes = bytes as u64;
        // Wraps around where it shrinks.
        let change = bytes.wrapping_sub(self.mine);
        self.of.used.fetch_add(change, Ordering::Relaxed);
        self.mine = bytes;
    }

    /// Whether one more frame may be kept, however long: so the limit is passed by less than one.
    pub(crate) fn has_room(&self) -> bool {
        let limits = self.of.limits;
        self.mine < limits.bytes_per_pod && self.of.used.load(Ordering::Relaxed) < limits.bytes
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.set(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_bounded_by_its_own_limit_and_by_what_others_keep() {
        let limits = ParkLimits {
            bytes: 100,
            bytes_per_pod: 60,
        };
        let node = Allowance::new(limits);
        let (mut a, mut b) = (node.share(), node.share());
        a.set(59);
        assert!(a.has_room() && b.has_room());
        a.set(60);
        assert!(!a.has_room() && b.has_room());
        b.set(40);
        assert!(!b.has_room(), "the node is full");
        a.set(10);
        assert!(a.has_room() && b.has_room());
        a.set(60);
        drop(a);
        assert!(b.has_room());
        assert_eq!(node.used.load(Ordering::Relaxed), 40);
        drop(b);
        assert_eq!(node.used.load(Ordering::Relaxed), 0);
    }
}
