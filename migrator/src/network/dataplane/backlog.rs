//! What waits at a port.

use serde::{Deserialize, Serialize};

use super::Dataplane;
use super::queues::readable;

/// What waits at a port, by where it waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backlog {
    /// Frames of the source's log that the destination has not acknowledged.
    pub log_frames: u64,
    /// Their bytes.
    pub log_bytes: u64,
    /// Frames on their way into the TAP.
    pub pending_frames: u64,
    /// Their bytes.
    pub pending_bytes: u64,
    /// Frames of the log that came before their turn.
    pub early_frames: u64,
    /// Whether the TAP's queue has a frame that the guest has not taken.
    pub tap_waits: bool,
    /// Whether the park's queue has a frame that the service has not taken.
    pub park_waits: bool,
}

impl Dataplane {
    pub(super) fn backlog(&self) -> Backlog {
        let frames = self.pending.iter().filter(|p| !p.frame.is_empty());
        let (pending_frames, pending_bytes) = frames.fold((0, 0), |(frames, bytes), pending| {
            (frames + 1, bytes + pending.frame.len() as u64)
        });
        Backlog {
            log_frames: self.log.len() as u64,
            log_bytes: self.log.kept_bytes() as u64,
            pending_frames,
            pending_bytes,
            early_frames: self.inbound.waiting() as u64,
            tap_waits: readable(&self.setup.tap),
            park_waits: readable(&self.setup.park),
        }
    }
}
