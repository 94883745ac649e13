//! Whole tables. The kernel gives one at a time to a socket, and refuses the next one (`EBUSY`, net/netlink/af_netlink.c `__netlink_dump_start`)
//! until the first has been read to its end, also if whoever asked for that has gone. The library sends a request whenever it comes, and with much to do
//! before it has read all of the table before.

use std::time::Duration;

use futures::{TryStream, TryStreamExt};

use super::{Netlink, is_errno};

/// Until the next attempt, behind a table that nobody waits for any more.
const AGAIN: Duration = Duration::from_millis(1);
/// Attempts: a table is read in microseconds.
const ATTEMPTS: usize = 1000;

impl Netlink {
    /// All that `ask` brings, once no other table is being read.
    pub(super) async fn dump<T, S>(&self, ask: impl Fn() -> S) -> Result<Vec<T>, rtnetlink::Error>
    where
        S: TryStream<Ok = T, Error = rtnetlink::Error>,
    {
        let _one = self.dumps.lock().await;
        let mut attempts = ATTEMPTS;
        loop {
            attempts -= 1;
            match ask().try_collect().await {
                Err(error) if attempts > 0 && is_errno(&error, &[libc::EBUSY]) => {
                    tokio::time::sleep(AGAIN).await;
                }
                result => return result,
            }
        }
    }
}
