//! Out of the park, into the TAP, and the counters that keep the two in order.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use bytes::Bytes;
use migrator_ebpf::{EndMarker, FrameBytes, bucket, is_group, is_own_echo};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};

use super::super::copies::Copies;
use super::super::sys::{self, Sent, VNET_HEADER};
use super::{BATCH, Dataplane, ETHERNET_MIN, PENDING_MAX, Stage};

/// Why a frame is to be injected.
#[derive(Clone, Copy, Debug)]
pub(super) enum Origin {
    /// An item of the log, and what stands for it once it is injected; an empty frame only moves the acknowledgement.
    Log { seq: u64, mark: u64 },
    /// Parked here, and still where it has landed. Or rolled back: then with its number in the log, where the next service would find it.
    Own {
        bucket: Option<u8>,
        number: Option<u64>,
    },
}

#[derive(Debug)]
pub(super) struct Pending {
    pub(super) frame: Bytes,
    pub(super) origin: Origin,
}

pub(super) fn readable(fd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    matches!(nix::poll::poll(&mut fds, nix::poll::PollTimeout::ZERO), Ok(n) if n > 0)
}

/// Cuts the header to the 10 bytes that all of its versions begin with. `None`: not even a header.
pub(super) fn normalise(bytes: &[u8], header: usize) -> Option<Bytes> {
    if header < VNET_HEADER || bytes.len() < header + ETHERNET_MIN {
        return None;
    }
    if header == VNET_HEADER {
        return Some(Bytes::copy_from_slice(bytes));
    }
    Some([&bytes[..VNET_HEADER], &bytes[header..]].concat().into())
}

impl Dataplane {
    /// The park takes whole what the TAP takes whole. The guest decides that, so it is asked late.
    pub(super) fn mirror_offloads(&self) {
        let whole = sys::takes_tcp_segments(&self.setup.tap_name).unwrap_or(false);
        if let Err(error) = sys::set_park_offloads(self.setup.park.as_fd(), whole) {
            tracing::warn!(pod = %self.setup.pod, %error, "could not set the offloads of the park");
        }
    }

    pub(super) fn may_read_park(&self) -> bool {
        self.pending.len() < PENDING_MAX
            && self.hands_are_free()
            && match self.stage {
                // In the kernel's queue they outlive this service.
                Stage::Incoming | Stage::Opened => false,
                Stage::Settling => self.barrier.is_some(),
                Stage::Local | Stage::RollingBack => true,
                Stage::Holding | Stage::Forwarding => self.drops_newest() || !self.is_full(),
                Stage::Released => false,
            }
    }

    /// Takes a batch from the park. True: there may be more.
    pub(super) fn read_park(&mut self, now: Instant) -> bool {
        let more = self.read_batch(now);
        self.commit();
        more
    }

    fn read_batch(&mut self, now: Instant) -> bool {
        self.park_empty = false;
        for _ in 0..BATCH {
            if !self.may_read_park() {
                return false;
            }
            match self.next_parked() {
                Ok(Some(frame)) => self.take_parked(frame, now),
                Ok(None) => {}
                Err(Errno::EINTR) => {}
                Err(errno) => {
                    if errno != Errno::EAGAIN {
                        tracing::error!(pod = %self.setup.pod, %errno, "could not read the park");
                    }
                    self.park_empty = true;
                    if matches!(self.stage, Stage::Local | Stage::Settling) {
                        // Nothing that came while there were two ways is left.
                        self.copies = Copies::default();
                        self.leave_landing();
                    }
                    return false;
                }
            }
        }
        true
    }

    /// One after the other: what is still in the park outlives this service, and so does what it has in its hands.
    fn take_parked(&mut self, frame: Bytes, now: Instant) {
        self.parked(frame, now);
        match self.stage {
            // What the TAP does not take now stays in its place.
            Stage::Local | Stage::Settling => self.inject(),
            Stage::Holding
            | Stage::Forwarding
            | Stage::RollingBack
            | Stage::Incoming
            | Stage::Opened
            | Stage::Released => {
                self.commit();
                self.setup.landing.clear();
            }
        }
    }

