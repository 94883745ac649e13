//! The destination's part: take the log, open, settle.

use std::time::{Duration, Instant};

use bytes::Bytes;
use migrator_ebpf::{FrameBytes, Mode, is_group};

use super::super::error::PortError;
use super::super::log::{InboundLog, LogItem, LogKind};
use super::super::sys::VNET_HEADER;
use super::{Dataplane, ETHERNET_MIN, Origin, PENDING_MAX, Pending, Stage};

/// How long the destination waits for the end marker of a source that it has a connection to, from the opening of its gate.
/// The source sees to it that there is one; this is for a source that stands still.
const END_LIMIT: Duration = Duration::from_secs(2);
/// How long a source whose connection ended in the middle of the log is waited for, before the order is given up: either service may
/// have been killed, and takes a second to be back.
const SOURCE_LIMIT: Duration = Duration::from_secs(3);

impl Dataplane {
    pub(super) fn input(&mut self, item: LogItem) {
        // It is found again; the rest of the log follows at once.
        if std::mem::take(&mut self.source_is_away) {
            self.opened_at = Some(Instant::now());
        }
        let is_frame = matches!(item.kind, LogKind::Residue | LogKind::Frame);
        if self.inbound.push(item) && is_frame {
            self.tally.log_received += 1;
        }
    }

    /// Moves items whose turn it is from the log to the TAP's queue.
    pub(super) fn take_log(&mut self, now: Instant) {
        self.log_left = false;
        loop {
            if self.pending.len() >= PENDING_MAX {
                self.log_left = true;
                return;
            }
            let Some(item) = self.inbound.pop() else {
                return;
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
                origin: Origin::Log {
                    seq: item.seq,
                    mark: InboundLog::mark(item.kind, item.seq),
                },
            });
        }
    }

    pub(super) fn open(&mut self) -> Result<(), PortError> {
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
    pub(super) fn log_is_over(&mut self, now: Instant) -> bool {
        if self.end_seen {
            return true;
        }
        let waited = self
            .opened_at
            .map_or(END_LIMIT, |opened| now.saturating_duration_since(opened));
        let limit = match self.source_is_away {
            true => SOURCE_LIMIT,
            false => END_LIMIT,
        };
        if waited < limit {
            return false;
        }
        self.tally.end_timeouts += 1;
        true
    }

    /// Opens the way for what came here directly, behind the log. Until now it has waited in the park, which outlives the service.
    pub(super) fn take_own_frames(&mut self, now: Instant) {
        self.barrier = Some(self.injected + self.pending.len() as u64);
        while self.read_park(now) {}
    }

    /// Whether the log has brought the other copy of a group frame that came here directly.
    pub(super) fn is_twin(&mut self, frame: &[u8]) -> bool {
        let bytes = frame.get(VNET_HEADER..).unwrap_or_default();
        // The earliest that it can have come.
        self.opened_at.is_some_and(|arrived| {
            is_group(&FrameBytes(bytes)) && self.copies.is_twin(frame, arrived)
        })
    }
}
