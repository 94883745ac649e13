//! `migrator migrate --watch`: its course shown as it happens, its report collected.

use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use crate::cmd;
use crate::lab::{Lab, Node};
use crate::report::MigrationReport;

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
    // The report comes on stdout, the course and any error on stderr.
    let mut stdout = child.stdout.take().context("no output to read")?;
    let stderr = child.stderr.take().context("no course to read")?;
    let json = std::thread::spawn(move || {
        let mut text = String::new();
        stdout.read_to_string(&mut text).map(|_| text)
    });
    let mut last = String::new();
    for line in BufReader::new(stderr).lines() {
        last = line.context("cannot read migrator's course")?;
        show(&last);
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
