//! Whose a volume of a shared class is. Pure.
//!
//! The record is on the shared storage itself, and changes hands one reader and writer at a time (under the class's lock):
//!
//! ```text
//!             take (New)                    take (Owned), after the grant           give_back
//!   nobody ──────────────▶ a, web, epoch 4 ──────────────────────────▶ b, web, epoch 5 ──────────▶ nobody
//!                               │   ▲ take (Owned): a's service was restarted
//!                               └───┘
//! ```
//!
//! A node takes what its journal says is its own: epochs grow with each grant, so an owner that was left behind finds a higher one.

use serde::{Deserialize, Serialize};
use vm_runtime::units::Epoch;

/// Who has a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The node.
    pub node: String,
    /// Its pod.
    pub pod: String,
    /// The epoch in which that node has the right to run the pod.
    pub epoch: Epoch,
}

/// What is kept of a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Who has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<Holder>,
    /// From whom it was taken by force last: that one does not get it back in the same epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub barred: Option<Holder>,
    /// Whether it ends with its pod.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ephemeral: bool,
}

/// With what right a volume is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Take {
    /// For a pod that begins here.
    New,
    /// For a pod that this node's journal says is its own: it runs here, or was just granted.
    Owned,
}

/// Why a volume is not to be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Another pod has it.
    #[error("pod `{}` on node {} has it", .0.pod, .0.node)]
    Held(Holder),
    /// It was taken from this very pod by force.
    #[error(
        "it was released by force while pod `{}` of node {} had it, and may have changed since: stop this pod",
        .0.pod,
        .0.node
    )]
    Barred(Holder),
}

impl Record {
    /// Takes it, or leaves it as it is. True if the record has to be written.
    ///
    /// # Errors
    /// Another has it, or it was taken away from this one.
    pub fn take(&mut self, me: &Holder, right: Take) -> Result<bool, Refused> {
        if let Some(barred) = &self.barred
            && right == Take::Owned
            && barred.is_pod_of(me)
            && barred.epoch >= me.epoch
        {
            return Err(Refused::Barred(barred.clone()));
        }
        let free = match (&self.holder, right) {
            (None, _) => true,
            (Some(holder), Take::New) => holder.is_pod_of(me) && holder.epoch <= me.epoch,
            (Some(holder), Take::Owned) => {
                holder == me || holder.pod == me.pod && holder.epoch < me.epoch
            }
        };
        match (free, &self.holder) {
            (false, Some(holder)) => Err(Refused::Held(holder.clone())),
            (true, Some(holder)) if holder == me => Ok(false),
            (true, _) | (false, None) => {
                self.holder = Some(me.clone());
                Ok(true)
            }
        }
    }

    /// Gives up what this pod has of it. True if the record has to be written; false if another has it by now, or nobody.
    pub fn give_back(&mut self, me: &Holder) -> bool {
        let mine = self
            .holder
            .as_ref()
            .is_some_and(|holder| holder.is_pod_of(me) && holder.epoch <= me.epoch);
        if mine {
            self.holder = None;
        }
        mine
    }

    /// The source notes that the destination has it, should that one not have come to it. True if the record has to be written.
    pub fn hand_over(&mut self, me: &Holder, to: &Holder) -> bool {
        let mine = self
            .holder
            .as_ref()
            .is_some_and(|holder| holder.is_pod_of(me) && holder.epoch < to.epoch);
        if mine {
            self.holder = Some(to.clone());
        }
        mine
    }

    /// An operator takes it from who has it, and says by that that this one runs no more.
    pub fn release_by_force(&mut self) -> Option<Holder> {
        let holder = self.holder.take()?;
        self.barred = Some(holder.clone());
        Some(holder)
    }

    /// Whether a source may offer it, in the epoch before `offered`.
    ///
    /// # Errors
    /// Who has it instead.
    pub fn check_offered(&self, from: &str, pod: &str, offered: Epoch) -> Result<(), String> {
        match &self.holder {
            Some(holder) if holder.node == from && holder.pod == pod && holder.epoch < offered => {
                Ok(())
            }
            Some(Holder { node, pod, epoch }) => {
                Err(format!("pod `{pod}` on node {node} has it (epoch {epoch})"))
            }
            None => Err("nobody has it".to_owned()),
        }
    }
}

