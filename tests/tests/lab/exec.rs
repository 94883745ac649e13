//! Commands in a guest that moves.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Result, ensure};
use migrator_tests::lab::{POD, TestLab};
use xtask::lab::Node;
use xtask::process::poll_until;

/// Longer than the source keeps what the destination may still need.
const ENDS_WITHIN: Duration = Duration::from_secs(30);

#[test]
fn whoever_waits_for_a_command_hears_that_its_pod_has_moved() -> Result<()> {
    let test = TestLab::with_pod()?;
    let mut child = test
        .lab()
        .on(Node::A)
        .args([
            "exec",
            POD,
            "--",
            "/bin/sh",
            "-c",
            "echo begun > /tmp/begun; sleep 3600",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let runs = poll_until(ENDS_WITHIN, || {
        let look = ["exec", POD, "--", "/bin/cat", "/tmp/begun"];
        test.succeeds(Node::A, &look).is_ok()
    });
    ensure!(runs, "the command does not run");
    test.moves(Node::A)?;
    let mut ended = false;
    poll_until(ENDS_WITHIN, || {
        ended = matches!(child.try_wait(), Ok(Some(_)));
        ended
    });
    if !ended {
        child.kill()?;
    }
    let said = child.wait_with_output()?;
    ensure!(ended, "it waits although the pod is gone");
    let text = String::from_utf8_lossy(&said.stderr);
    ensure!(
        !said.status.success() && text.contains("may have moved"),
        "{}: {text}",
        said.status
    );
    // The command itself runs on, where its pod does.
    let look = "ps | grep -c '[s]leep 3600'";
    let count = test.succeeds(Node::B, &["exec", POD, "--", "/bin/sh", "-c", look])?;
    ensure!(count.trim() == "1", "{count}");
    test.end()
}