    fn parked(&mut self, frame: Bytes, now: Instant) {
        let bytes = FrameBytes(&frame[VNET_HEADER..]);
        if self.setup.routed
            && let Some(marker) = EndMarker::of(&bytes)
        {
            self.let_go(None);
            return self.marker(marker, now);
        }
        let bucket = bucket(&bytes);
        let echo = is_own_echo(&bytes, self.setup.mac.0);
        let group = is_group(&bytes);
        if echo && self.stage != Stage::Local {
            // Shown by the gate, and booked there.
            self.let_go(None);
            if matches!(self.stage, Stage::Holding | Stage::Forwarding) {
                self.echo(now);
            }
            return;
        }
        self.tally.park_read += 1;
        if matches!(self.stage, Stage::Local | Stage::Settling) && self.is_twin(&frame) {
            self.tally.duplicate += 1;
            return self.let_go(Some(bucket));
        }
        match self.stage {
            Stage::Local | Stage::Settling => self.pending.push_back(Pending {
                frame,
                origin: Origin::Own {
                    bucket: Some(bucket),
                    number: None,
                },
            }),
            Stage::RollingBack => {
                let item = self.log.numbered(frame);
                self.setup.spool.push(&item, Some(bucket));
                self.pending.push_back(Pending {
                    frame: item.frame,
                    origin: Origin::Own {
                        bucket: Some(bucket),
                        number: Some(item.seq),
                    },
                });
            }
            Stage::Forwarding if group && self.log.ended() => {
                self.tally.group += 1;
                self.let_go(Some(bucket));
            }
            // Not read at all, unless they are to be dropped.
            Stage::Holding | Stage::Forwarding if self.is_full() => {
                self.tally.overflow += 1;
                self.let_go(Some(bucket));
            }
            Stage::Holding | Stage::Forwarding => {
                let item = self.log.frame(frame, bucket);
                self.emit(item, Some(bucket));
                self.account();
            }
            Stage::Incoming | Stage::Opened | Stage::Released => self.tally.removed += 1,
        }
    }

    /// Whether the TAP takes a frame whole: the kernel would else cut a segment before the VMM has loaded the guest that takes it.
    fn takes(&self, frame: &[u8]) -> bool {
        // What cannot be asked is sent.
        !sys::is_segment(frame) || sys::takes_tcp_segments(&self.setup.tap_name).unwrap_or(true)
    }

    /// The number that is to be noted when a frame is in the TAP, where `noted` is what is so far.
    fn note(&self, origin: Origin, noted: u64) -> Option<u64> {
        match origin {
            Origin::Log { mark, .. } => Some(mark),
            // Later, the word may be another hold's.
            Origin::Own { number, .. } if self.stage == Stage::RollingBack => {
                number.filter(|number| *number > noted)
            }
            Origin::Own { .. } => None,
        }
    }

    /// Fills the TAP's queue. The gate's program notes each frame: whoever is woken by it may take this thread's turn, and a service that is killed
    /// meanwhile has noted it all the same.
    pub(super) fn inject(&mut self) {
        self.full = false;
        if self.stage == Stage::Incoming {
            // The VMM takes frames off the TAP before its device is loaded, and forgets them when it is.
            return;
        }
        while let Some(next) = self.pending.front() {
            let noted = self.setup.gate.injected();
            let sent = if next.frame.is_empty() {
                Sent::Queued
            } else if !self.takes(&next.frame) {
                Sent::Full
            } else {
                let gate = &self.setup.gate;
                match next.origin {
                    Origin::Own { number: None, .. } => gate.set_own_next(),
                    origin => gate.set_injected_next(self.note(origin, noted)),
                }
                self.setup.injector.send(&next.frame)
            };
            match sent {
                Sent::Queued => {}
                Sent::Full => {
                    // The gate had passed it; the TAP's queue came after.
                    self.setup.gate.set_injected(noted);
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
            if let Some(mark) = self.note(origin, noted) {
                self.setup.gate.set_injected(mark);
            }
            match origin {
                Origin::Log { seq, .. } => {
                    self.tally.log_injected += u64::from(taken);
                    self.injected_seq = seq;
                }
                Origin::Own { bucket, number } => {
                    self.tally.own_injected += u64::from(taken);
                    if number.is_none() {
                        // In this order: a note without a packet says nothing, and of a packet with one the bucket is still to be told.
                        self.setup.landing.clear();
                        self.setup.gate.forget_own();
                    }
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
}
