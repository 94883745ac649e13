//! Every frame for a pod is booked once. Pure: it adds up what the programs, the devices and the
//! dataplane thread have counted.

use migrator_ebpf::{Counter, CounterRow};
use serde::{Deserialize, Serialize};

/// The frames for a pod that this node saw, and what became of them:
/// `seen = delivered + held + forwarded + refused + lost`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// At the gate, and down the log.
    pub seen: u64,
    /// Given to the guest on this node.
    pub delivered: u64,
    /// In a queue of this node: the park, the log that is not acknowledged, frames to inject.
    pub held: u64,
    /// Sent on to the other node: relayed, through the tunnel, or out of the uplink.
    pub forwarded: u64,
    /// Dropped because another copy counts, or because no guest could take it.
    pub refused: u64,
    /// Lost.
    pub lost: u64,
    /// The same, by reason.
    pub reasons: Reasons,
}

impl Ledger {
    /// Whether each frame is booked once.
    pub const fn balances(&self) -> bool {
        self.seen == self.delivered + self.held + self.forwarded + self.refused + self.lost
    }

    /// What was booked after `base`. Frames held at `base` are seen again; so are frames delivered before
    /// it that were read back from the TAP after it.
    pub(crate) fn since(&self, base: &Self) -> Self {
        let taken_back = base.delivered.saturating_sub(self.delivered);
        Self {
            seen: self.seen.saturating_sub(base.seen) + base.held + taken_back,
            delivered: self.delivered.saturating_sub(base.delivered),
            held: self.held,
            forwarded: self.forwarded.saturating_sub(base.forwarded),
            refused: self.refused.saturating_sub(base.refused),
            lost: self.lost.saturating_sub(base.lost),
            reasons: self.reasons.since(&base.reasons),
        }
    }
}

/// Counters behind the [`Ledger`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reasons {
    /// Passed by the gate straight to the TAP.
    pub passed: u64,
    /// From the uplink straight to the TAP.
    #[serde(default)]
    pub fast: u64,
    /// Parked by the gate, in any mode.
    pub parked: u64,
    /// Read back from the TAP after the guest had stopped.
    pub residue: u64,
    /// Came down the log.
    pub log_received: u64,
    /// Of those, injected into the TAP.
    pub log_injected: u64,
    /// Parked here and injected here.
    pub own_injected: u64,
    /// Sent on through the tunnel; the rest of what was forwarded was relayed, or sent out.
    pub forwarded_tunnel: u64,
    /// Of those, straight from the uplink.
    #[serde(default)]
    pub forwarded_xdp: u64,
    /// From the node's own bridge, and sent out of the uplink to where the pod has gone.
    pub sent_out: u64,
    /// Came out of the tunnel; the gate books them as any others.
    pub landed: u64,
    /// Refused: the gate was shut.
    pub refused_shut: u64,
    /// Refused: the pod's own announcement, echoed.
    pub refused_echo: u64,
    /// Refused: the device has no gate.
    pub refused_no_slot: u64,
    /// Refused: a group frame whose copy came the other way.
    pub refused_duplicate: u64,
    /// Refused: a group frame after the end marker; the destination has its own.
    pub refused_group: u64,
    /// Refused: the kernel does not take it (a malformed header or length).
    pub refused_invalid: u64,
    /// Lost: the park's queue was full.
    pub lost_park: u64,
    /// Lost: the TAP's queue was full.
    pub lost_tap: u64,
    /// Lost: more came than may be kept, and the newest were to be dropped.
    #[serde(default)]
    pub lost_overflow: u64,
    /// Lost: parked, and only in the memory of a service that was killed.
    pub lost_crash: u64,
    /// Lost: given up when the pod was removed.
    pub lost_removed: u64,
    /// Frames from the guest that went out.
    pub guest_sent: u64,
    /// Of flows that another node translates: frames from the guest that went there. Not part of `guest_sent`.
    #[serde(default)]
    pub guest_sent_bound: u64,
    /// Frames from the guest that the guard stopped.
    pub guest_blocked: u64,
    /// The destination went on without an end marker.
    pub end_timeouts: u64,
    /// The source went on without the end markers of all other nodes.
    #[serde(default)]
    pub mark_timeouts: u64,
}

