//! The thread that owns a pod's dataplane: it alone reads the park, writes into the TAP, and moves the
//! `done` counters. Everybody else sends it commands.
//!
//! ```text
//!             hold            residue, forward         drain
//!   Local ----------> Holding ----------> Forwarding ----------> Released
//!     ^ ^                |
//!     | +- RollingBack <-+ rollback                                 the source
//!     |
//!     +--- Settling <--------- Opened <--------- Incoming           the destination
//!                     settle            open
//! ```

mod backlog;
mod command;
mod destination;
mod landed;
mod marks;
mod overflow;
mod queues;
mod resync;
mod source;

pub use backlog::Backlog;
pub use command::Stage;
pub(crate) use command::{Command, Reply};
use queues::{Origin, Pending, normalise, readable};

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use migrator_ebpf::{Gate, Mode};
use nix::poll::{PollFd, PollFlags};
use nix::sys::eventfd::EventFd;
use nix::sys::time::TimeSpec;
use tokio::sync::{Notify, mpsc::UnboundedSender, watch};
use vm_runtime::units::MacAddress;

use super::allowance::{OnOverflow, Share};
use super::copies::Copies;
use super::endpoints::EndMarks;
use super::error::PortError;
use super::gate::SlotGate;
use super::landing::Landing;
use super::ledger::Tally;
use super::log::{InboundLog, LogItem, SourceLog};
use super::marker::marker;
use super::spool::Spool;
use super::sys::PacketSocket;

/// From the echo of the announcement to the end of the old way: frames that came before it may still be in
/// the backlog of another CPU.
const END_DELAY: Duration = Duration::from_millis(2);
/// How long the end marker waits for the node's own bridge, after the echo.
const DISOWN_LIMIT: Duration = Duration::from_secs(1);
/// How long the source waits for the echo, once the guest runs elsewhere: not every network brings it back.
const ECHO_LIMIT: Duration = Duration::from_millis(100);
/// How long the source of a routed pod waits for the end markers of all other nodes, once the guest runs elsewhere. Less than the destination waits
/// for the end of the log.
const MARKS_LIMIT: Duration = Duration::from_secs(1);
/// Pause before the next attempt at a full TAP.
const FULL_PAUSE: Duration = Duration::from_micros(250);
/// Until the next look whether other pods have made room for this one's log.
const FULL_LOOK: Duration = Duration::from_millis(5);
/// Longest sleep: a safety net, since every event wakes the thread.
const IDLE: Duration = Duration::from_millis(500);
/// Frames taken from the park before commands are looked at again.
const BATCH: usize = 256;
/// Frames that wait for a full TAP before the park is left to fill as well.
const PENDING_MAX: usize = 65536;
/// Shortest Ethernet frame: its header.
const ETHERNET_MIN: usize = 14;

/// What the thread is made of.
pub(crate) struct Setup {
    pub(crate) pod: String,
    pub(crate) tap_name: String,
    pub(crate) mac: MacAddress,
    pub(crate) gate: SlotGate,
    pub(crate) spool: Spool,
    pub(crate) landing: Landing,
    pub(crate) tap: OwnedFd,
    pub(crate) park: OwnedFd,
    pub(crate) injector: PacketSocket,
    pub(crate) stage: Stage,
    pub(crate) tally: Tally,
    pub(crate) commands: Receiver<Command>,
    pub(crate) wake: Arc<EventFd>,
    pub(crate) acked: watch::Sender<u64>,
    pub(crate) stages: watch::Sender<Stage>,
    /// Told once the announcement of another node has come back.
    pub(crate) echoed: Arc<Notify>,
    pub(crate) full: watch::Sender<bool>,
    pub(crate) share: Share,
    /// Other nodes end their old ways with markers, and no switch echoes an announcement.
    pub(crate) routed: bool,
}

pub(crate) struct Dataplane {
    setup: Setup,
    stage: Stage,
    /// What a former service had read: it comes before everything in the park.
    left: Option<Bytes>,
    park_empty: bool,
    pending: VecDeque<Pending>,
    /// Items ever taken off `pending`.
    injected: u64,
    /// The gate turns LOCAL when `injected` gets here.
    barrier: Option<u64>,
    full: bool,
    tally: Tally,
    // source
    log: SourceLog,
    /// Items for the sink, once they are in the spool.
    outbox: Vec<LogItem>,
    sink: Option<UnboundedSender<LogItem>>,
    end_due: Option<Instant>,
    /// When the port is told of the echo; the end marker then waits for its answer.
    echo_due: Option<Instant>,
    echo_seen: bool,
    /// The end markers that the log's end waits for.
    marks: Option<Arc<EndMarks>>,
    /// All of them have come, and what came before them is in the park after this.
    marks_due: Option<Instant>,
    early_ack: u64,
    /// Late frames may go through the tunnel, once the order allows it.
    may_tunnel: bool,
    on_overflow: OnOverflow,
    drain_tap: Option<(Instant, Reply<bool>)>,
    // destination
    inbound: InboundLog,
    /// Not everything whose turn it is was taken from the log.
    log_left: bool,
    copies: Copies,
    opened_at: Option<Instant>,
    /// A former service had opened it, and was gone before it settled; nothing of the log has come since.
    source_is_away: bool,
    end_seen: bool,
    injected_seq: u64,
    settle: Option<Reply<Result<(), PortError>>>,
    /// Frames that buckets wait for are missing, and looked for.
    resync: Option<resync::Resync>,
}

