//! The destination's part: take the log, open, settle.

use std::time::{Duration, Instant};

use bytes::Bytes;
use migrator_ebpf::{FrameBytes, Mode, is_group};

use super::super::copies::Copies;
use super::super::error::PortError;
use super::super::log::{LogItem, LogKind};
use super::super::sys::VNET_HEADER;
use super::{Dataplane, ETHERNET_MIN, Origin, PENDING_MAX, Pending, Stage};

/// How long the destination waits for the end marker, from the opening of its gate.
const END_LIMIT: Duration = Duration::from_millis(50);
/// The same while not even the residue has come.
const RESIDUE_LIMIT: Duration = Duration::from_secs(2);

impl Dataplane {
    pub(super) fn input(&mut self, item: LogItem) {
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
                origin: Origin::Log(item.seq),
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

    pub(super) fn release_own_frames(&mut self) {
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
}
