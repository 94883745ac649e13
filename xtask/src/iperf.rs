//! iperf3 over one TCP connection, from the client's namespace.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use crate::process::ProcessId;
use crate::{cmd, netns};

/// A running client. Dropping it ends the process.
pub struct Iperf {
    child: Child,
    id: ProcessId,
    output: PathBuf,
    begun: Instant,
}

/// What the report says of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// How long it sent.
    pub seconds: f64,
    /// Mean rate.
    pub mbits_per_s: f64,
    /// Segments that TCP sent again.
    pub retransmits: u64,
    /// One and the same connection carried data to the end.
    pub connection_survived: bool,
    /// What iperf3 complained of, unless it was the SIGINT that ends it.
    #[serde(skip)]
    pub error: Option<String>,
}

impl Iperf {
    /// Connects to `server`, port 5201, and sends at most `mbits_per_s` until [`Iperf::stop`]. `output` takes its JSON.
    ///
    /// # Errors
    /// The namespace cannot be entered, or iperf3 cannot be started.
    pub fn start(netns: &str, server: &str, mbits_per_s: u32, output: PathBuf) -> Result<Iperf> {
        let file = std::fs::File::create(&output)
            .with_context(|| format!("cannot write {}", output.display()))?;
        // No time limit: the moves take as long as they take. The JSON is written when SIGINT ends it.
        let mut command = cmd::command(
            "iperf3",
            [
                "--client",
                server,
                "--time",
                "0",
                "--interval",
                "0.5",
                "--json",
            ],
        );
        command.args([
            "--bitrate",
            &format!("{mbits_per_s}M"),
            "--connect-timeout",
            "5000",
        ]);
        command
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(Stdio::piped());
        let begun = Instant::now();
        let child = netns::spawn(netns, &mut command)?;
        let id = ProcessId::of_child("iperf3", child.id().cast_signed())?;
        Ok(Iperf {
            child,
            id,
            output,
            begun,
        })
    }

    /// As [`Iperf::start`], tried again until a client has sent for a second: the server may not listen yet, or may still be
    /// busy with the end of another test.
    ///
    /// # Errors
    /// As [`Iperf::start`], or no client has lasted within `limit`.
    pub fn start_patiently(
        netns: &str,
        server: &str,
        mbits_per_s: u32,
        output: &Path,
        limit: Duration,
    ) -> Result<Iperf> {
        let deadline = Instant::now() + limit;
        loop {
            let iperf = Iperf::start(netns, server, mbits_per_s, output.to_owned())?;
            if !crate::process::poll_until(Duration::from_secs(1), || !iperf.is_running()) {
                return Ok(iperf);
            }
            if Instant::now() >= deadline {
                let said = std::fs::read_to_string(output).unwrap_or_default();
                bail!(
                    "no iperf3 client has worked within {limit:?}; the last one said {}",
                    said.trim()
                );
            }
        }
    }

    /// Its identity, for the lab's record.
    pub fn id(&self) -> &ProcessId {
        &self.id
    }

    /// How far into its run it is.
    pub fn age(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Whether it still sends.
    pub fn is_running(&self) -> bool {
        self.id.alive()
    }

    /// Ends it and reads what it measured. `busy_until` is its age when the last move was over: the connection has
    /// survived only if data flowed after that.
    ///
    /// # Errors
    /// It does not end, or its output is not iperf3's.
    pub fn stop(mut self, busy_until: Duration) -> Result<Summary> {
        self.id.signal(Signal::SIGINT)?;
        if !crate::process::poll_until(Duration::from_secs(10), || !self.id.alive()) {
            bail!("iperf3 did not end within 10 s of SIGINT");
        }
        self.child.wait()?;
        let mut words = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            stderr.read_to_string(&mut words)?;
        }
        let json = std::fs::read_to_string(&self.output)
            .with_context(|| format!("cannot read {}", self.output.display()))?;
        summarise(&json, busy_until.as_secs_f64())
            .with_context(|| format!("iperf3 wrote no report: {}", words.trim()))
    }
}

