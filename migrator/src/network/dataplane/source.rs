//! The source's part: hold, log, roll back or forward.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use migrator_ebpf::{Mode, Tunnel};
use nix::errno::Errno;
use tokio::sync::mpsc::UnboundedSender;

use super::super::allowance::OnOverflow;
use super::super::error::PortError;
use super::super::log::{InboundLog, LogItem, SourceLog};
use super::super::sys;
use super::{DISOWN_LIMIT, Dataplane, END_DELAY, Origin, Pending, Setup, Stage};

impl Setup {
    /// The log of a service that was killed while it held or forwarded. In every other stage, what lies in the spool is
    /// of a hold that is over.
    pub(super) fn take_log_back(&mut self) -> SourceLog {
        let dealt_with = self.gate.injected();
        if !matches!(self.stage, Stage::Holding | Stage::Forwarding) || dealt_with == u64::MAX {
            self.spool.remove();
            return SourceLog::new();
        }
        let Some(records) = self.spool.restore() else {
            // Nor may the service after this one read it.
            self.gate.set_injected(u64::MAX);
            return SourceLog::new();
        };
        let log = SourceLog::restored(records, dealt_with);
        tracing::info!(pod = %self.pod, frames = log.len(), "parked packets of the former service are taken back");
        log
    }
}

impl Dataplane {
    pub(super) fn hold(&mut self, sink: UnboundedSender<LogItem>) -> Result<(), PortError> {
        // A service that restarted finds its port holding, without a sink.
        self.expect("hold", &[Stage::Local, Stage::Holding])?;
        if self.stage == Stage::Local {
            self.mirror_offloads();
            self.log = SourceLog::new();
            self.end_due = None;
            (self.echo_due, self.echo_seen) = (None, false);
            (self.marks, self.marks_due) = (None, None);
            self.early_ack = 0;
            self.may_tunnel = false;
            self.begin_account();
            // Before the gate: the next service reads the spool of a port that holds, as far as the word tells it to.
            let kept = self.setup.spool.begin();
            self.setup
                .gate
                .set_injected(if kept { 0 } else { u64::MAX });
            self.set_gate(Mode::Hold, true);
            self.set_stage(Stage::Holding);
        }
        self.attach_sink(sink);
        Ok(())
    }

    pub(super) fn attach_sink(&mut self, sink: UnboundedSender<LogItem>) {
        for item in self.log.unacknowledged() {
            // A closed sink means a lost connection; what is kept goes to the next one.
            let _ = sink.send(item);
        }
        self.sink = Some(sink);
    }

    /// Appends to the spool, and to what goes to the sink, with the next [`commit`](Self::commit).
    pub(super) fn emit(&mut self, item: LogItem, bucket: Option<u8>) {
        self.setup.spool.push(&item, bucket);
        if self.sink.is_some() {
            self.outbox.push(item);
        }
    }

    /// First the file: a number that was sent must not be given to another frame by the next service.
    pub(super) fn commit(&mut self) {
        self.setup.spool.write();
        for item in self.outbox.drain(..) {
            if let Some(sink) = &self.sink {
                // As above: kept until it is acknowledged.
                let _ = sink.send(item);
            }
        }
    }

    /// The announcement has come back, behind the last frame that the network sent here by what it knew before. What is left
    /// of the old way are senders on this node's own bridge, whose entry for the pod the port owns: it gives that up, and
    /// answers with [`Command::End`](super::Command::End).
    pub(super) fn echo(&mut self, now: Instant) {
        if !std::mem::replace(&mut self.echo_seen, true) {
            self.echo_due = Some(now + END_DELAY);
            self.end_due = None;
            self.end_within(DISOWN_LIMIT, now);
        }
    }

    /// Senders on the node's own bridge take the new way. It may have been found out just before a rollback.
    pub(super) fn own_bridge_has_changed(&mut self) {
        if matches!(self.stage, Stage::Holding | Stage::Forwarding) {
            self.end_within(Duration::ZERO, Instant::now());
        }
    }

    /// The end marker follows after this time, if none is due earlier.
    pub(super) fn end_within(&mut self, delay: Duration, now: Instant) {
        if !self.log.ended() {
            let due = now + delay;
            self.end_due = Some(self.end_due.map_or(due, |earlier| earlier.min(due)));
        }
    }

    pub(super) fn emit_end(&mut self) {
        if let Some(item) = self.log.end() {
            self.emit(item, None);
            self.commit();
        }
    }

