//! `migrator migrate --watch`: its course shown as it happens, its report collected.

use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cmd;
use crate::lab::{Lab, Node};
use crate::report::MigrationReport;

/// What a move may take on a busy machine, whatever its mode: a pod of the lab moves in a second.
const MOVES_WITHIN: Duration = Duration::from_secs(300);

/// Moves `pod` away from `from`, and shows each line of its course.
///
/// # Errors
/// As [`migrate_with`].
pub fn migrate(
    lab: &Lab,
    pod: &str,
    from: Node,
    verify: bool,
    show: &mut dyn FnMut(&str),
) -> Result<MigrationReport> {
    let options: &[&str] = if verify { &["--verify"] } else { &[] };
    migrate_with(lab, pod, from, options, show)
}

/// As [`migrate`], with options of `migrator migrate`.
///
/// # Errors
/// The program cannot be started, does not end within minutes, or ends without a report. A migration that fails is a
/// report, not an error.
pub fn migrate_with(
    lab: &Lab,
    pod: &str,
    from: Node,
    options: &[&str],
    show: &mut dyn FnMut(&str),
) -> Result<MigrationReport> {
    let until = Instant::now() + MOVES_WITHIN;
    let mut command = lab.on(from);
    let to = from.other().name();
    command
        .args(["--output", "json", "migrate", pod, "--to", to, "--watch"])
        .args(options);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{}`", cmd::show(&command)))?;
    // The report comes on stdout, the course and any error on stderr.
    let mut stdout = child.stdout.take().context("no output to read")?;
    let stderr = child.stderr.take().context("no course to read")?;
    let json = std::thread::spawn(move || {
        let mut text = String::new();
        stdout.read_to_string(&mut text).map(|_| text)
    });
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stderr).lines() {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    let mut last = String::new();
    loop {
        match lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                last = line.context("cannot read migrator's course")?;
                show(&last);
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                child.kill()?;
                child.wait()?;
                bail!(
                    "`{}` has not ended after {MOVES_WITHIN:?}: {last}",
                    cmd::show(&command)
                );
            }
        }
    }
    let status = child.wait()?;
    let json = json.join().unwrap_or_else(|_| Ok(String::new()))?;
    match serde_json::from_str(&json) {
        Ok(report) => Ok(report),
        Err(_) if json.trim().is_empty() => bail!(
            "`{}` ended without a report ({status}): {last}",
            cmd::show(&command)
        ),
        Err(error) => Err(error).with_context(|| {
            format!(
                "`{}` printed something else than a report",
                cmd::show(&command)
            )
        }),
    }
}