impl Drop for Iperf {
    fn drop(&mut self) {
        // After `stop` it is gone already; both calls are then harmless.
        let _ = self.id.signal(Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

/// The parts of iperf3's JSON that are used.
#[derive(Deserialize)]
struct Output {
    start: Start,
    intervals: Vec<Interval>,
    end: End,
    error: Option<String>,
}

#[derive(Deserialize)]
struct Start {
    connected: Vec<Socket>,
}

#[derive(Deserialize)]
struct Socket {
    socket: i32,
}

#[derive(Deserialize)]
struct Interval {
    streams: Vec<Stream>,
}

#[derive(Deserialize)]
struct Stream {
    socket: i32,
    end: f64,
    bytes: u64,
}

#[derive(Deserialize, Default)]
struct End {
    sum_sent: Option<Sum>,
}

#[derive(Deserialize)]
struct Sum {
    seconds: f64,
    bits_per_second: f64,
    retransmits: Option<u64>,
}

/// How iperf3 reports the SIGINT that we end it with.
const INTERRUPTED: &str = "interrupt - the client has terminated";

fn summarise(json: &str, busy_until_s: f64) -> Result<Summary> {
    let output: Output = serde_json::from_str(json)?;
    let one_socket = match output.start.connected.as_slice() {
        [only] => output
            .intervals
            .iter()
            .flat_map(|interval| &interval.streams)
            .all(|stream| stream.socket == only.socket),
        _ => false,
    };
    let error = output.error.filter(|error| error != INTERRUPTED);
    let flows_after = output
        .intervals
        .iter()
        .flat_map(|interval| &interval.streams)
        .any(|stream| stream.end > busy_until_s && stream.bytes > 0);
    let (seconds, bits, retransmits) = output.end.sum_sent.map_or((0.0, 0.0, 0), |sum| {
        (
            sum.seconds,
            sum.bits_per_second,
            sum.retransmits.unwrap_or(0),
        )
    });
    Ok(Summary {
        seconds,
        mbits_per_s: (bits / 1e4).round() / 1e2,
        retransmits,
        connection_survived: one_socket && error.is_none() && flows_after,
        error,
    })
}

/// Whether the program is there; a message for people otherwise.
///
/// # Errors
/// It is not.
pub fn check_installed() -> Result<()> {
    cmd::output(Command::new("iperf3").arg("--version"))
        .map(drop)
        .context("iperf3 is missing: `cargo xtask setup` installs it")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(socket: i32, bytes: u64, error: &str) -> String {
        format!(
            r#"{{"start":{{"connected":[{{"socket":5}}]}},
            "intervals":[{{"streams":[{{"socket":5,"start":0,"end":0.5,"bytes":100}}]}},
                         {{"streams":[{{"socket":{socket},"start":0.5,"end":1.0,"bytes":{bytes}}}]}}],
            "end":{{"sum_sent":{{"seconds":1.0,"bits_per_second":100278372.4,"retransmits":7}}}}{error}}}"#
        )
    }

    #[test]
    fn the_end_that_we_ask_for_is_no_broken_connection() {
        let summary =
            summarise(&report(5, 9, &format!(r#","error":"{INTERRUPTED}""#)), 0.7).unwrap();
        assert_eq!(
            summary,
            Summary {
                seconds: 1.0,
                mbits_per_s: 100.28,
                retransmits: 7,
                connection_survived: true,
                error: None
            }
        );
    }

    #[test]
    fn an_error_or_another_socket_or_silence_after_the_move_is_a_broken_connection() {
        assert!(
            !summarise(&report(5, 9, r#","error":"Connection reset by peer""#), 0.7)
                .unwrap()
                .connection_survived
        );
        assert!(
            !summarise(&report(6, 9, ""), 0.7)
                .unwrap()
                .connection_survived
        );
        assert!(
            !summarise(&report(5, 0, ""), 0.7)
                .unwrap()
                .connection_survived
        );
        assert!(summarise("{}", 0.0).is_err());
    }
}
