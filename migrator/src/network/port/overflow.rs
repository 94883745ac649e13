//! More comes for a pod on its way than may be kept.

use std::time::Duration;

use super::Port;
use crate::network::allowance::{OnOverflow, Overflow};
use crate::network::dataplane::{Command, Stage};
use crate::network::error::PortError;

/// How often the park's queue is asked what it has dropped. It takes 65,536 frames: at a million a second it is full in three times as long.
const LOOK: Duration = Duration::from_millis(20);

impl Port {
    /// What the next hold does with packets that may not be kept; after it, it is [`OnOverflow::Abort`] again.
    pub fn on_overflow(&self, rule: OnOverflow) {
        self.inner.tell(Command::OnOverflow(rule));
    }

    /// Waits through the next hold, or the one under way, for the moment when more has come than may be kept: `None` if the hold ends
    /// without. What it can do about it is the caller's.
    ///
    /// # Errors
    /// The port is gone.
    pub async fn overflow(&self) -> Result<Option<Overflow>, PortError> {
        let dropped = self.park_dropped().await?;
        let limits = self.inner.node.allowance.limits();
        let mut stages = self.inner.stages.clone();
        let mut full = self.inner.full.clone();
        let held = stages.wait_for(|stage| *stage == Stage::Holding).await;
        held.map_err(|_| self.gone())?;
        loop {
            // Each lets go of what it looked at.
            let over = async {
                stages
                    .wait_for(|stage| *stage != Stage::Holding)
                    .await
                    .is_ok()
            };
            let is_full = async { full.wait_for(|full| *full).await.is_ok() };
            tokio::select! {
                true = over => return Ok(None),
                true = is_full => return Ok(Some(Overflow::Log(limits))),
                () = tokio::time::sleep(LOOK) => {
                    let lost = self.park_dropped().await?.saturating_sub(dropped);
                    if lost > 0 {
                        return Ok(Some(Overflow::Queue { lost }));
                    }
                }
                else => return Err(self.gone()),
            }
        }
    }

    /// Frames that the park's queue had no room for, since it was made.
    pub(super) async fn park_dropped(&self) -> Result<u64, PortError> {
        let park = &self.inner.park_name;
        Ok(self.inner.node.netlink.require(park).await?.tx_dropped)
    }
}
