//! What goes into the destination's machine, and what comes out.

use crate::migration::journal::Entry;
use crate::wire::message::{Control, FaultFigures, Handover, ImageWant, Offer, Refuse};

/// What happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// Begin. Once, and first.
    Begin,
    /// A message of the link that is up. Not `Ping`, `Pong`; `StateChunk`, `PageBits`, `PageHashes` and `Flows` go to the steps that wait for them instead;
    /// a `Query` that opens a new session is [`Input::Asked`].
    Peer(Control),
    /// A `Query` for this migration came over a new session, which is the link from now on: drop the old one, and report nothing more of it.
    Asked,
    /// The link is lost.
    LinkLost {
        /// Why, for people.
        reason: String,
    },
    /// The user wants it stopped.
    Cancel,
    /// The VMM exited.
    VmDied {
        /// How, for people.
        reason: String,
    },
    /// [`Output::Check`] is done: what images lack, or why the pod is not taken.
    Checked(Result<Vec<ImageWant>, Refuse>),
    /// [`Output::ReceiveImages`] is done: every wanted chunk is verified and in place.
    ImagesReceived,
    /// [`Output::PrepareMemory`] is done.
    MemoryPrepared,
    /// [`Output::PrepareVm`] is done.
    VmPrepared,
    /// Every data connection has delivered its barrier of this round, and every page before it is in the guest's memory.
    RoundPlaced {
        /// The round.
        round: u32,
    },
    /// Every data connection has delivered its barrier of this round of disks, and every block before it is in the files of the disks and durable.
    BlocksPlaced {
        /// The round.
        round: u32,
    },
    /// [`Output::MarkStale`] is done: the pages are missing, and whoever touches one waits.
    StaleMarked {
        /// As asked for.
        last: bool,
    },
    /// [`Output::AwaitPages`] is done: the guest lacks no page any more.
    PagesHere {
        /// What it cost the guest.
        faults: FaultFigures,
    },
    /// [`Output::Verify`] is done.
    Verified {
        /// Pages compared.
        pages: u64,
        /// Pages that differ.
        mismatched: u64,
    },
    /// [`Output::EndState`] is done.
    StateLoaded,
    /// [`Output::Resume`] is done.
    Resumed {
        /// Unix time in microseconds.
        at_unix_us: u64,
        /// Microseconds of each step at this side, in order.
        steps: Vec<(String, u64)>,
    },
    /// [`Output::Discard`] is done, as well as it could be.
    Discarded,
    /// A step, a data connection or the peer failed. Nothing of it matters any more once the grant is taken.
    Failed {
        /// What failed and why, for people.
        reason: String,
    },
    /// [`Output::Resume`] failed, and it is certain that the guest will never run.
    ResumeFailed {
        /// Why, for people.
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
    /// Whether this node can take the pod, and which chunks it lacks. Then [`Input::Checked`].
    Check(Box<Offer>),
    /// Take chunks from the data connections until all are there. Begun before they are asked for. Then [`Input::ImagesReceived`].
    ReceiveImages(Vec<ImageWant>),
    /// Make the guest's memory and its disks; from here on place the pages and blocks that come. Then [`Input::MemoryPrepared`].
    PrepareMemory,
    /// Gate (shut), VMM waiting for state, while pages come. Then [`Input::VmPrepared`].
    PrepareVm,
    /// Make the pages of the `PageBits` that came missing, and from the first time on have whoever touches a page that is not there wait for it.
    /// Then [`Input::StaleMarked`].
    MarkStale {
        /// Whether no more follow.
        last: bool,
    },
    /// Wait until no page is missing; the guest runs. Then [`Input::PagesHere`].
    AwaitPages,
    /// Send `PageBits` of the missing pages and `Wanted`, and ask for pages over the connections of the link that is up.
    SendWanted,
    /// Compare the guest's memory with the hashes that came. Then [`Input::Verified`].
    Verify,
    /// Give the VMM the device state that came, and what comes from now on. The memory is complete: devices look into it.
    LoadState,
    /// No more of the state comes. Once it is loaded, [`Input::StateLoaded`].
    EndState,
    /// *Awaited.* Once the `Flows` that came are in the kernel, open the gate, announce. Harmless when done before. A failure is logged: the guest must run all the same.
    OpenNetwork,
    /// Resume the vCPUs; harmless when they run. Then [`Input::Resumed`], or [`Input::ResumeFailed`] once it is certain that they never will: the
    /// pod has failed then.
    Resume,
    /// The guest runs here: settle the gate, attach the agent, set the guest's clock; the pod is this node's. No answer is needed.
    Adopt {
        /// What the source handed over; `None` after a restart.
        handover: Option<Handover>,
    },
    /// The pod is this node's, and failed.
    PodFailed {
        /// Why.
        reason: String,
    },
    /// Cancel every step under way, and remove VMM, memory, gate and folder. Then [`Input::Discarded`], whatever came of it.
    Discard,
    /// Send `Bye` with the packets of this side.
    SendBye,
    /// Give [`Input::Tick`] at this time. A later one replaces an earlier one.
    WakeAt(u64),
    /// Tell the user that it is too late: this node runs the guest.
    CancelRefused,
    /// The machine is done: close the link, forget the machine. What a peer asks from now on, the journal answers
    /// ([`crate::migration::journal::Journal::answer`] and `settle`).
    Finish(Outcome),
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// This node runs the guest.
    Completed {
        /// Whether the source has said that it released everything. If not, it may still ask.
        settled: bool,
    },
    /// This node does not, and never will in this migration.
    Failed {
        /// Why.
        reason: String,
    },
    /// This node has the right, and the guest is gone.
    PodFailed {
        /// Why.
        reason: String,
    },
}