impl Dataplane {
    pub(crate) fn new(mut setup: Setup) -> Self {
        let taken_over = setup.stage == Stage::Opened;
        let settled = setup.stage == Stage::Local;
        // A pod that has settled may still be relayed to: the log goes on after its end.
        let arrived = taken_over || settled;
        let injected_seq = setup.gate.injected();
        if arrived {
            setup.acked.send_replace(injected_seq);
        }
        let mut log = setup.take_log_back();
        let left = setup.take_landed(&mut log);
        let end_owed = setup.stage == Stage::Forwarding && !log.ended();
        let end_limit = setup.end_limit();
        Self {
            stage: setup.stage,
            tally: setup.tally.restored(log.kept_from()),
            setup,
            left,
            park_empty: false,
            pending: VecDeque::new(),
            injected: 0,
            barrier: None,
            full: false,
            log,
            outbox: Vec::new(),
            sink: None,
            end_due: end_owed.then(|| Instant::now() + end_limit),
            echo_due: None,
            echo_seen: false,
            marks: None,
            marks_due: None,
            early_ack: 0,
            may_tunnel: false,
            on_overflow: OnOverflow::default(),
            drain_tap: None,
            inbound: match arrived {
                true => InboundLog::resumed(injected_seq),
                false => InboundLog::new(),
            },
            log_left: false,
            copies: Copies::default(),
            opened_at: arrived.then(Instant::now),
            source_is_away: taken_over,
            end_seen: settled,
            injected_seq: if arrived { injected_seq } else { 0 },
            settle: None,
            resync: None,
        }
    }

    /// Runs until it is told to detach, or nobody can tell it anything any more.
    pub(crate) fn run(mut self) {
        loop {
            if !self.take_commands() {
                self.flush();
                return;
            }
            let now = Instant::now();
            self.read_park(now);
            self.take_log(now);
            self.inject();
            self.account();
            self.advance(now);
            self.wait();
        }
    }

    fn set_stage(&mut self, stage: Stage) {
        self.stage = stage;
        self.setup.stages.send_replace(stage);
    }

    fn set_gate(&self, mode: Mode, may_send: bool) {
        let gate = self.setup.gate.get();
        self.setup.gate.set(Gate {
            mode,
            may_send,
            slot: self.setup.gate.slot(),
            epoch: gate.epoch.wrapping_add(1),
        });
    }

    fn take_commands(&mut self) -> bool {
        loop {
            match self.setup.commands.try_recv() {
                Ok(Command::Detach) | Err(TryRecvError::Disconnected) => return false,
                Ok(command) => self.command(command),
                Err(TryRecvError::Empty) => return true,
            }
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Hold(sink, reply) => {
                let result = self.hold(sink);
                answer(reply, result);
            }
            Command::Resend(sink, reply) => {
                let result =
                    self.expect("send the log again", &[Stage::Holding, Stage::Forwarding]);
                if result.is_ok() {
                    self.attach_sink(sink);
                }
                answer(reply, result);
            }
            Command::OnOverflow(rule) => self.on_overflow = rule,
            Command::DrainTap(until, reply) => {
                // A queue that is too full for the marker is not empty either.
                self.setup.gate.set_injected_next(None);
                self.setup.injector.send(&marker(self.setup.mac));
                self.drain_tap = Some((until, reply));
            }
            Command::Residue(reply) => {
                let result = self.residue();
                answer(reply, result);
            }
            Command::Ack(seq) => self.ack(seq),
            Command::Rollback(reply) => {
                let result = self.rollback();
                answer(reply, result);
            }
            Command::Forward(reply) => {
                let result = self.forward();
                answer(reply, result);
            }
            Command::End => self.own_bridge_has_changed(),
            Command::AwaitMarks(marks, reply) => {
                let result = self.await_marks(marks);
                answer(reply, result);
            }
            Command::Tunnel(tunnel, reply) => {
                let result = self.may_tunnel(tunnel);
                answer(reply, result);
            }
            Command::Input(item) => self.input(item),
            Command::Open(reply) => {
                let result = self.open();
                answer(reply, result);
            }
            Command::Settle(reply) => match self.expect("settle", &[Stage::Opened]) {
                Ok(()) => {
                    self.set_stage(Stage::Settling);
                    self.settle = Some(reply);
                }
                Err(error) => answer(reply, Err(error)),
            },
            Command::SourceAway => self.source_is_away |= !self.end_seen,
            Command::Resync(crashed) => self.want_resync(crashed),
            Command::Tally(reply) => {
                let tally = self.tally();
                answer(reply, tally);
            }
            Command::Backlog(reply) => {
                let facts = (self.tally(), self.backlog());
                answer(reply, facts);
            }
            Command::Shut(reply) => {
                self.set_gate(Mode::Shut, false);
                answer(reply, ());
            }
            Command::Drain(reply) => {
                self.drain();
                let tally = self.tally();
                answer(reply, tally);
            }
            Command::Detach => {}
        }
    }