impl Holder {
    fn is_pod_of(&self, other: &Holder) -> bool {
        self.node == other.node && self.pod == other.pod
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn holder(node: &str, pod: &str, epoch: u64) -> Holder {
        Holder {
            node: node.to_owned(),
            pod: pod.to_owned(),
            epoch: Epoch(epoch),
        }
    }

    fn held(holder: Holder) -> Record {
        Record {
            holder: Some(holder),
            ..Record::default()
        }
    }

    #[test]
    fn a_volume_is_one_pods_at_a_time() {
        let mut record = Record::default();
        assert_eq!(record.take(&holder("a", "db", 1), Take::New), Ok(true));
        for other in [holder("b", "db", 7), holder("a", "web", 7)] {
            let refused = record.take(&other, Take::New).unwrap_err();
            assert_eq!(refused, Refused::Held(holder("a", "db", 1)));
        }
        // The same pod, run again after its node has lost power, and its service, restarted.
        assert_eq!(record.take(&holder("a", "db", 2), Take::New), Ok(true));
        assert_eq!(record.take(&holder("a", "db", 2), Take::Owned), Ok(false));
        assert!(record.give_back(&holder("a", "db", 2)));
        assert_eq!(record, Record::default());
        assert!(!record.give_back(&holder("a", "db", 2)));
    }

    #[test]
    fn it_changes_hands_at_the_grant_and_the_source_is_late_from_then_on() {
        let (source, destination) = (holder("a", "db", 4), holder("b", "db", 5));
        let mut record = held(source.clone());
        assert_eq!(record.check_offered("a", "db", Epoch(5)), Ok(()));
        assert!(record.check_offered("c", "db", Epoch(5)).is_err());
        assert!(record.check_offered("a", "db", Epoch(4)).is_err());
        assert_eq!(record.take(&destination, Take::Owned), Ok(true));
        assert!(!record.hand_over(&source, &destination));
        assert!(!record.give_back(&source));
        assert!(record.take(&source, Take::Owned).is_err());
        assert_eq!(record.holder, Some(destination.clone()));
        // Or the source notes it, because the destination could not.
        let mut record = held(source.clone());
        assert!(record.hand_over(&source, &destination));
        assert_eq!(record.take(&destination, Take::Owned), Ok(false));
    }

    #[test]
    fn who_lost_it_by_force_does_not_get_it_back() {
        let lost = holder("a", "db", 4);
        let mut record = held(lost.clone());
        assert_eq!(record.release_by_force(), Some(lost.clone()));
        let refused = record.take(&lost, Take::Owned).unwrap_err();
        assert!(matches!(refused, Refused::Barred(_)), "{refused}");
        // Begun anew it reads everything anew.
        assert_eq!(record.take(&holder("a", "db", 5), Take::New), Ok(true));
    }

    proptest! {
        /// Whatever is tried in whatever order: the epoch of a pod's holder never falls, and nobody takes what another pod has.
        #[test]
        fn epochs_of_a_holder_never_fall(steps in prop::collection::vec((0..4u8, 0..3u8, 0..2u8, 0..6u64), 1..40)) {
            let mut record = Record::default();
            for (verb, node, pod, epoch) in steps {
                let me = holder(["a", "b", "c"][usize::from(node)], ["db", "web"][usize::from(pod)], epoch);
                let before = record.holder.clone();
                let took = match verb {
                    0 => record.take(&me, Take::New).is_ok(),
                    1 => record.take(&me, Take::Owned).is_ok(),
                    2 => { record.give_back(&me); continue }
                    _ => { record.hand_over(&me, &holder("c", &me.pod, epoch + 1)); continue }
                };
                match (took, before) {
                    (true, Some(before)) => {
                        prop_assert_eq!(&before.pod, &me.pod);
                        prop_assert!(before.epoch <= me.epoch);
                    }
                    (true, None) => {}
                    (false, before) => prop_assert_eq!(&record.holder, &before),
                }
            }
        }
    }
}
