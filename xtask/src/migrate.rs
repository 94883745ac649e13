//! `migrator migrate --watch`, its course shown as it happens, its report collected.

use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::Value;

use crate::cmd;
use crate::lab::{Lab, Node};
use crate::report::{MigrationReport, Outcome};

/// The parts of a status line that are shown.
#[derive(Deserialize)]
struct Status {
    phase: String,
    #[serde(default)]
    round: u32,
    #[serde(default)]
    bytes_sent: u64,
    #[serde(default)]
    pages_left: u64,
    #[serde(default)]
    bandwidth_bytes_per_s: u64,
    #[serde(default)]
    predicted_downtime_ms: f64,
}

/// Moves `pod` away from `from`, and shows each line of its course.
///
/// # Errors
/// The program cannot be started, or ends without a report. A migration that fails is a report, not an error.
pub fn migrate(
    lab: &Lab,
    pod: &str,
    from: Node,
    verify: bool,
    show: &mut dyn FnMut(&str),
) -> Result<MigrationReport> {
    let mut command = lab.on(from);
    command.args([
        "--output",
        "json",
        "migrate",
        pod,
        "--to",
        from.other().name(),
        "--watch",
    ]);
    if verify {
        command.arg("--verify");
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{}`", cmd::show(&command)))?;
    let stdout = child.stdout.take().context("no output to read")?;
    let mut stderr = child.stderr.take().context("no errors to read")?;
    let errors = std::thread::spawn(move || {
        let mut text = String::new();
        let _ = stderr.read_to_string(&mut text);
        text
    });
    let mut report = None;
    let mut last = String::new();
    for line in BufReader::new(stdout).lines() {
        let line = line.context("cannot read migrator's output")?;
        if let Some(found) = report_in(&line) {
            report = Some(found);
        } else if let Some(text) = progress(&line)
            && text != last
        {
            show(&text);
            last = text;
        }
    }
    let status = child.wait()?;
    let words = errors.join().unwrap_or_default();
    match report {
        Some(report) => {
            if let Outcome::Failed(reason) = &report.outcome {
                show(&format!("failed: {reason}"));
            }
            Ok(report)
        }
        None => bail!(
            "`{}` ended without a report ({status}): {}",
            cmd::show(&command),
            words.trim()
        ),
    }
}

/// A line may be a status with the report inside, or the report itself.
fn report_in(line: &str) -> Option<MigrationReport> {
    let mut value: Value = serde_json::from_str(line).ok()?;
    let inner = value.get_mut("report").map(Value::take);
    serde_json::from_value(inner.filter(|inner| !inner.is_null()).unwrap_or(value)).ok()
}

fn progress(line: &str) -> Option<String> {
    let status: Status = serde_json::from_str(line).ok()?;
    Some(match status.phase.as_str() {
        "precopy" if status.round > 0 => format!(
            "round {}: {:.1} MiB sent, {} pages left, {:.0} MB/s, predicted downtime {:.1} ms",
            status.round,
            status.bytes_sent as f64 / 1_048_576.0,
            status.pages_left,
            status.bandwidth_bytes_per_s as f64 / 1e6,
            status.predicted_downtime_ms
        ),
        phase => phase.replace('_', " "),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_is_shown_with_its_figures() {
        let line = r#"{"id":"0","pod":"demo","from":"a","to":"b","phase":"precopy","round":2,"bytes_sent":1048576,"pages_left":10,
            "bandwidth_bytes_per_s":500000000,"dirty_bytes_per_s":0,"predicted_downtime_ms":1.5,"report":null}"#;
        assert_eq!(
            progress(line).unwrap(),
            "round 2: 1.0 MiB sent, 10 pages left, 500 MB/s, predicted downtime 1.5 ms"
        );
        assert_eq!(progress(r#"{"phase":"in_doubt"}"#).unwrap(), "in doubt");
        assert!(report_in(line).is_none());
    }
}
