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

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use migrator_ebpf::{FrameBytes, Gate, Mode, bucket, is_group, is_own_echo};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};
use nix::sys::eventfd::EventFd;
use nix::sys::time::TimeSpec;
use tokio::sync::{mpsc::UnboundedSender, oneshot, watch};
use vm_runtime::units::MacAddress;

use super::copies::Copies;
use super::error::PortError;
use super::gate::SlotGate;
use super::ledger::Tally;
use super::log::{InboundLog, LogItem, LogKind, SourceLog};
use super::sys::{self, FRAME_MAX, PacketSocket, Sent, VNET_HEADER};

/// From the echo of the announcement to the end marker: frames that came before it may still be in
/// the backlog of another CPU.
const END_DELAY: Duration = Duration::from_millis(2);
/// How long the destination waits for the end marker, from the opening of its gate.
const END_LIMIT: Duration = Duration::from_millis(50);
/// The same while not even the residue has come.
const RESIDUE_LIMIT: Duration = Duration::from_secs(2);
/// Pause before the next attempt at a full TAP.
const FULL_PAUSE: Duration = Duration::from_micros(250);
/// Longest sleep: a safety net, since every event wakes the thread.
const IDLE: Duration = Duration::from_millis(500);
/// Frames taken from the park before commands are looked at again.
const BATCH: usize = 256;
/// Frames that wait for a full TAP before the park is left to fill as well.
const PENDING_MAX: usize = 65536;
/// Bytes of unacknowledged log before the park is left to fill as well.
const LOG_BYTES_MAX: usize = 512 << 20;
/// Shortest Ethernet frame: its header.
const ETHERNET_MIN: usize = 14;

/// Where a port stands in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// The pod lives here and gets its frames.
    Local,
    /// Source: frames are parked, logged and kept.
    Holding,
    /// Source: the log goes back into the pod's own TAP.
    RollingBack,
    /// Source: the pod lives elsewhere; frames are relayed.
    Forwarding,
    /// Destination: the gate is shut; the log is injected.
    Incoming,
    /// Destination: the pod lives here; its own frames wait behind the log.
    Opened,
    /// Destination: waits for the end of the log.
    Settling,
    /// Nothing is taken any more.
    Released,
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Local => "local",
            Self::Holding => "holding",
            Self::RollingBack => "rolling back",
            Self::Forwarding => "forwarding",
            Self::Incoming => "incoming",
            Self::Opened => "opened",
            Self::Settling => "settling",
            Self::Released => "released",
        })
    }
}

type Reply<T> = oneshot::Sender<T>;

/// What the port asks of its thread.
#[derive(Debug)]
pub(crate) enum Command {
    Hold(UnboundedSender<LogItem>, Reply<Result<(), PortError>>),
    Resend(UnboundedSender<LogItem>, Reply<Result<(), PortError>>),
    DrainTap(Instant, Reply<bool>),
    Residue(Reply<Result<u64, PortError>>),
    Ack(u64),
    Rollback(Reply<Result<(), PortError>>),
    Forward(Reply<Result<(), PortError>>),
    Input(LogItem),
    Open(Reply<Result<(), PortError>>),
    Settle(Reply<Result<(), PortError>>),
    /// Bring buckets that wait for lost frames up to date; whether to book those frames as lost in a crash.
    Resync(bool),
    Tally(Reply<Tally>),
    /// Shut the gate: whatever still comes counts elsewhere.
    Shut(Reply<()>),
    /// Take what is in the park, then take nothing more.
    Drain(Reply<Tally>),
    /// End the thread, and leave everything as it is for the next service.
    Detach,
}

/// Why a frame is to be injected.
#[derive(Clone, Copy, Debug)]
enum Origin {
    /// An item of the log; an empty frame only moves the acknowledgement.
    Log(u64),
    /// Parked here, or rolled back.
    Own(Option<u8>),
}

#[derive(Debug)]
struct Pending {
    frame: Bytes,
    origin: Origin,
}

#[derive(Debug)]
struct OwnFrame {
    frame: Bytes,
    bucket: u8,
    arrived: Instant,
}

