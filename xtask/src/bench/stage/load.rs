//! The host's end of `memory-load`: tells a guest's load what to do, and asks how far it is.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::netns;

/// How long an answer is waited for before the request is sent again.
const PATIENCE: Duration = Duration::from_millis(200);
/// A guest that has been moved answers within this, or is dead.
const ALIVE_WITHIN: Duration = Duration::from_secs(15);

/// What the load may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::bench) enum Work {
    /// Nothing.
    Idle,
    /// Dirties so many bytes a second.
    Dirty(u64),
    /// Writes so many bytes a second to its file, at random places.
    Disk(u64),
    /// Reads its file from end to end, so many bytes at a time.
    Scan(u64),
    /// Reads its file at random places, so many bytes at a time.
    Pick(u64),
    /// Sums up and writes random pages as fast as it goes.
    Spin,
    /// Reads random pages, each one timed.
    Touch,
}

/// Its counters.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(in crate::bench) struct Report {
    /// Pages written by `dirty` so far.
    pub(in crate::bench) pages: u64,
    /// Loops of `spin` so far.
    pub(in crate::bench) loops: u64,
    /// Bytes of the file written and read so far.
    pub(in crate::bench) disk_bytes: u64,
    /// Times of `touch` since it was begun: upper bound in nanoseconds, count.
    pub(in crate::bench) touches_ns: Vec<(u64, u64)>,
}

/// One guest's load.
#[derive(Debug)]
pub(in crate::bench) struct Load {
    socket: UdpSocket,
    target: SocketAddr,
}

/// Numbers of requests: unique as long as this process lives, because a guest takes the same number for the same request.
static NUMBER: AtomicU64 = AtomicU64::new(1);

impl Load {
    /// The load at `target`, asked from the namespace. Sends nothing yet.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub(in crate::bench) fn new(netns: &str, target: SocketAddr) -> Result<Load> {
        let socket = netns::within(netns, || {
            UdpSocket::bind("0.0.0.0:0").context("cannot open a UDP socket")
        })?;
        Ok(Load { socket, target })
    }

    /// Waits until it answers, which it does when its working set is filled.
    ///
    /// # Errors
    /// It does not within `limit`.
    pub(in crate::bench) fn await_ready(&self, limit: Duration) -> Result<()> {
        self.ask("idle", limit).map(drop)
    }

    /// Tells it what to do from now on.
    ///
    /// # Errors
    /// It does not answer: the guest is dead.
    pub(in crate::bench) fn set(&self, work: Work) -> Result<Report> {
        let verb = match work {
            Work::Idle | Work::Dirty(0) => "idle".to_owned(),
            Work::Scan(bytes) => format!("scan {bytes}"),
            Work::Pick(bytes) => format!("pick {bytes}"),
            Work::Disk(bytes_per_s) => format!("disk {bytes_per_s}"),
            Work::Dirty(bytes_per_s) => format!("dirty {bytes_per_s}"),
            Work::Spin => "spin".to_owned(),
            Work::Touch => "touch".to_owned(),
        };
        self.ask(&verb, ALIVE_WITHIN)
    }

    /// Its counters as they are now.
    ///
    /// # Errors
    /// It does not answer: the guest is dead.
    pub(in crate::bench) fn report(&self) -> Result<Report> {
        self.ask("report", ALIVE_WITHIN)
    }

    fn ask(&self, verb: &str, limit: Duration) -> Result<Report> {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let request = format!("{number} {verb}");
        let deadline = Instant::now() + limit;
        let mut answer = vec![0; 1 << 16];
        loop {
            // No neighbour yet is no answer yet.
            let _ = self.socket.send_to(request.as_bytes(), self.target);
            let again = Instant::now() + PATIENCE;
            while let Some(left) = again
                .checked_duration_since(Instant::now())
                .filter(|left| !left.is_zero())
            {
                self.socket.set_read_timeout(Some(left))?;
                let Ok((length, from)) = self.socket.recv_from(&mut answer) else {
                    continue;
                };
                let text = String::from_utf8_lossy(&answer[..length]);
                if from == self.target
                    && let Some(json) = answer_to(&text, number)
                {
                    return serde_json::from_str(json)
                        .with_context(|| format!("the load in the guest answers {json}"));
                }
            }
            if Instant::now() >= deadline {
                bail!(
                    "the load in the guest at {} does not answer within {limit:?}: the guest is dead",
                    self.target
                );
            }
        }
    }
}

/// The JSON of an answer, if it is the one to this request; late ones to earlier requests are not.
fn answer_to(text: &str, number: u64) -> Option<&str> {
    let (of, json) = text.split_once(' ')?;
    (of.parse() == Ok(number)).then_some(json)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_answer_to_the_request_counts() {
        let text = r#"7 {"mode":"touch","uptime_us":9,"pages":1,"loops":2,"disk_bytes":3,"touches_ns":[[1023,4]]}"#;
        let report: Report = serde_json::from_str(answer_to(text, 7).unwrap()).unwrap();
        assert_eq!((report.pages, report.loops), (1, 2));
        assert_eq!(report.touches_ns, [(1023, 4)]);
        assert_eq!(answer_to(text, 8), None);
        assert_eq!(answer_to("junk", 8), None);
    }
}