impl Reasons {
    fn since(&self, base: &Self) -> Self {
        let less = |now: u64, then: u64| now.saturating_sub(then);
        Self {
            passed: less(self.passed, base.passed),
            fast: less(self.fast, base.fast),
            parked: less(self.parked, base.parked),
            residue: less(self.residue, base.residue),
            log_received: less(self.log_received, base.log_received),
            log_injected: less(self.log_injected, base.log_injected),
            own_injected: less(self.own_injected, base.own_injected),
            forwarded_tunnel: less(self.forwarded_tunnel, base.forwarded_tunnel),
            forwarded_xdp: less(self.forwarded_xdp, base.forwarded_xdp),
            sent_out: less(self.sent_out, base.sent_out),
            landed: less(self.landed, base.landed),
            refused_shut: less(self.refused_shut, base.refused_shut),
            refused_echo: less(self.refused_echo, base.refused_echo),
            refused_no_slot: less(self.refused_no_slot, base.refused_no_slot),
            refused_duplicate: less(self.refused_duplicate, base.refused_duplicate),
            refused_group: less(self.refused_group, base.refused_group),
            refused_invalid: less(self.refused_invalid, base.refused_invalid),
            lost_park: less(self.lost_park, base.lost_park),
            lost_tap: less(self.lost_tap, base.lost_tap),
            lost_overflow: less(self.lost_overflow, base.lost_overflow),
            lost_crash: less(self.lost_crash, base.lost_crash),
            lost_removed: less(self.lost_removed, base.lost_removed),
            guest_sent: less(self.guest_sent, base.guest_sent),
            guest_sent_bound: less(self.guest_sent_bound, base.guest_sent_bound),
            guest_blocked: less(self.guest_blocked, base.guest_blocked),
            end_timeouts: less(self.end_timeouts, base.end_timeouts),
            mark_timeouts: less(self.mark_timeouts, base.mark_timeouts),
        }
    }
}

/// What the dataplane thread has counted, from the attachment on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Parked frames read, without echoes.
    pub(crate) park_read: u64,
    /// Frames that the thread holds now: log, own queue, to inject.
    pub(crate) held: u64,
    pub(crate) forwarded: u64,
    pub(crate) residue: u64,
    pub(crate) log_received: u64,
    pub(crate) log_injected: u64,
    pub(crate) own_injected: u64,
    pub(crate) duplicate: u64,
    pub(crate) group: u64,
    pub(crate) invalid: u64,
    /// Read from the park, and dropped beyond the log's limit.
    pub(crate) overflow: u64,
    pub(crate) crash: u64,
    pub(crate) removed: u64,
    pub(crate) end_timeouts: u64,
    pub(crate) mark_timeouts: u64,
    /// Attempts to inject that found the TAP's queue full: the kernel counts each as a drop.
    pub(crate) full: u64,
}

impl Tally {
    /// For a thread that takes a port over: the programs have counted all along. What they parked and
    /// nothing waits for any more, a former service has dealt with. What the TAP has dropped, it has tried again or booked.
    pub(crate) fn after_restart(row: &CounterRow, waiting: u64, tap_dropped: u64) -> Self {
        let dealt_with = parked(row).saturating_sub(waiting);
        Self {
            park_read: dealt_with,
            own_injected: dealt_with,
            full: tap_dropped.saturating_sub(row.get(Counter::FastFull)),
            ..Self::default()
        }
    }

    /// Of the waiting, what the former service had read and left for this one, and what it had read back from the TAP.
    pub(crate) fn restored(mut self, (parked, residue): (u64, u64)) -> Self {
        self.park_read += parked;
        self.residue += residue;
        self
    }
}

fn parked(row: &CounterRow) -> u64 {
    row.get(Counter::ParkedLocal) + row.get(Counter::ParkedHold) + row.get(Counter::ParkedForward)
}

