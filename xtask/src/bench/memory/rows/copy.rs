//! How fast pages cross the lab's link: our frames over plain TCP against iperf3, and over TLS against rustls alone.

use std::io::{BufRead, BufReader};
use std::process::Child;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::Bench;
use crate::bench::figures::{Aim, Metric, Run, Samples, records};
use crate::bench::plan::told;
use crate::cmd;
use crate::lab::{Lab, Node};
use crate::netns;
use crate::project::Project;

/// Ports on node b: iperf3's; ours, and the one after it.
const IPERF_PORT: &str = "5301";
const PORT: u16 = 7801;
const CONNECTIONS: [usize; 2] = [1, 4];
/// How long each run sends, in seconds.
const SECONDS: u32 = 3;
const QUICK_SECONDS: u32 = 1;
/// Beyond that.
const GRACE: Duration = Duration::from_secs(60);
/// An iperf3 that was just started.
const LISTENS_WITHIN: Duration = Duration::from_secs(10);

const RATE: Metric = Metric {
    name: "rate",
    unit: "MB/s",
    aims: &[Aim::RatioAtLeast(0.9)],
};

/// Frames without and with TLS: their names in cases and for the program, and what they are compared with.
const KINDS: [(&str, &str); 2] = [("plain", "iperf3"), ("tls", "rustls")];

pub(super) fn cases(quick: bool) -> Vec<String> {
    let connections: &[usize] = if quick {
        &CONNECTIONS[..1]
    } else {
        &CONNECTIONS
    };
    let mut cases = Vec::new();
    for (kind, _) in KINDS {
        cases.extend(connections.iter().map(|count| case(kind, *count)));
    }
    cases
}

fn case(kind: &str, connections: usize) -> String {
    format!("copy-{kind}-{connections}")
}

pub(super) fn run(bench: &mut Bench<'_>, wanted: &[String]) -> Result<()> {
    build(bench.project)?;
    let link = Link {
        project: bench.project,
        lab: bench.stage.lab(),
        seconds: if bench.plan.quick {
            QUICK_SECONDS
        } else {
            SECONDS
        },
    };
    for (kind, against) in KINDS {
        for connections in CONNECTIONS {
            let case = case(kind, connections);
            if !wanted.contains(&case) {
                continue;
            }
            let (mut ours, mut peer) = (Samples::default(), Samples::default());
            for _ in 0..bench.plan.runs {
                ours.add(told("ours", link.frames(kind, connections)));
                let run = match against {
                    "iperf3" => link.iperf3(connections),
                    other => link.frames(other, connections),
                };
                peer.add(told(against, run));
            }
            let records = records(&case, against, &[RATE], &ours, &peer);
            bench.records.extend(records);
        }
    }
    Ok(())
}

/// Builds the program that both ends run; it uses our library, which this one does not.
fn build(project: &Project) -> Result<()> {
    let words = ["build", "--quiet", "-p", "migrator-tests", "--bin", PROGRAM];
    cmd::run(&mut cmd::cargo(project, words))
}

const PROGRAM: &str = "copy-rate";

/// From node a to node b.
struct Link<'a> {
    project: &'a Project,
    lab: &'a Lab,
    seconds: u32,
}

#[derive(Deserialize)]
struct Copied {
    bytes: u64,
    seconds: f64,
}

impl Link<'_> {
    fn frames(&self, how: &str, connections: usize) -> Result<Run> {
        let end = |end: &str, node: Node| {
            let mut command =
                std::process::Command::new(self.project.target.join("debug").join(PROGRAM));
            command
                .args([end, &format!("{}:{PORT}", Node::B.address())])
                .args(["--how", how])
                .args(["--connections", &connections.to_string()])
                .args(["--seconds", &self.seconds.to_string()])
                .arg("--certificates")
                .arg(self.lab.node_dir(node));
            command
        };
        let mut listen = end("listen", Node::B);
        listen.stdout(std::process::Stdio::piped());
        let mut listener = Ended(netns::spawn(&self.lab.netns("b"), &mut listen)?);
        let said = listener.0.stdout.take().context("it says nothing")?;
        let mut line = String::new();
        BufReader::new(said).read_line(&mut line)?;
        ensure!(line == "listening\n", "{PROGRAM} does not listen: {line}");
        let said = self.at_a(&mut end("send", Node::A))?;
        let Copied { bytes, seconds } =
            serde_json::from_str(&said).with_context(|| format!("{PROGRAM} says {said}"))?;
        Ok(vec![(RATE.name, bytes as f64 / 1e6 / seconds)])
    }

    fn iperf3(&self, connections: usize) -> Result<Run> {
        let listen = ["--server", "--one-off", "--port", IPERF_PORT];
        let mut server = cmd::command("iperf3", listen);
        server.stdout(std::process::Stdio::null());
        let _server = Ended(netns::spawn(&self.lab.netns("b"), &mut server)?);
        let (connections, seconds) = (connections.to_string(), self.seconds.to_string());
        let words = [
            "--client",
            Node::B.address(),
            "--port",
            IPERF_PORT,
            "--parallel",
            &connections,
            "--time",
            &seconds,
            "--json",
        ];
        let mut last = Ok(0.0);
        crate::process::poll_until(LISTENS_WITHIN, || {
            // Its exit code is no help: a refused connection is an `error` in the JSON.
            let said = self.at_a(&mut cmd::command("iperf3", words));
            last = said.and_then(|json| received(&json));
            last.is_ok()
        });
        last.map(|rate| vec![(RATE.name, rate)])
    }

    fn at_a(&self, command: &mut std::process::Command) -> Result<String> {
        let limit = Duration::from_secs(self.seconds.into()) + GRACE;
        let said = netns::within(&self.lab.netns("a"), || cmd::bounded(command, limit))?;
        ensure!(
            said.code == Some(0),
            "`{}` ends with {:?}: {}{}",
            cmd::show(command),
            said.code,
            said.out.trim(),
            said.err.trim()
        );
        Ok(said.out)
    }
}

/// What arrived, in MB/s, from iperf3's JSON.
fn received(json: &str) -> Result<f64> {
    #[derive(Deserialize)]
    struct Output {
        end: End,
    }
    #[derive(Deserialize)]
    struct End {
        sum_received: Sum,
    }
    #[derive(Deserialize)]
    struct Sum {
        bits_per_second: f64,
    }
    let output: Output = serde_json::from_str(json)
        .with_context(|| format!("iperf3 reports nothing received: {json}"))?;
    Ok(output.end.sum_received.bits_per_second / 8e6)
}

/// A child that is ended with this value, if it has not ended by itself.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_received_counts() {
        let json = r#"{"end":{"sum_sent":{"bits_per_second":9e9},"sum_received":{"seconds":1,"bits_per_second":8e9}}}"#;
        assert_eq!(received(json).unwrap(), 1000.0);
        assert!(received(r#"{"error":"unable to connect"}"#).is_err());
    }
}
