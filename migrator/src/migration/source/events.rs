//! What goes into the source's machine, and what comes out.

use vm_runtime::units::Epoch;

use crate::migration::journal::Entry;
use crate::migration::mode::{Mode, OnStall};
use crate::migration::rounds::Policy;
use crate::wire::id::MigrationId;
use crate::wire::message::{Control, ImageWant, Ledger, Offer};

/// One migration away from this node, as asked for.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The first message; its epoch is the one that follows `epoch`.
    pub offer: Offer,
    /// Name of the destination node.
    pub to: String,
    /// The epoch in which this node runs the guest.
    pub epoch: Epoch,
    /// When the memory crosses.
    pub mode: Mode,
    /// What a stall leads to in [`Mode::Precopy`].
    pub on_stall: OnStall,
    /// When to freeze.
    pub policy: Policy,
    /// Longest time from the guest's stop to the destination's Ready, in microseconds; then the guest goes on here.
    pub freeze_limit_us: u64,
    /// How long parked packets wait for a lost link after the grant was taken, in microseconds.
    pub relink_limit_us: u64,
    /// The destination takes entries of connection tracking.
    pub flows: bool,
}

impl Plan {
    /// The usual limits: 10 s of freeze, 30 s without a link.
    pub fn new(offer: Offer, to: String, epoch: Epoch) -> Self {
        Self {
            offer,
            to,
            epoch,
            mode: Mode::default(),
            on_stall: OnStall::default(),
            policy: Policy::default(),
            freeze_limit_us: 10_000_000,
            relink_limit_us: 30_000_000,
            flows: true,
        }
    }

    /// The migration.
    pub fn migration(&self) -> MigrationId {
        self.offer.migration
    }
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// The session with the destination is up: begin. Once, and first.
    Begin,
    /// A message of the link that is up. Not `Ping`, `Pong`; `StateChunk` and `PageHashes` never come to a source, and `PageBits` go
    /// to who sends the pages.
    Peer(Control),
    /// The link is lost, or the dial that [`Output::Redial`] asked for failed.
    LinkLost {
        /// Why, for people.
        reason: String,
    },
    /// The dial that [`Output::Redial`] asked for succeeded: what was sent from here on goes over that session.
    LinkUp,
    /// The user wants it stopped.
    Cancel,
    /// The VMM exited.
    VmDied {
        /// How, for people.
        reason: String,
    },
    /// [`Output::SendImages`] is done.
    ImagesSent,
    /// [`Output::SendDisks`] is done: what is left of the disks is little, or does not get less.
    DisksSent,
    /// [`Output::StartTracking`] is done.
    TrackingStarted,
    /// [`Output::Scan`] is done.
    Scanned {
        /// Pages found written by this scan, and what was written to disks since the last one, in bytes of pages.
        dirtied: u64,
        /// Pages pending in all: this scan's, and what a round left. So for disks.
        pending: u64,
    },
    /// [`Output::SendRound`] is done: every page and a barrier are on each data connection, and what was pending of disks is acknowledged.
    RoundSent {
        /// Pages, zero pages included.
        pages: u64,
        /// Bytes, headers included. Those of disks too.
        bytes: u64,
    },
    /// [`Output::DetachAgent`] is done.
    AgentDetached {
        /// State of the link to the agent, for [`crate::wire::message::Handover::agent`].
        state: Vec<u8>,
    },
    /// [`Output::Hold`] is done.
    Held,
    /// [`Output::DrainTap`] is done, or its time is up.
    Drained,
    /// [`Output::StopVm`] is done.
    Stopped {
        /// Unix time in microseconds.
        at_unix_us: u64,
    },
    /// [`Output::ReadResidue`] is done.
    ResidueRead,
    /// [`Output::SendFlows`] is done, `Flows` are queued; also if some could not be read, which is no reason to end a migration.
    FlowsSent {
        /// Those whose translation needs this node, or one that the pod has left before: they stay.
        bound: u64,
        /// How many of them break for a reason that is known here.
        unserved: u64,
    },
    /// [`Output::SendLastPages`] is done: every page and a barrier are on each data connection.
    LastPagesSent {
        /// Pages, zero pages included.
        pages: u64,
    },
    /// [`Output::SendLastBlocks`] is done: every block and a barrier are on each data connection.
    LastBlocksSent {
        /// The round of disks, which are counted apart.
        round: u32,
        /// Bytes of disks, holes included.
        bytes: u64,
    },
    /// [`Output::SendStale`] is done, `StaleEnd` is queued.
    StaleSent {
        /// As asked for.
        last: bool,
        /// Pages that cross after the resume.
        pages: u64,
    },
    /// [`Output::SaveState`] is done, `StateEnd` is queued.
    StateSent,
    /// [`Output::SendHashes`] is done, `HashesEnd` is queued.
    HashesSent,
    /// [`Output::Rollback`] is done, as well as it could be.
    RolledBack,
    /// [`Output::Forward`] has ended: the log is acknowledged and the neighbours have learned.
    Forwarded,
    /// [`Output::Release`] is done.
    Released {
        /// The packets of this side.
        ledger: Ledger,
    },
    /// A step failed.
    Failed {
        /// What failed and why, for people.
        reason: String,
    },
    /// More packets came for the pod than may be kept while it moves.
    Overflowed {
        /// How, for people.
        reason: String,
    },
    /// [`Output::Journal`] failed, and what followed it in its batch was not carried out. Must be the next input of all.
    JournalFailed {
        /// Why, for people.
        reason: String,
    },
    /// The time of an [`Output::WakeAt`] has come. Early or spare ticks are harmless.
    Tick,
}