/// What the thread is made of.
pub(crate) struct Setup {
    pub(crate) pod: String,
    pub(crate) tap_name: String,
    pub(crate) mac: MacAddress,
    pub(crate) gate: SlotGate,
    pub(crate) tap: OwnedFd,
    pub(crate) park: OwnedFd,
    pub(crate) injector: PacketSocket,
    pub(crate) stage: Stage,
    pub(crate) commands: Receiver<Command>,
    pub(crate) wake: Arc<EventFd>,
    pub(crate) acked: watch::Sender<u64>,
    pub(crate) stages: watch::Sender<Stage>,
}

pub(crate) struct Dataplane {
    setup: Setup,
    stage: Stage,
    buffer: Box<[u8]>,
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
    sink: Option<UnboundedSender<LogItem>>,
    end_due: Option<Instant>,
    early_ack: u64,
    drain_tap: Option<(Instant, Reply<bool>)>,
    // destination
    inbound: InboundLog,
    copies: Copies,
    own: Vec<OwnFrame>,
    opened_at: Option<Instant>,
    end_seen: bool,
    injected_seq: u64,
    settle: Option<Reply<Result<(), PortError>>>,
    /// Counters of `parked` that everything before must have reached, after a loss.
    resync: Option<(Box<[u64; 256]>, bool)>,
}

