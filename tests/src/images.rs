//! Container images that other tools make.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use xtask::cmd;
use xtask::project::Project;

/// The name under which [`redis`] is imported.
pub const REDIS: &str = "redis:debian";

/// Debian's redis-server: mmdebstrap makes the tree, umoci the image. Made once, and kept in the build folder.
/// The OCI layout's folder.
///
/// # Errors
/// A tool is missing, or fails.
pub fn redis(project: &Project) -> Result<PathBuf> {
    let dir = project.target.join("test-images/redis");
    let (layout, stamp) = (dir.join("redis"), dir.join("stamp"));
    if std::fs::read_to_string(&stamp).is_ok_and(|made_by| made_by == include_str!("images.rs")) {
        return Ok(layout);
    }
    for tool in ["mmdebstrap", "umoci"] {
        ensure!(
            cmd::which(tool).is_some(),
            "{tool} is missing: `cargo xtask setup --tests` installs it"
        );
    }
    if dir.exists() {
        std::fs::remove_dir_all(&dir).context("cannot remove the old image")?;
    }
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let (image, bundle) = (dir.join("redis:debian"), dir.join("bundle"));
    run("umoci", &["init", "--layout"], &[&layout])?;
    run("umoci", &["new", "--image"], &[&image])?;
    run("umoci", &["unpack", "--image"], &[&image, &bundle])?;
    run(
        "mmdebstrap",
        &[
            "--quiet",
            "--variant=minbase",
            "--include=redis-server",
            "bookworm",
        ],
        &[&bundle.join("rootfs")],
    )?;
    run("umoci", &["repack", "--image"], &[&image, &bundle])?;
    run(
        "umoci",
        &["config", "--config.workingdir=/var/lib/redis", "--image"],
        &[&image],
    )?;
    std::fs::remove_dir_all(&bundle).context("cannot remove the unpacked image")?;
    std::fs::write(&stamp, include_str!("images.rs"))?;
    Ok(layout)
}

fn run(program: &str, words: &[&str], paths: &[&Path]) -> Result<()> {
    let mut command = cmd::command(program, words);
    // Names of files must not depend on who runs the tests.
    command.args(paths).env("LC_ALL", "C.UTF-8");
    cmd::output(&mut command).map(drop)
}