/// What to do. Outputs of one call are carried out in order; one marked *awaited* is complete before the next begins, the others
/// are only begun, and report by an [`Input`].
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Send over the link that is up. A failure is [`Input::LinkLost`].
    Send(Control),
    /// *Awaited.* Make durable. On failure drop the rest of the batch and report [`Input::JournalFailed`].
    Journal(Entry),
    /// *Awaited.* Make durable if possible; on failure log it and go on, because every later restart finds the same answer without it.
    Note(Entry),
    /// Send these chunks over the data connections. Then [`Input::ImagesSent`].
    SendImages(Vec<ImageWant>),
    /// Note from here on what is written to the disks. Send what is allocated of them, then in rounds what was written meanwhile, each once the
    /// one before is acknowledged, until little is left or it does not get less. Then [`Input::DisksSent`].
    SendDisks,
    /// Write-protect the guest's memory. Then [`Input::TrackingStarted`].
    StartTracking,
    /// Send the pending pages (round 1: every page that is not a hole) and a barrier on each data connection, and beside them what is pending of
    /// disks. Then [`Input::RoundSent`].
    SendRound {
        /// The round, from 1.
        round: u32,
    },
    /// Add what was written since the last scan to the pending pages. Then [`Input::Scanned`].
    Scan,
    /// Flush and let go of the guest agent. Then [`Input::AgentDetached`].
    DetachAgent,
    /// Gate LOCAL to HOLD, the log to the urgent connection. Then [`Input::Held`].
    Hold,
    /// Let the guest empty its TAP queue, for a few milliseconds at most. Then [`Input::Drained`].
    DrainTap,
    /// Stop the vCPUs. Then [`Input::Stopped`].
    StopVm,
    /// Read what is left in the TAP queue into the log. Then [`Input::ResidueRead`].
    ReadResidue,
    /// Send the pod's entries of connection tracking as `Flows`: the guest stands still. From here on those of flows that begin go before their
    /// first packets. Then [`Input::FlowsSent`].
    SendFlows,
    /// Scan once more, send all pending pages and a barrier on each data connection. Then [`Input::LastPagesSent`].
    SendLastPages {
        /// The round.
        round: u32,
    },
    /// Send what is pending of the disks, which nobody writes to any more, and a barrier on each data connection. Then [`Input::LastBlocksSent`].
    SendLastBlocks,
    /// Send `PageBits` of all pending pages and `StaleEnd`; they stay pending. If it is the last, scan before. Then [`Input::StaleSent`].
    SendStale {
        /// Whether the guest stands still.
        last: bool,
    },
    /// Answer who waits for a page, over the fault connections: the guest stands still. Ends with the link. No answer is needed.
    ServeFaults,
    /// Send the pages that are pending, or after a lost link those that the destination wants, hottest first; answer who waits
    /// for one before. A lost connection is [`Input::LinkLost`].
    PushPages,
    /// Slow the guest's CPUs. A failure is logged. No answer is needed.
    Throttle {
        /// Part of the time for which they stand still.
        percent: u8,
    },
    /// Send `StateBegin`, `StateChunk`s, `StateEnd`. Then [`Input::StateSent`].
    SaveState,
    /// Hash every page of the stopped guest, send `PageHashes` and `HashesEnd`. Then [`Input::HashesSent`].
    SendHashes,
    /// Cancel every step under way, then undo in this order what is marked. Then [`Input::RolledBack`], whatever came of it; what could not be
    /// undone is [`Input::Failed`] before that.
    Rollback(Rollback),
    /// Keep relaying until the neighbours have learned and the log is acknowledged; after a lost link, go on from the last
    /// acknowledgement once there is an urgent connection again. Then [`Input::Forwarded`].
    Forward,
    /// Stop forwarding; kill the VMM; remove the pod's TAP, park, gate, folder. Then [`Input::Released`].
    Release,
    /// Dial a session of the shape `Resume`, with a deadline. Then [`Input::LinkUp`] or [`Input::LinkLost`].
    Redial,
    /// Give [`Input::Tick`] at this time. A later one replaces an earlier one.
    WakeAt(u64),
    /// Tell the user that it is too late: the right has been given away.
    CancelRefused,
    /// The machine is done: close the link, forget the machine.
    Finish(Outcome),
}

/// What to undo. Each part must be harmless where there is nothing to undo: after a restart all are set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rollback {
    /// Cancel a save that is under way, and resume the vCPUs.
    pub resume_vm: bool,
    /// Put residue and log back into the TAP, in order, and open the gate: HOLD to LOCAL.
    pub release_hold: bool,
    /// Attach the guest agent again.
    pub attach_agent: bool,
    /// Stop dirty tracking, of memory and disks, and let the guest write to its disks as fast as it likes.
    pub stop_tracking: bool,
    /// Let the guest's CPUs run at full speed.
    pub unthrottle: bool,
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The destination runs the guest.
    Completed {
        /// The packets of this side.
        source: Ledger,
        /// The packets of the destination, if it could still tell.
        destination: Option<Ledger>,
    },
    /// The destination did not take the pod; the source runs the guest, as before.
    Refused {
        /// Why.
        reason: String,
    },
    /// The source runs the guest, as before.
    Failed {
        /// Why.
        reason: String,
    },
    /// No node runs the guest any more.
    PodFailed {
        /// Why.
        reason: String,
    },
}
