//! Runs `packet-path`, and takes what it prints.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, anyhow, ensure};
use serde::Deserialize;

use crate::bench::figures::{Metric, Run, Samples};
use crate::bench::plan::told;
use crate::cmd;
use crate::project::Project;

const PROGRAM: &str = "packet-path";

/// Builds it; it uses our library, which this program does not.
pub(super) fn build(project: &Project) -> Result<()> {
    let words = ["build", "--quiet", "-p", "migrator-tests", "--bin", PROGRAM];
    cmd::run(&mut cmd::cargo(project, words))
}

/// What it is to measure.
pub(super) struct Call {
    /// Its first arguments.
    pub(super) words: &'static [&'static str],
    pub(super) frames: Option<&'static str>,
    pub(super) runs: u32,
    pub(super) quick: bool,
}

/// A line of its output.
#[derive(Debug, PartialEq, Deserialize)]
#[serde(untagged)]
enum Line {
    Measured {
        side: Side,
        figures: BTreeMap<String, f64>,
    },
    Failed {
        side: Side,
        error: String,
    },
    Note {
        note: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Side {
    Ours,
    Peer,
}

/// The runs of both sides. Every wait in the program has a deadline, so it ends.
///
/// # Errors
/// It cannot be run, or ends with an error of its own; a run that fails is a part of the samples.
pub(super) fn run(
    project: &Project,
    call: &Call,
    metrics: &[Metric],
) -> Result<(Samples, Samples)> {
    let mut command = Command::new(project.target.join("debug").join(PROGRAM));
    command
        .args(call.words)
        .args(["--runs", &call.runs.to_string()]);
    if let Some(frames) = call.frames {
        command.args(["--frames", frames]);
    }
    if call.quick {
        command.arg("--quick");
    }
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command
        .spawn()
        .with_context(|| format!("cannot start `{}`", cmd::show(&command)))?;
    let mut child = Ended(child);
    let lines = child.0.stdout.take().context("it says nothing")?;
    let (mut ours, mut peer) = (Samples::default(), Samples::default());
    for line in BufReader::new(lines).lines() {
        let line = line?;
        let line = serde_json::from_str(&line)
            .with_context(|| format!("{PROGRAM} says what is no line of a run: {line}"))?;
        let (side, run) = match line {
            Line::Measured { side, figures } => (side, Ok(known(&figures, metrics))),
            Line::Failed { side, error } => (side, Err(anyhow!(error))),
            Line::Note { note } => {
                ours.remark(note);
                continue;
            }
        };
        match side {
            Side::Ours => ours.add(told("ours", run)),
            Side::Peer => peer.add(told("peer", run)),
        }
    }
    let mut errors = String::new();
    if let Some(mut stderr) = child.0.stderr.take() {
        stderr.read_to_string(&mut errors)?;
    }
    let status = child.0.wait()?;
    ensure!(
        status.success(),
        "`{}` ends with {status}: {}",
        cmd::show(&command),
        errors.trim()
    );
    Ok((ours, peer))
}

/// The figures that a row has a metric for.
fn known(figures: &BTreeMap<String, f64>, metrics: &[Metric]) -> Run {
    metrics
        .iter()
        .filter_map(|metric| Some((metric.name, *figures.get(metric.name)?)))
        .collect()
}

/// A child that is ended with this value, if it has not ended by itself.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // Neither can fail for a child that nobody else waits for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_line_is_read() {
        let line = |text| serde_json::from_str::<Line>(text).unwrap();
        let measured = line(r#"{"side":"ours","figures":{"rate":5e5,"other":1}}"#);
        let Line::Measured { side, figures } = measured else {
            panic!("{measured:?}");
        };
        assert_eq!(side, Side::Ours);
        let rate = Metric {
            name: "rate",
            unit: "packets/s",
            aims: &[],
        };
        assert_eq!(known(&figures, &[rate]), [("rate", 5e5)]);
        assert_eq!(
            line(r#"{"side":"peer","error":"no device"}"#),
            Line::Failed {
                side: Side::Peer,
                error: "no device".to_owned()
            }
        );
        assert_eq!(
            line(r#"{"note":"slow"}"#),
            Line::Note {
                note: "slow".to_owned()
            }
        );
        assert!(serde_json::from_str::<Line>(r#"{"side":"ours"}"#).is_err());
    }
}
