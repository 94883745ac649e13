//! What a migration away from here shows: to watchers while it runs, and in its report.

use super::clock::unix_us;
use super::source::Run;
use crate::migration::source::{Input, Output};
use crate::migration::status::{Phase, RoundReport};
use crate::wire::message::Control;

impl Run {
    /// What inputs say for the report.
    pub(super) fn note(&mut self, input: &Input) {
        let since_round = self.runner.now().saturating_sub(self.round_began);
        let memory = &mut self.figures.memory;
        match input {
            Input::RoundSent { pages, bytes } => {
                memory.rounds += 1;
                memory.history.push(RoundReport {
                    round: memory.rounds,
                    pages: *pages,
                    bytes: *bytes,
                    ..RoundReport::default()
                });
            }
            Input::Peer(Control::RoundAck(ack)) => {
                // It may be heard of before the end of our own sending, which then has the duration.
                let round = memory.history.iter_mut().rfind(|r| r.round == ack.round);
                if let Some(round) = round {
                    round.duration_us = since_round;
                }
            }
            Input::Scanned { dirtied, .. } => {
                if let Some(round) = memory.history.last_mut() {
                    round.dirtied = *dirtied;
                    round.duration_us = match round.duration_us {
                        0 => since_round,
                        known => known,
                    };
                }
            }
            Input::LastPagesSent { pages } => {
                memory.rounds += 1;
                memory.history.push(RoundReport {
                    round: memory.rounds,
                    pages: *pages,
                    ..RoundReport::default()
                });
            }
            Input::FlowsSent { bound, unserved } => {
                self.figures.conntrack.bound = *bound;
                self.figures.conntrack.bound_unserved = *unserved;
            }
            Input::StaleSent { .. } => self.figures.postcopy = true,
            Input::Peer(Control::MemoryComplete(complete)) => {
                self.figures.total = Some(self.figures.started.elapsed());
                self.figures.complete(&complete.faults);
            }
            Input::Stopped { at_unix_us } => {
                self.figures.frozen_at_unix_us = *at_unix_us;
                let held = at_unix_us.saturating_sub(self.held_at_unix_us);
                self.figures.phases.push(("held_before".to_owned(), held));
            }
            Input::Peer(Control::Ready(ready)) => {
                memory.pages_verified = ready.verified;
                memory.mismatched = ready.mismatched;
            }
            Input::Peer(Control::Running(running)) => self.figures.running(running),
            Input::LinkLost { reason } => {
                tracing::warn!(
                    pod = self.pod.name(),
                    reason,
                    "the link to the destination is lost"
                );
            }
            Input::Failed { reason } => {
                tracing::warn!(
                    pod = self.pod.name(),
                    reason,
                    "a step of the migration failed"
                );
            }
            _ => {}
        }
        if self.figures.frozen_at_unix_us > 0 && self.figures.downtime_us == 0 {
            let at = unix_us().saturating_sub(self.figures.frozen_at_unix_us);
            if let Some(name) = freeze_step(input) {
                self.figures.phases.push((name.to_owned(), at));
            }
        }
    }

    /// Shows watchers where it stands.
    pub(super) fn show(&self, phase: Option<Phase>) {
        let Some(ticket) = &self.ticket else { return };
        let rounds = self.machine.convergence();
        let pages_left = match &self.queue {
            Some(queue) => queue.left(),
            None => self.tracking.pending(),
        };
        let in_doubt = self.machine.in_doubt() && self.runner.link.is_none();
        let bytes_sent = self
            .sender()
            .map_or(self.figures.memory.bytes_sent, |sender| sender.bytes_sent());
        let (disk_left, disk_sent) = (
            self.disks.bytes_left(),
            self.sender().map(|sender| sender.disk_bytes_sent()),
        );
        let disk_pages = self.disks.pages_left();
        ticket.update(|status| {
            if let Some(phase) = phase {
                status.phase = phase;
            }
            if in_doubt {
                status.phase = Phase::InDoubt;
            }
            status.round = rounds.rounds();
            status.bytes_sent = bytes_sent;
            status.pages_left = pages_left;
            status.disk_bytes_sent = disk_sent.unwrap_or(status.disk_bytes_sent);
            status.disk_bytes_left = disk_left;
            status.bandwidth_bytes_per_s = rounds.bandwidth_bytes_per_s();
            status.dirty_bytes_per_s = rounds.dirty_bytes_per_s();
            let predicted = rounds.predict_downtime_us(pages_left + disk_pages);
            status.throttle_percent = self.machine.throttle_percent();
            if self.machine.pages_due() && status.phase == Phase::Forwarding {
                status.phase = Phase::Postcopy;
            }
            status.predicted_downtime_ms = if predicted == u64::MAX {
                0.0
            } else {
                predicted as f64 / 1e3
            };
        });
    }
}

/// The phase that begins with an output.
pub(super) fn phase_of(output: &Output) -> Option<Phase> {
    match output {
        Output::SendImages(_) => Some(Phase::Image),
        Output::SendDisks | Output::StartTracking | Output::SendRound { .. } => {
            Some(Phase::Precopy)
        }
        Output::Hold | Output::StopVm => Some(Phase::Switchover),
        Output::Forward => Some(Phase::Forwarding),
        _ => None,
    }
}

/// Names of the moments in the freeze, each with the microseconds since the stop began.
fn freeze_step(input: &Input) -> Option<&'static str> {
    match input {
        Input::Stopped { .. } => Some("stopped"),
        Input::LastPagesSent { .. } => Some("pages_sent"),
        Input::LastBlocksSent { .. } => Some("blocks_sent"),
        Input::StaleSent { .. } => Some("missing_told"),
        Input::FlowsSent { .. } => Some("flows_sent"),
        Input::StateSent => Some("state_sent"),
        Input::ResidueRead => Some("residue_read"),
        Input::HashesSent => Some("hashes_sent"),
        Input::Peer(Control::Ready(_)) => Some("ready"),
        _ => None,
    }
}
