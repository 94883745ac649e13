//! The command line and the API of the test's nodes.

use std::fs::File;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;
use xtask::lab::{Node, http_get};
use xtask::process::poll_until;

use super::TestLab;

/// What a verb takes that only asks, or a migration of the pod on a busy machine.
const VERB_WITHIN: Duration = Duration::from_secs(90);

/// What a verb printed, and its exit code.
#[derive(Debug)]
pub struct Said {
    /// Exit code; none if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl TestLab {
    /// Runs a verb on a node, whatever comes of it.
    ///
    /// # Errors
    /// It does not start, or does not end.
    pub fn says(&self, node: Node, words: &[&str]) -> Result<Said> {
        bounded(self.lab.on(node).args(words), VERB_WITHIN)
            .with_context(|| format!("`migrator {}` on node {}", words.join(" "), node.name()))
    }

    /// Runs a verb on a node; what it prints.
    ///
    /// # Errors
    /// It fails.
    pub fn succeeds(&self, node: Node, words: &[&str]) -> Result<String> {
        let said = self.says(node, words)?;
        ensure!(
            said.code == Some(0),
            "`migrator {}` on node {} ends with {:?}: {}",
            words.join(" "),
            node.name(),
            said.code,
            said.err.trim()
        );
        Ok(said.out)
    }

    /// One GET of a node's API.
    ///
    /// # Errors
    /// It does not answer, or with something else.
    pub fn get<T: DeserializeOwned>(&self, node: Node, path: &str) -> Result<T> {
        let text = http_get(&self.lab.api_socket(node), path, Duration::from_secs(10))?;
        serde_json::from_str(&text).with_context(|| format!("{path} answers {text}"))
    }
}

/// Runs a command to its end, which must come in time.
fn bounded(command: &mut Command, limit: Duration) -> Result<Said> {
    // Files, because a pipe that nobody empties would hold it up.
    let (out, err) = (tempfile::tempfile()?, tempfile::tempfile()?);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(err.try_clone()?)
        .spawn()?;
    let mut status = None;
    poll_until(limit, || {
        status = child.try_wait().ok().flatten();
        status.is_some()
    });
    let Some(status) = status else {
        child.kill()?;
        child.wait()?;
        bail!("has not ended after {limit:?}: {}", text(&err)?.trim());
    };
    Ok(Said {
        code: status.code(),
        out: text(&out)?,
        err: text(&err)?,
    })
}

fn text(mut file: &File) -> Result<String> {
    use std::io::{Read, Seek};
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