    pub(super) fn residue(&mut self) -> Result<u64, PortError> {
        self.expect("take the residue", &[Stage::Holding])?;
        if self.left.is_some() {
            self.read_park(Instant::now());
        }
        let result = self.read_residue();
        self.commit();
        if self.left.is_none() {
            self.setup.landing.clear();
        }
        result
    }

    fn read_residue(&mut self) -> Result<u64, PortError> {
        let tap_error = |source| PortError::Tap {
            pod: self.setup.pod.clone(),
            source,
        };
        // The guest has stopped: from here on only the node that gets the grant may send.
        self.set_gate(Mode::Hold, false);
        let header = sys::vnet_header_len(self.setup.tap.as_fd()).map_err(tap_error)?;
        let mut count = 0;
        loop {
            match self.take_residue(header) {
                Ok(is_one) => count += u64::from(is_one),
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                Err(errno) => {
                    return Err(PortError::Tap {
                        pod: self.setup.pod.clone(),
                        source: errno.into(),
                    });
                }
            }
        }
        // What was still on its way into a full TAP belongs behind it.
        for pending in std::mem::take(&mut self.pending) {
            self.injected += 1;
            if let Origin::Own { bucket, number } = pending.origin {
                count += 1;
                if number.is_none() {
                    self.becomes_residue();
                }
                let item = self.log.residue(pending.frame, bucket);
                self.emit(item, bucket);
            }
        }
        if let Some(item) = self.log.residue_end() {
            self.emit(item, None);
        }
        Ok(count)
    }

    pub(super) fn ack(&mut self, seq: u64) {
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
        // The destination cannot have more than it was given.
        self.setup.gate.raise_injected(seq.min(self.log.last()));
        self.enter_tunnel();
        if self.log.len() == 0 {
            self.setup.spool.shorten(&self.log.marks());
        }
    }

    pub(super) fn rollback(&mut self) -> Result<(), PortError> {
        self.expect("roll back", &[Stage::Holding])?;
        self.set_gate(Mode::Hold, true);
        self.sink = None;
        (self.end_due, self.echo_due) = (None, None);
        (self.marks, self.marks_due) = (None, None);
        for kept in self.log.take_all() {
            self.pending.push_back(Pending {
                frame: kept.frame,
                origin: Origin::Own {
                    bucket: kept.bucket,
                    number: Some(kept.seq),
                },
            });
        }
        self.barrier = Some(self.injected + self.pending.len() as u64);
        self.on_overflow = OnOverflow::default();
        self.set_stage(Stage::RollingBack);
        Ok(())
    }

    pub(super) fn forward(&mut self) -> Result<(), PortError> {
        self.expect("forward", &[Stage::Holding])?;
        self.set_gate(Mode::Forward, false);
        self.set_stage(Stage::Forwarding);
        self.ack(self.early_ack);
        if !self.echo_seen {
            self.end_within(self.setup.end_limit(), Instant::now());
        }
        Ok(())
    }

    pub(super) fn may_tunnel(&mut self, tunnel: Tunnel) -> Result<(), PortError> {
        self.expect("use the tunnel", &[Stage::Forwarding])?;
        if self.setup.gate.get().mode == Mode::Tunnel {
            return Ok(());
        }
        self.setup.gate.set_tunnel(tunnel)?;
        self.may_tunnel = true;
        self.enter_tunnel();
        Ok(())
    }

    /// Lets flows that wait for nothing go through the tunnel, once the destination has injected the end of the log: from there on
    /// it tells the old way from the new by nothing but the time of arrival. There is no way back, as a frame in the tunnel could be
    /// overtaken by one that is relayed.
    fn enter_tunnel(&mut self) {
        if self.may_tunnel && self.log.end_acknowledged() {
            self.may_tunnel = false;
            self.set_gate(Mode::Tunnel, false);
        }
    }

    pub(super) fn drain(&mut self) {
        while self.read_park(Instant::now()) {}
        if matches!(self.stage, Stage::Holding | Stage::Forwarding) {
            if self.stage == Stage::Forwarding {
                self.emit_end();
            }
            // Handed to the wire: from here on they are in its hands.
            self.tally.forwarded += self.log.take_all().len() as u64;
        }
        let given_up = self.tally().held;
        self.tally.removed += given_up;
        self.pending.clear();
        self.setup.landing.clear();
        self.inbound = InboundLog::new();
        self.sink = None;
        self.set_stage(Stage::Released);
    }
}
