//! The records.

use serde::{Deserialize, Serialize};
use vm_runtime::units::Epoch;

use crate::wire::id::MigrationId;
use crate::wire::message::Verdict;

/// One durable change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// The right to run a pod.
    Owner(OwnerRecord),
    /// A migration away from here.
    Source(SourceRecord),
    /// A migration to here. `Owner { resumed: false }` writes the pod's owner record too.
    Destination(DestinationRecord),
}

/// The right to run one pod, as this node knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnerRecord {
    /// The pod.
    pub pod: String,
    /// The highest epoch in which this node had the right.
    pub epoch: Epoch,
    /// Whether it has it now.
    pub state: OwnerState,
}

/// Whether a node may run a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum OwnerState {
    /// It may.
    Owner,
    /// It may not until `to` has said that it never took the grant: the paused VM is kept.
    HandedOver {
        /// The destination node.
        to: String,
        /// The migration.
        migration: MigrationId,
        /// The granted epoch.
        offered: Epoch,
    },
    /// Another node has taken it over.
    Released {
        /// The destination node.
        to: String,
        /// The migration.
        migration: MigrationId,
    },
    /// The pod was stopped here.
    Stopped,
}

/// A migration away from this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceRecord {
    /// The migration.
    pub migration: MigrationId,
    /// The pod.
    pub pod: String,
    /// Name of the destination node.
    pub to: String,
    /// The epoch in which this node runs the guest.
    pub epoch: Epoch,
    /// The epoch that the grant carries.
    pub offered: Epoch,
    /// How far it got.
    pub state: SourceState,
}

/// How far a migration away from here got. Whether the right was given away stands in the pod's [`OwnerRecord`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum SourceState {
    /// Under way.
    Started,
    /// The destination runs the guest, and nothing is left here.
    Completed,
    /// It did not take place.
    Failed {
        /// Why.
        reason: String,
    },
}

/// A migration to this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DestinationRecord {
    /// The migration.
    pub migration: MigrationId,
    /// The pod; empty for a migration that was asked about and never offered.
    pub pod: String,
    /// Name of the source node.
    pub from: String,
    /// The offered epoch.
    pub epoch: Epoch,
    /// How far it got.
    pub state: DestinationState,
}

/// How far a migration to here got.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum DestinationState {
    /// Resources are being taken; no grant.
    Prepared,
    /// The grant came: this node runs the guest.
    Owner {
        /// Whether the guest was seen running after the grant.
        resumed: bool,
    },
    /// As `Owner`, and the source has released everything.
    Settled,
    /// No grant came, and none will be taken.
    Discarded {
        /// Why.
        reason: String,
    },
}

impl DestinationRecord {
    /// What the source is told; `None` while it is not decided.
    pub fn verdict(&self) -> Option<Verdict> {
        match self.state {
            DestinationState::Prepared => None,
            DestinationState::Owner { .. } | DestinationState::Settled => Some(Verdict::Running),
            DestinationState::Discarded { .. } => Some(Verdict::Discarded),
        }
    }

    /// Whether losing the record changes no answer: an unknown migration is answered with Discarded as well.
    pub fn is_forgettable(&self) -> bool {
        match self.state {
            DestinationState::Prepared | DestinationState::Owner { .. } => false,
            DestinationState::Settled | DestinationState::Discarded { .. } => true,
        }
    }

    /// The owner record that follows from the grant.
    pub fn owner(&self) -> OwnerRecord {
        OwnerRecord {
            pod: self.pod.clone(),
            epoch: self.epoch,
            state: OwnerState::Owner,
        }
    }
}
