//! The guest runs for a part of each period, and stands still for the rest.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::mark::Mark;
use super::{Order, Percent, Slot, ThrottleError};
use crate::qmp::{Qmp, QmpError};
use crate::vm::QMP_DEADLINE;

/// A stop and a continue take about a millisecond together; at 5 % the guest is to get more out of it than they cost.
const PERIOD: Duration = Duration::from_millis(100);
/// Between two attempts to continue the guest.
const AGAIN: Duration = Duration::from_millis(50);

/// The task of a throttle by slices.
pub(super) struct Slices {
    qmp: Arc<Qmp>,
    slot: Arc<Slot>,
    mark: Mark,
}

impl Slices {
    pub(super) fn new(qmp: Arc<Qmp>, slot: Arc<Slot>, mark: Mark) -> Self {
        Self { qmp, slot, mark }
    }

    /// Follows orders until there are no more. The guest is continued after each slice, also after one that failed.
    pub(super) async fn run(self, mut orders: mpsc::Receiver<Order>) -> Result<(), ThrottleError> {
        let mut percent = Percent::OFF;
        loop {
            let stopped = PERIOD * u32::from(percent.get()) / 100;
            let order = if percent == Percent::OFF {
                Some(orders.recv().await)
            } else {
                match timeout(PERIOD - stopped, orders.recv()).await {
                    Ok(order) => Some(order),
                    Err(_) => self.slice(stopped, &mut orders).await?,
                }
            };
            match order {
                // The slice was not disturbed.
                None => {}
                Some(None) => return self.forget().await,
                Some(Some(Order {
                    percent: wanted,
                    done,
                })) => {
                    let noted = if wanted == Percent::OFF {
                        Ok(())
                    } else {
                        self.note().await
                    };
                    if noted.is_ok() {
                        percent = wanted;
                    }
                    // Who asked may have lost patience.
                    let _ = done.send(noted);
                    if percent == Percent::OFF
                        && let Err(error) = self.forget().await
                    {
                        // Who asked was not kept waiting for a disk. The end of the throttle tries again.
                        tracing::warn!(%error, "the record of a throttle stays behind");
                    }
                }
            }
        }
    }

    /// One slice. An order cuts it short, and is given back: `Some(None)` if there will be no more.
    async fn slice(
        &self,
        length: Duration,
        orders: &mut mpsc::Receiver<Order>,
    ) -> Result<Option<Option<Order>>, ThrottleError> {
        let until = Instant::now() + length;
        let halted = self.slot.halted.lock().await;
        if *halted {
            // The guest stands still already, for somebody who wants that.
            drop(halted);
            return Ok(timeout(length, orders.recv()).await.ok());
        }
        let stopped = self.qmp.execute("stop", Value::Null, QMP_DEADLINE).await;
        let order = match &stopped {
            Ok(_) => tokio::select! {
                order = orders.recv() => Some(order),
                () = sleep_until(until) => None,
            },
            // It may have stopped all the same.
            Err(_) => None,
        };
        self.go_on().await?;
        drop(halted);
        let failed = |source| ThrottleError::Qmp {
            verb: "stop",
            source,
        };
        stopped.map_err(failed)?;
        Ok(order)
    }

    /// Continues the guest, and does not give up before it runs or QEMU has a reason.
    async fn go_on(&self) -> Result<(), ThrottleError> {
        let until = Instant::now() + QMP_DEADLINE;
        loop {
            match self.qmp.execute("cont", Value::Null, QMP_DEADLINE).await {
                Ok(_) => return Ok(()),
                Err(QmpError::Refused { .. }) if Instant::now() < until => sleep(AGAIN).await,
                Err(QmpError::Timeout { .. }) if Instant::now() < until => {}
                Err(source) => {
                    return Err(ThrottleError::Qmp {
                        verb: "continue",
                        source,
                    });
                }
            }
        }
    }

    async fn note(&self) -> Result<(), ThrottleError> {
        let mark = self.mark.clone();
        let noted = spawn_blocking(move || mark.slices()).await;
        noted.unwrap_or(Err(ThrottleError::Ended))
    }

    async fn forget(&self) -> Result<(), ThrottleError> {
        let mark = self.mark.clone();
        let forgotten = spawn_blocking(move || mark.remove()).await;
        forgotten.unwrap_or(Err(ThrottleError::Ended))
    }
}
