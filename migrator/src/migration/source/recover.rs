//! A source whose service was restarted: all it has is the journal.

use super::{Dialing, Outcome, Output, Rollback, Source, SourceState, State};
use crate::migration::journal::{OwnerRecord, OwnerState, SourceRecord};
use crate::migration::rounds::Policy;

/// After a restart nothing is known about the steps that were begun: everything is undone that may have been.
const EVERYTHING: Rollback = Rollback {
    resume_vm: true,
    release_hold: true,
    attach_agent: true,
    stop_tracking: true,
    unthrottle: true,
};

impl Source {
    /// Takes a migration up again that a service did not end. `owner` is the pod's owner record, which decides; `vm_alive` tells whether the VMM is
    /// there. Carry out the outputs like those of [`Source::handle`].
    pub fn recover(
        now: u64,
        record: SourceRecord,
        owner: Option<OwnerRecord>,
        vm_alive: bool,
    ) -> (Self, Vec<Output>) {
        let id = record.migration;
        let mut source = Self::blank(record, Policy::default());
        source.vm_alive = vm_alive;
        source.memory_gone = !vm_alive;
        source.begun = EVERYTHING;
        let mut out = Vec::new();
        match owner.map(|owner| owner.state) {
            // HandedOver was not written, or the right was taken back: no grant is in force, and the destination has lost its link.
            Some(OwnerState::Owner) => {
                source.unwind("the service was restarted during the migration", &mut out);
            }
            Some(OwnerState::HandedOver { migration, .. }) if migration == id => {
                source.handed_over = true;
                let mut dialing = Dialing::default();
                source.dial(&mut dialing, &mut out);
                source.state = State::Doubt(dialing);
            }
            // Nothing was left to forward.
            Some(OwnerState::Released { migration, .. }) if migration == id => {
                let mut dialing = Dialing {
                    give_up_at: Some(now + source.relink_limit_us),
                    ..Dialing::default()
                };
                out.push(Output::Release);
                source.dial(&mut dialing, &mut out);
                source.state = State::Releasing(dialing);
            }
            // The pod is gone, or in a later migration: this one is history.
            Some(
                OwnerState::HandedOver { .. } | OwnerState::Released { .. } | OwnerState::Stopped,
            )
            | None => {
                let reason = "the service was restarted, and the pod had moved on".to_owned();
                source.state = State::Done;
                out.push(Output::Note(source.ended(SourceState::Failed {
                    reason: reason.clone(),
                })));
                out.push(Output::Finish(Outcome::Failed { reason }));
            }
        }
        source.set_timer(&mut out);
        (source, out)
    }
}
