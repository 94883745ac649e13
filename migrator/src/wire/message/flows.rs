//! Entries of connection tracking that move with the pod, from version 2 on, and flows of it that another node translates, from version 3 on.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::wire::codec::DecodeError;

/// A message that is nothing but bytes, which others read.
macro_rules! opaque {
    ($($name:ident)*) => {$(
        impl $name {
            pub(super) fn head(&self, _out: &mut Vec<u8>) {}

            pub(super) fn tail(&self) -> &[u8] {
                &self.0
            }

            pub(super) fn parse(payload: Bytes) -> Result<Self, DecodeError> {
                Ok(Self(payload))
            }
        }
    )*};
}

opaque!(Flows Bound);

/// Some of the pod's flows, as connection tracking has them. Opaque here, raw on the wire: a list in postcard of
/// [`crate::network::conntrack::Flow`], which whoever takes it checks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flows(pub Bytes);

impl Flows {
    /// Flows that one frame holds: none is longer than 250 bytes, and the urgent lane's frames are of 128 KiB.
    pub const MAX: usize = 256;
}

/// What became of the flows at the destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowsTaken {
    /// Entries that are there.
    pub moved: u64,
    /// Entries that its kernel refused.
    pub failed: u64,
    /// Entries that were not made because it does not track connections.
    pub untracked: u64,
}

/// Some of the pod's flows that the source, or a node before it, goes on translating. Opaque here, raw on the wire: a list in postcard of
/// [`crate::network::conntrack::Bound`], which whoever takes it checks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bound(pub Bytes);

impl Bound {
    /// Flows that one frame holds: none is longer than 70 bytes.
    pub const MAX: usize = 1024;
}

/// What became of the bound flows at the destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoundTaken {
    /// Flows that it leads to the nodes that translate them.
    pub served: u64,
    /// Flows that it does not, and that break.
    pub unserved: u64,
}