impl Dataplane {
    pub(crate) fn new(setup: Setup) -> Self {
        Self {
            stage: setup.stage,
            setup,
            buffer: vec![0; FRAME_MAX + 64].into_boxed_slice(),
            park_empty: false,
            pending: VecDeque::new(),
            injected: 0,
            barrier: None,
            full: false,
            tally: Tally::default(),
            log: SourceLog::new(),
            sink: None,
            end_due: None,
            early_ack: 0,
            drain_tap: None,
            inbound: InboundLog::new(),
            copies: Copies::default(),
            own: Vec::new(),
            opened_at: None,
            end_seen: false,
            injected_seq: 0,
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
            Command::DrainTap(until, reply) => self.drain_tap = Some((until, reply)),
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
            Command::Resync(crashed) => self.start_resync(crashed),
            Command::Tally(reply) => {
                let tally = self.tally();
                answer(reply, tally);
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
        let held = self.log.len() + self.own.len() + pending + self.inbound.waiting();
        Tally {
            held: held as u64,
            ..self.tally
        }
    }

    // The source.

    fn hold(&mut self, sink: UnboundedSender<LogItem>) -> Result<(), PortError> {
        // A service that restarted finds its port holding, without a sink.
        self.expect("hold", &[Stage::Local, Stage::Holding])?;
        if self.stage == Stage::Local {
            self.mirror_offloads();
            self.log = SourceLog::new();
            self.end_due = None;
            self.early_ack = 0;
            self.set_gate(Mode::Hold, true);
            self.set_stage(Stage::Holding);
        }
        self.attach_sink(sink);
        Ok(())
    }

    fn attach_sink(&mut self, sink: UnboundedSender<LogItem>) {
        for item in self.log.unacknowledged() {
            // A closed sink means a lost connection; what is kept goes to the next one.
            let _ = sink.send(item);
        }
        self.sink = Some(sink);
    }

    fn emit(&self, item: LogItem) {
        if let Some(sink) = &self.sink {
            // As above: kept until it is acknowledged.
            let _ = sink.send(item);
        }
    }

    fn residue(&mut self) -> Result<u64, PortError> {
        self.expect("take the residue", &[Stage::Holding])?;
        let tap_error = |source| PortError::Tap {
            pod: self.setup.pod.clone(),
            source,
        };
        // The guest has stopped: from here on only the node that gets the grant may send.
        self.set_gate(Mode::Hold, false);
        let header = sys::vnet_header_len(self.setup.tap.as_fd()).map_err(tap_error)?;
        let mut count = 0;
        loop {
            let read = match nix::unistd::read(self.setup.tap.as_fd(), &mut self.buffer) {
                Ok(read) => read,
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => continue,
                Err(errno) => {
                    return Err(PortError::Tap {
                        pod: self.setup.pod.clone(),
                        source: errno.into(),
                    });
                }
            };
            let Some(frame) = normalise(&self.buffer[..read], header) else {
                continue;
            };
            self.tally.residue += 1;
            count += 1;
            let item = self.log.residue(frame, None);
            self.emit(item);
        }
        // What was still on its way into a full TAP belongs behind it.
        for pending in std::mem::take(&mut self.pending) {
            self.injected += 1;
            if let Origin::Own(bucket) = pending.origin {
                count += 1;
                let item = self.log.residue(pending.frame, bucket);
                self.emit(item);
            }
        }
        if let Some(item) = self.log.residue_end() {
            self.emit(item);
        }
        Ok(count)
    }

    fn ack(&mut self, seq: u64) {
        // Before the grant everything must stay, for a rollback.
        if self.stage != Stage::Forwarding {
            self.early_ack = self.early_ack.max(seq);
            return;
        }
        for kept in self.log.ack(seq) {
            self.tally.forwarded += 1;
            if let Some(bucket) = kept.bucket {
                self.setup.gate.add_done(bucket);
            }
        }
    }

    fn rollback(&mut self) -> Result<(), PortError> {
        self.expect("roll back", &[Stage::Holding])?;
        self.set_gate(Mode::Hold, true);
        self.sink = None;
        self.end_due = None;
        for kept in self.log.take_all() {
            self.pending.push_back(Pending {
                frame: kept.frame,
                origin: Origin::Own(kept.bucket),
            });
        }
        self.barrier = Some(self.injected + self.pending.len() as u64);
        self.set_stage(Stage::RollingBack);
        Ok(())
    }

    fn forward(&mut self) -> Result<(), PortError> {
        self.expect("forward", &[Stage::Holding])?;
        self.set_gate(Mode::Forward, false);
        self.set_stage(Stage::Forwarding);
        self.ack(self.early_ack);
        Ok(())
    }

    fn drain(&mut self) {
        while self.read_park(Instant::now()) {}
        if matches!(self.stage, Stage::Holding | Stage::Forwarding) {
            if self.stage == Stage::Forwarding {
                if let Some(item) = self.log.end() {
                    self.emit(item);
                }
            }
            // Handed to the wire: from here on they are in its hands.
            self.tally.forwarded += self.log.take_all().len() as u64;
        }
        let given_up = self.tally().held;
        self.tally.removed += given_up;
        self.pending.clear();
        self.own.clear();
        self.inbound = InboundLog::new();
        self.sink = None;
        self.set_stage(Stage::Released);
    }

    // The destination.

    fn input(&mut self, item: LogItem) {
        let is_frame = matches!(item.kind, LogKind::Residue | LogKind::Frame);
        if self.inbound.push(item) && is_frame {
            self.tally.log_received += 1;
        }
    }

    /// Moves items whose turn it is from the log to the TAP's queue.
    fn take_log(&mut self, now: Instant) {
        while self.pending.len() < PENDING_MAX {
            let Some(item) = self.inbound.pop() else {
                break;
            };
            let mut frame = item.frame;
            match item.kind {
                LogKind::Residue | LogKind::Frame => {
                    let bytes = frame.get(VNET_HEADER..).unwrap_or_default();
                    if bytes.len() < ETHERNET_MIN {
                        self.tally.invalid += 1;
                        frame = Bytes::new();
                    } else if is_group(&FrameBytes(bytes)) {
                        if self.end_seen {
                            self.tally.group += 1;
                            frame = Bytes::new();
                        } else {
                            self.copies.logged(&frame, now);
                        }
                    }
                }
                LogKind::ResidueEnd => frame = Bytes::new(),
                LogKind::End => {
                    frame = Bytes::new();
                    self.end_seen = true;
                }
            }
            self.pending.push_back(Pending {
                frame,
                origin: Origin::Log(item.seq),
            });
        }
    }

    fn open(&mut self) -> Result<(), PortError> {
        self.expect("open", &[Stage::Incoming])?;
        self.mirror_offloads();
        self.set_gate(Mode::Hold, true);
        self.opened_at = Some(Instant::now());
        self.set_stage(Stage::Opened);
        // The source may free its log only now that it cannot roll back any more.
        self.setup.acked.send_replace(self.injected_seq);
        Ok(())
    }

    /// The end of the log has come, or was waited for long enough.
    fn log_is_over(&mut self, now: Instant) -> bool {
        let waited = self.opened_at.map_or(RESIDUE_LIMIT, |opened| {
            now.saturating_duration_since(opened)
        });
        if self.end_seen {
            return true;
        }
        let limit = if self.inbound.residue_ended() {
            END_LIMIT
        } else {
            RESIDUE_LIMIT
        };
        if waited < limit {
            return false;
        }
        self.tally.end_timeouts += 1;
        true
    }

    fn release_own_frames(&mut self) {
        self.barrier = Some(self.injected + self.pending.len() as u64);
        for own in std::mem::take(&mut self.own) {
            let bytes = own.frame.get(VNET_HEADER..).unwrap_or_default();
            let twin = is_group(&FrameBytes(bytes)) && self.copies.is_twin(&own.frame, own.arrived);
            if twin {
                self.tally.duplicate += 1;
                self.setup.gate.add_done(own.bucket);
                continue;
            }
            self.pending.push_back(Pending {
                frame: own.frame,
                origin: Origin::Own(Some(own.bucket)),
            });
        }
        self.copies = Copies::default();
    }

    // Both.

    /// The park takes whole what the TAP takes whole. The guest decides that, so it is asked late.
    fn mirror_offloads(&self) {
        let whole = sys::takes_tcp_segments(&self.setup.tap_name).unwrap_or(false);
        if let Err(error) = sys::set_park_offloads(self.setup.park.as_fd(), whole) {
            tracing::warn!(pod = %self.setup.pod, %error, "could not set the offloads of the park");
        }
    }

    fn may_read_park(&self) -> bool {
        self.pending.len() < PENDING_MAX
            && self.log.kept_bytes() < LOG_BYTES_MAX
            && self.own.len() < PENDING_MAX
            && self.stage != Stage::Released
    }

    /// Takes a batch from the park. True: there may be more.
    fn read_park(&mut self, now: Instant) -> bool {
        self.park_empty = false;
        for _ in 0..BATCH {
            if !self.may_read_park() {
                return false;
            }
            match nix::unistd::read(self.setup.park.as_fd(), &mut self.buffer) {
                Ok(read) => {
                    if let Some(frame) = normalise(&self.buffer[..read], VNET_HEADER) {
                        self.parked(frame, now);
                    }
                }
                Err(Errno::EINTR) => {}
                Err(errno) => {
                    if errno != Errno::EAGAIN {
                        tracing::error!(pod = %self.setup.pod, %errno, "could not read the park");
                    }
                    self.park_empty = true;
                    return false;
                }
            }
        }
        true
    }

    fn parked(&mut self, frame: Bytes, now: Instant) {
        let bytes = FrameBytes(&frame[VNET_HEADER..]);
        let bucket = bucket(&bytes);
        let echo = is_own_echo(&bytes, self.setup.mac.0);
        let group = is_group(&bytes);
        if echo && self.stage != Stage::Local {
            // Shown by the gate, and booked there. At the source it is the end marker.
            if matches!(self.stage, Stage::Holding | Stage::Forwarding) {
                self.end_due.get_or_insert(now + END_DELAY);
            }
            return;
        }
        self.tally.park_read += 1;
        match self.stage {
            Stage::Local | Stage::RollingBack => self.pending.push_back(Pending {
                frame,
                origin: Origin::Own(Some(bucket)),
            }),
            Stage::Forwarding if group && self.log.ended() => {
                self.tally.group += 1;
                self.setup.gate.add_done(bucket);
            }
            Stage::Holding | Stage::Forwarding => {
                let item = self.log.frame(frame, bucket);
                self.emit(item);
            }
            Stage::Incoming | Stage::Opened | Stage::Settling => self.own.push(OwnFrame {
                frame,
                bucket,
                arrived: now,
            }),
            Stage::Released => self.tally.removed += 1,
        }
    }

    /// Fills the TAP's queue.
    fn inject(&mut self) {
        self.full = false;
        while let Some(next) = self.pending.front() {
            let sent = if next.frame.is_empty() {
                Sent::Queued
            } else {
                self.setup.injector.send(&next.frame)
            };
            match sent {
                Sent::Queued => {}
                Sent::Full => {
                    self.tally.full += 1;
                    self.full = true;
                    break;
                }
                Sent::Refused(errno) => {
                    self.tally.invalid += 1;
                    tracing::warn!(pod = %self.setup.pod, %errno, len = next.frame.len(), "a frame was refused");
                }
            }
            let taken = sent == Sent::Queued && !next.frame.is_empty();
            let origin = next.origin;
            self.pending.pop_front();
            self.injected += 1;
            match origin {
                Origin::Log(seq) => {
                    self.tally.log_injected += u64::from(taken);
                    self.injected_seq = seq;
                }
                Origin::Own(bucket) => {
                    self.tally.own_injected += u64::from(taken);
                    if let Some(bucket) = bucket {
                        self.setup.gate.add_done(bucket);
                    }
                }
            }
        }
        if self.opened_at.is_some() && *self.setup.acked.borrow() < self.injected_seq {
            self.setup.acked.send_replace(self.injected_seq);
        }
    }

    /// Everything that happens by itself.
    fn advance(&mut self, now: Instant) {
        if self.end_due.is_some_and(|due| now >= due) && self.park_empty {
            self.end_due = None;
            if let Some(item) = self.log.end() {
                self.emit(item);
            }
        }
        if self.stage == Stage::Settling && self.barrier.is_none() && self.log_is_over(now) {
            self.release_own_frames();
        }
        if self.barrier.is_some_and(|barrier| self.injected >= barrier) {
            self.barrier = None;
            self.set_gate(Mode::Local, true);
            self.set_stage(Stage::Local);
            if let Some(reply) = self.settle.take() {
                answer(reply, Ok(()));
            }
        }
        if let Some((until, reply)) = self.drain_tap.take() {
            let empty = !readable(&self.setup.tap);
            if empty || now >= until {
                answer(reply, empty);
            } else {
                self.drain_tap = Some((until, reply));
            }
        }
        self.finish_resync();
    }

    fn start_resync(&mut self, crashed: bool) {
        if self.stage != Stage::Local {
            return;
        }
        let gate = &self.setup.gate;
        let mut counters = Box::new([0; 256]);
        for (bucket, counter) in (0..=u8::MAX).zip(counters.iter_mut()) {
            *counter = gate.parked(bucket);
        }
        // After it, every frame that those counters stand for is in the park's queue, or lost.
        if let Err(error) = sys::grace_period() {
            tracing::warn!(%error, "no grace period: flows behind a lost frame keep taking the slow way");
            return;
        }
        self.park_empty = false;
        self.resync = Some((counters, crashed));
    }

    fn finish_resync(&mut self) {
        if !self.park_empty || !self.pending.is_empty() || self.stage != Stage::Local {
            return;
        }
        let Some((counters, crashed)) = self.resync.take() else {
            return;
        };
        for (bucket, counter) in (0..=u8::MAX).zip(counters.iter()) {
            let missing = counter.wrapping_sub(self.setup.gate.done(bucket)) as i64;
            if missing > 0 {
                self.setup.gate.set_done(bucket, *counter);
                if crashed {
                    self.tally.crash += missing as u64;
                }
            }
        }
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
        let mut timeout = if self.park_empty || !self.may_read_park() {
            IDLE
        } else {
            Duration::ZERO
        };
        if self.full || self.drain_tap.is_some() {
            timeout = timeout.min(FULL_PAUSE);
        }
        if let Some(due) = self.end_due {
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

fn readable(fd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    matches!(nix::poll::poll(&mut fds, nix::poll::PollTimeout::ZERO), Ok(n) if n > 0)
}

/// Cuts the header to the 10 bytes that all of its versions begin with. `None`: not even a header.
fn normalise(bytes: &[u8], header: usize) -> Option<Bytes> {
    if header < VNET_HEADER || bytes.len() < header + ETHERNET_MIN {
        return None;
    }
    if header == VNET_HEADER {
        return Some(Bytes::copy_from_slice(bytes));
    }
    Some([&bytes[..VNET_HEADER], &bytes[header..]].concat().into())
}

/// Starts the thread of a port.
pub(crate) fn start(setup: Setup) -> io::Result<std::thread::JoinHandle<()>> {
    std::thread::Builder::new()
        .name(format!("port-{}", setup.gate.slot()))
        .spawn(move || Dataplane::new(setup).run())
}
