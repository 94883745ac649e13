//! The peer: podman with runc and overlayfs, its images and containers in folders of the lab's. It pulls all layers, unpacks them, and starts.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::ground::{Ground, NODE};
use super::layout::LINE;
use crate::{cmd, netns};

/// Podman's own defaults need CAP_SYS_RESOURCE where the limits of who calls it are lower.
const LIMITS: [&str; 4] = [
    "--ulimit",
    "nofile=1024:1024",
    "--ulimit",
    "nproc=1024:1024",
];

/// Ready for a verb. Nothing of the machine's own podman is touched.
fn podman(ground: &Ground) -> Command {
    let folder = |name: &str| -> PathBuf { ground.lab().dir().join("podman").join(name) };
    let mut command = Command::new("podman");
    command
        .arg("--root")
        .arg(folder("root"))
        .arg("--runroot")
        .arg(folder("run"));
    // overlay beats vfs, which copies each layer. runc runs also where both versions of cgroups are mounted; crun does not.
    command.args(["--storage-driver", "overlay", "--runtime", "runc"]);
    command.args(["--cgroup-manager", "cgroupfs", "--events-backend", "none"]);
    command.env("TMPDIR", folder("tmp"));
    command
}

/// Name and version.
pub(super) fn version() -> Result<String> {
    Ok(cmd::output(&mut cmd::command("podman", ["--version"]))?
        .trim()
        .replace(" version", ""))
}

/// One start of the image that is not here.
pub(super) fn once(ground: &Ground) -> Result<Duration> {
    std::fs::create_dir_all(ground.lab().dir().join("podman/tmp"))
        .context("cannot make podman's folder")?;
    let mut command = podman(ground);
    command
        .args([
            "run",
            "--rm",
            "--quiet",
            "--tls-verify=false",
            "--network=none",
        ])
        .args(LIMITS)
        .arg(ground.image());
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let begun = Instant::now();
    let mut child = netns::spawn(&ground.lab().netns(NODE.name()), &mut command)?;
    let out = child.stdout.take().context("podman has no output")?;
    let mut line = String::new();
    BufReader::new(out).read_line(&mut line)?;
    let took = begun.elapsed();
    let mut said = String::new();
    if line.trim() != LINE {
        // It has ended, or ends now.
        child
            .stderr
            .take()
            .context("podman has no errors")?
            .read_to_string(&mut said)?;
    }
    end(ground)?;
    child.wait()?;
    ensure!(
        line.trim() == LINE,
        "podman printed `{}`: {said}",
        line.trim()
    );
    Ok(took)
}

/// Ends its containers.
fn end(ground: &Ground) -> Result<()> {
    cmd::output(podman(ground).args(["rm", "--all", "--force", "--time", "0"])).map(drop)
}

/// Removes its images.
pub(super) fn forget(ground: &Ground) -> Result<()> {
    cmd::output(podman(ground).args(["rmi", "--all", "--force"])).map(drop)
}