    fn expect(&self, operation: &'static str, stages: &[Stage]) -> Result<(), PortError> {
        if stages.contains(&self.stage) {
            return Ok(());
        }
        Err(PortError::WrongStage {
            operation,
            stage: self.stage,
        })
    }

    fn tally(&self) -> Tally {
        let pending = self.pending.iter().filter(|p| !p.frame.is_empty()).count();
        let held = self.log.len() + pending + self.inbound.waiting();
        Tally {
            held: held as u64,
            ..self.tally
        }
    }

    /// Everything that happens by itself.
    fn advance(&mut self, now: Instant) {
        if self.echo_due.is_some_and(|due| now >= due) {
            self.echo_due = None;
            self.setup.echoed.notify_one();
        }
        if self.marks_due.is_some_and(|due| now >= due) {
            self.old_ways_have_ended(now);
        }
        if self.end_due.is_some_and(|due| now >= due) && self.park_empty {
            self.end_due = None;
            self.give_marks_up();
            self.emit_end();
        }
        if self.stage == Stage::Settling && self.barrier.is_none() && self.log_is_over(now) {
            self.take_own_frames(now);
        }
        if self.barrier.is_some_and(|barrier| self.injected >= barrier) {
            self.barrier = None;
            self.set_gate(Mode::Local, true);
            self.set_stage(Stage::Local);
            self.setup.spool.remove();
            if self.setup.gate.injected() == u64::MAX {
                // That was said of a hold which is over, and leaves no room for a note.
                self.setup.gate.set_injected(0);
            }
            if let Some(reply) = self.settle.take() {
                answer(reply, Ok(()));
            }
        }
        if let Some((until, reply)) = self.drain_tap.take() {
            // What waits for a full TAP is on its way into it.
            let empty = self.pending.is_empty() && !readable(&self.setup.tap);
            if empty || now >= until {
                answer(reply, empty);
            } else {
                self.drain_tap = Some((until, reply));
            }
        }
        self.go_on_resync(now);
    }

    /// Before the thread ends: what it has taken must not die with it, if the guest still reads.
    fn flush(&mut self) {
        let until = Instant::now() + Duration::from_millis(200);
        if self.stage != Stage::Local {
            return;
        }
        while !self.pending.is_empty() && Instant::now() < until {
            self.inject();
            if self.full {
                self.pause(FULL_PAUSE, false);
            }
        }
    }

    fn wait(&mut self) {
        let now = Instant::now();
        // Before it is opened, an incoming port only collects.
        let injects = self.stage != Stage::Incoming && !self.full;
        let more = injects && (!self.pending.is_empty() || self.log_left)
            || !self.park_empty && self.may_read_park();
        let mut timeout = if more { Duration::ZERO } else { IDLE };
        if self.full || self.drain_tap.is_some() {
            timeout = timeout.min(FULL_PAUSE);
        }
        if self.is_full() {
            timeout = timeout.min(FULL_LOOK);
        }
        let dues = [
            self.end_due,
            self.echo_due,
            self.marks_due,
            self.resync_due(),
        ];
        for due in dues.into_iter().flatten() {
            timeout = timeout.min(due.saturating_duration_since(now));
        }
        if self.stage == Stage::Settling {
            timeout = timeout.min(Duration::from_millis(1));
        }
        self.pause(timeout, self.may_read_park());
    }

    fn pause(&self, timeout: Duration, park: bool) {
        let wake = PollFd::new(self.setup.wake.as_fd(), PollFlags::POLLIN);
        let park = park.then(|| PollFd::new(self.setup.park.as_fd(), PollFlags::POLLIN));
        let mut fds: Vec<PollFd<'_>> = [Some(wake), park].into_iter().flatten().collect();
        // An interrupted wait only means to look again.
        let _ = nix::poll::ppoll(&mut fds, Some(TimeSpec::from_duration(timeout)), None);
        // Empty when nobody woke the thread.
        let _ = self.setup.wake.read();
    }
}

fn answer<T>(reply: Reply<T>, value: T) {
    // The asker may have given up; the deed is done all the same.
    let _ = reply.send(value);
}

/// Starts the thread of a port.
pub(crate) fn start(setup: Setup) -> io::Result<std::thread::JoinHandle<()>> {
    std::thread::Builder::new()
        .name(format!("port-{}", setup.gate.slot()))
        .spawn(move || {
            // Packets wait for it, and the guest waits for them. Where it may not, it works as well.
            let _ = vm_runtime::sched::favour_this_thread();
            Dataplane::new(setup).run();
        })
}
