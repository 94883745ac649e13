//! What a port does while the VMM behind it is replaced: frames wait in the park, and go on into the same TAP.
//!
//! ```text
//! spare_tap()    the new VMM begins with a TAP of its own
//! hold_still()   frames park; the guest takes what is in its TAP
//!                (the old VMM stops, and is killed; the new one has the TAP, and runs)
//! rollback()     what was parked goes into the TAP, in order; the gate opens
//! ```
//!
//! A VMM takes a frame off the TAP whether or not its guest can take it: so nothing may come into the TAP while it has two
//! of them, or one whose guest stands still.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::sync::mpsc::unbounded_channel;

use super::Port;
use crate::network::error::PortError;
use crate::network::sys;

/// Name of the TAP that the successor of a slot's VMM begins with.
fn spare_name(slot: u16) -> String {
    format!("ms{slot}")
}

/// Name of the TAP of a guest without a pod.
const IDLE_TAP: &str = "migrator-idle";

/// A TAP like that of pods that is on no network, for a guest without a pod. It lives as long as its descriptors.
///
/// # Errors
/// The kernel refuses, or there is one already.
pub fn idle_tap() -> io::Result<OwnedFd> {
    sys::create_tap(IDLE_TAP)
}

impl Port {
    /// A TAP like the pod's that is on no network. It lives as long as its descriptors.
    ///
    /// # Errors
    /// The kernel refuses, or there is one already.
    pub fn spare_tap(&self) -> Result<OwnedFd, PortError> {
        sys::create_tap(&spare_name(self.slot())).map_err(|source| PortError::Tap {
            pod: self.inner.pod.name.clone(),
            source,
        })
    }

    /// Parks every frame from now on, and waits until the guest, which still runs, has taken what is in its TAP. False: it has not
    /// within `limit`.
    ///
    /// # Errors
    /// As [`hold`](Self::hold).
    pub async fn hold_still(&self, limit: Duration) -> Result<bool, PortError> {
        // Nobody reads the log but the rollback.
        self.hold(unbounded_channel().0).await?;
        Ok(self.drain_tap(limit).await)
    }
}