/// Adds everything up. `park_dropped` and `tap_dropped` are the devices' own counters.
pub(crate) fn book(row: &CounterRow, tally: &Tally, park_dropped: u64, tap_dropped: u64) -> Ledger {
    let parked = parked(row);
    // Of each redirected batch that did not fit, the device counts one frame.
    let counted = tally.full + row.get(Counter::FastFull);
    let lost_tap = tap_dropped.saturating_sub(counted) + row.get(Counter::FastLost);
    let reasons = Reasons {
        passed: row.get(Counter::Passed),
        fast: row.get(Counter::Fast),
        parked,
        residue: tally.residue,
        log_received: tally.log_received,
        log_injected: tally.log_injected,
        own_injected: tally.own_injected,
        forwarded_tunnel: row.get(Counter::ForwardedTunnel) + row.get(Counter::ForwardedXdp),
        forwarded_xdp: row.get(Counter::ForwardedXdp),
        sent_out: row.get(Counter::SentOut),
        landed: row.get(Counter::Landed),
        refused_shut: row.get(Counter::RefusedShut),
        refused_echo: row.get(Counter::RefusedEcho),
        refused_no_slot: row.get(Counter::RefusedNoSlot),
        refused_duplicate: tally.duplicate,
        refused_group: tally.group + row.get(Counter::RefusedGroup),
        refused_invalid: tally.invalid,
        lost_park: park_dropped,
        lost_tap,
        lost_overflow: tally.overflow,
        lost_crash: tally.crash,
        lost_removed: tally.removed,
        guest_sent: row.get(Counter::Sent),
        guest_sent_bound: row.get(Counter::SentBound),
        guest_blocked: row.get(Counter::Blocked),
        end_timeouts: tally.end_timeouts,
        mark_timeouts: tally.mark_timeouts,
    };
    let in_park = parked.saturating_sub(tally.park_read + park_dropped + tally.crash);
    let taken = reasons.passed + reasons.fast + tally.log_injected + tally.own_injected;
    Ledger {
        seen: row.seen() + tally.log_received,
        delivered: taken.saturating_sub(tally.residue + lost_tap),
        held: tally.held + in_park,
        forwarded: tally.forwarded + reasons.forwarded_tunnel + reasons.sent_out,
        refused: reasons.refused_shut
            + reasons.refused_echo
            + reasons.refused_no_slot
            + reasons.refused_duplicate
            + reasons.refused_group
            + reasons.refused_invalid,
        lost: park_dropped + lost_tap + tally.overflow + tally.crash + tally.removed,
        reasons,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(passed: u64, hold: u64, shut: u64) -> CounterRow {
        let mut row = CounterRow::default();
        row.0[Counter::Passed as usize] = passed;
        row.0[Counter::ParkedHold as usize] = hold;
        row.0[Counter::RefusedShut as usize] = shut;
        row
    }

    #[test]
    fn a_source_balances_while_it_holds_and_after_it_forwarded() {
        let mut tally = Tally {
            park_read: 40,
            held: 45,
            residue: 5,
            ..Tally::default()
        };
        let ledger = book(&row(100, 50, 0), &tally, 0, 0);
        assert_eq!((ledger.seen, ledger.delivered, ledger.held), (150, 95, 55));
        assert!(ledger.balances());
        tally.park_read = 50;
        tally.held = 0;
        tally.forwarded = 55;
        let ledger = book(&row(100, 50, 0), &tally, 0, 0);
        assert_eq!((ledger.held, ledger.forwarded), (0, 55));
        assert!(ledger.balances());
    }

    #[test]
    fn the_tunnels_frames_are_forwarded_and_what_lands_is_seen_once() {
        let mut row = row(0, 10, 0);
        row.0[Counter::ForwardedTunnel as usize] = 30;
        row.0[Counter::RefusedGroup as usize] = 2;
        row.0[Counter::SentOut as usize] = 5;
        let tally = Tally {
            park_read: 10,
            forwarded: 10,
            ..Tally::default()
        };
        let ledger = book(&row, &tally, 0, 0);
        assert_eq!((ledger.seen, ledger.forwarded), (47, 45));
        assert_eq!((ledger.reasons.forwarded_tunnel, ledger.refused), (30, 2));
        assert!(ledger.balances());
        let mut row = CounterRow::default();
        row.0[Counter::Landed as usize] = 30;
        row.0[Counter::Passed as usize] = 30;
        let ledger = book(&row, &Tally::default(), 0, 0);
        assert_eq!((ledger.seen, ledger.delivered), (30, 30));
        assert_eq!(ledger.reasons.landed, 30);
        assert!(ledger.balances());
    }

    #[test]
    fn a_retried_injection_is_not_a_loss() {
        let tally = Tally {
            log_received: 10,
            log_injected: 10,
            full: 7,
            ..Tally::default()
        };
        let ledger = book(&row(0, 0, 3), &tally, 0, 7);
        assert_eq!((ledger.delivered, ledger.lost, ledger.refused), (10, 0, 3));
        assert!(ledger.balances());
        let ledger = book(&row(0, 0, 3), &tally, 0, 9);
        assert_eq!((ledger.delivered, ledger.lost), (8, 2));
        assert!(ledger.balances());
    }

    #[test]
    fn frames_of_the_fast_way_are_delivered_or_lost_in_a_full_tap() {
        let mut row = row(10, 0, 0);
        row.0[Counter::Fast as usize] = 100;
        // Two batches were cut short, by 20 frames in all; one frame of the gate's did not fit either.
        row.0[Counter::FastLost as usize] = 20;
        row.0[Counter::FastFull as usize] = 2;
        let ledger = book(&row, &Tally::default(), 0, 3);
        assert_eq!((ledger.seen, ledger.delivered, ledger.lost), (110, 89, 21));
        assert!(ledger.balances());
        let ledger = book(&row, &Tally::after_restart(&row, 0, 3), 0, 3);
        assert_eq!(ledger.lost, 20);
        assert!(ledger.balances());
    }

    #[test]
    fn a_full_park_is_a_loss() {
        let tally = Tally {
            park_read: 8,
            held: 8,
            ..Tally::default()
        };
        let ledger = book(&row(0, 10, 0), &tally, 2, 0);
        assert_eq!((ledger.held, ledger.lost), (8, 2));
        assert!(ledger.balances());
    }

    #[test]
    fn what_is_dropped_beyond_the_limit_is_a_loss_with_a_reason() {
        let tally = Tally {
            park_read: 10,
            held: 7,
            overflow: 3,
            ..Tally::default()
        };
        let ledger = book(&row(0, 10, 0), &tally, 0, 0);
        assert_eq!((ledger.held, ledger.lost), (7, 3));
        assert_eq!(ledger.reasons.lost_overflow, 3);
        assert!(ledger.balances());
    }

    #[test]
    fn residue_delivered_before_the_reset_is_seen_again() {
        let base = book(&row(100, 0, 0), &Tally::default(), 0, 0);
        let tally = Tally {
            residue: 5,
            held: 5,
            ..Tally::default()
        };
        let ledger = book(&row(102, 0, 0), &tally, 0, 0).since(&base);
        assert_eq!((ledger.seen, ledger.held), (5, 5));
        assert!(ledger.balances());
    }

    #[test]
    fn a_restarted_service_balances_from_where_it_is() {
        let tally = Tally::after_restart(&row(100, 30, 0), 4, 9);
        let ledger = book(&row(100, 30, 0), &tally, 0, 9);
        assert_eq!((ledger.held, ledger.delivered, ledger.lost), (4, 126, 0));
        assert!(ledger.balances());
    }

    #[test]
    fn what_a_killed_service_left_is_held_until_it_is_back_with_the_guest() {
        // Of 30 parked frames 20 wait: 12 were left, 6 are in the park, 2 died with the service. It also left the 5 that it
        // had read back from the TAP.
        let row = row(100, 30, 0);
        let mut tally = Tally::after_restart(&row, 20, 0).restored((12, 5));
        tally.held = 12 + 5;
        let ledger = book(&row, &tally, 0, 0);
        assert_eq!((ledger.held, ledger.delivered), (25, 105));
        assert_eq!(ledger.lost, 0);
        assert!(ledger.balances());
        tally.park_read += 6;
        tally.held = 0;
        tally.own_injected += 12 + 5 + 6;
        tally.crash = 2;
        let ledger = book(&row, &tally, 0, 0);
        assert_eq!((ledger.held, ledger.delivered, ledger.lost), (0, 128, 2));
        assert!(ledger.balances());
    }

    #[test]
    fn a_frame_that_is_booked_nowhere_shows() {
        let tally = Tally {
            park_read: 10,
            own_injected: 9,
            ..Tally::default()
        };
        let ledger = book(&row(0, 10, 0), &tally, 0, 0);
        assert!(!ledger.balances());
        assert!(!ledger.since(&Ledger::default()).balances());
    }
}
