//! Packets in the service's hands: out of their queue, and in nothing else yet that outlives it. One at a time, and that one lies where the next
//! service finds it.

use std::os::fd::AsFd;

use bytes::Bytes;
use migrator_ebpf::{FrameBytes, bucket};
use nix::errno::Errno;

use super::super::landing::{Label, Source};
use super::super::log::SourceLog;
use super::super::marker::is_marker;
use super::super::sys::VNET_HEADER;
use super::{Dataplane, Setup, Stage, normalise};

impl Setup {
    /// The packet that a former service had in its hands, unless it had dealt with it. One out of the TAP joins the log; another comes before
    /// everything that is in the park.
    pub(super) fn take_landed(&mut self, log: &mut SourceLog) -> Option<Bytes> {
        let injected = self.gate.own_injected();
        let left = self.landing.left().and_then(|(packet, label)| {
            let frame = normalise(&packet, label.header)?;
            self.take_back(frame, label, injected, log)
        });
        match &left {
            Some(_) => {
                tracing::info!(pod = %self.pod, "a packet that the former service had just read is taken back");
            }
            None => self.landing.clear(),
        }
        if injected {
            self.gate.forget_own();
        }
        left
    }

    /// What is still to be done with such a packet, beyond this.
    fn take_back(
        &mut self,
        frame: Bytes,
        label: Label,
        injected: bool,
        log: &mut SourceLog,
    ) -> Option<Bytes> {
        match label.number {
            None if injected => {
                // The former service was about to say so.
                self.tally.park_read += 1;
                self.tally.own_injected += 1;
                let bucket = bucket(&FrameBytes(&frame[VNET_HEADER..]));
                self.gate.add_done(bucket);
                None
            }
            Some(number) if log.has_given_out(number) || is_marker(&frame) => None,
            Some(_) if label.source == Source::Tap => {
                let item = log.residue(frame, None);
                self.spool.push(&item, None);
                self.spool.write();
                None
            }
            Some(_) | None => Some(frame),
        }
    }
}

impl Dataplane {
    /// Of a packet that is parked: its number, if it goes to the log.
    fn label(&self) -> Label {
        let number = match self.stage {
            Stage::Holding | Stage::Forwarding | Stage::RollingBack => Some(self.log.next_frame()),
            Stage::Local | Stage::Settling | Stage::Incoming | Stage::Opened | Stage::Released => {
                None
            }
        };
        Label {
            source: Source::Park,
            header: VNET_HEADER,
            number,
        }
    }

    /// Whether the packet that was read last is dealt with.
    pub(super) fn hands_are_free(&self) -> bool {
        self.left.is_some() || !self.setup.landing.is_taken()
    }

    /// The next packet of the park, which is in this thread's hands then. `None`: it was none.
    pub(super) fn next_parked(&mut self) -> Result<Option<Bytes>, Errno> {
        let label = self.label();
        let Setup { landing, park, .. } = &mut self.setup;
        let frame = match self.left.take() {
            Some(frame) => {
                landing.relabel(label);
                Some(frame)
            }
            None => normalise(landing.read(park.as_fd(), label)?, VNET_HEADER),
        };
        if frame.is_none() {
            landing.clear();
        }
        Ok(frame)
    }

    /// The next packet that is left in the TAP, whose frames have so many bytes of header. It is in the log when this returns; false: it was none of
    /// the network's.
    pub(super) fn take_residue(&mut self, header: usize) -> Result<bool, Errno> {
        let free = !self.setup.landing.is_taken();
        let label = Label {
            source: Source::Tap,
            header,
            number: Some(self.log.next_residue()),
        };
        let Setup { landing, tap, .. } = &mut self.setup;
        let frame = normalise(landing.read(tap.as_fd(), label)?, header);
        let frame = frame.filter(|frame| !is_marker(frame));
        let is_one = frame.is_some();
        if let Some(frame) = frame {
            self.tally.residue += 1;
            let item = self.log.residue(frame, None);
            self.emit(item, None);
            self.commit();
        }
        // Else it is another packet's place.
        if free {
            self.setup.landing.clear();
        }
        Ok(is_one)
    }

    /// The packet in this thread's hands, which was to be injected, gets the next number of the residue.
    pub(super) fn becomes_residue(&mut self) {
        let number = Some(self.log.next_residue());
        let label = self.label();
        self.setup.landing.relabel(Label { number, ..label });
    }

    /// Nothing is read any more before the next hold, if no bucket waits: frames go past the park then.
    pub(super) fn leave_landing(&mut self) {
        let Setup { landing, gate, .. } = &mut self.setup;
        if self.stage == Stage::Local && landing.is_there() && gate.waiting() == 0 {
            landing.remove();
        }
    }

    /// The packet in this thread's hands goes nowhere. Its bucket may be told only afterwards: nobody must count it twice.
    pub(super) fn let_go(&mut self, bucket: Option<u8>) {
        self.setup.landing.clear();
        if let Some(bucket) = bucket {
            self.setup.gate.add_done(bucket);
        }
    }
}
