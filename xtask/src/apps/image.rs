//! The image of the servers: a Debian system that mmdebstrap makes, packed by umoci. No tool of this project has a part in it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::project::Project;
use crate::{cmd, deb};

/// The name under which the image is imported.
pub const REFERENCE: &str = "apps:debian";

/// The servers. One image for all: what takes long is Debian's base system.
const SERVERS: &str = "postgresql-15,redis-server,nginx,memcached";

/// What servers do not need: LLVM alone is as large as all the rest, and PostgreSQL goes without its compiler where that is not there.
const LEFT_OUT: [&str; 5] = [
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/locale/*",
    "/usr/lib/*/libLLVM*",
    "/usr/lib/postgresql/*/lib/bitcode/*",
];

/// Makes sure that the image is there; the folder of its OCI layout.
///
/// # Errors
/// A tool is missing, or fails.
pub fn ensure(project: &Project) -> Result<PathBuf> {
    let dir = project.target.join("test-images/apps");
    let (layout, stamp) = (dir.join("apps"), dir.join("stamp"));
    if std::fs::read_to_string(&stamp).is_ok_and(|made_by| made_by == include_str!("image.rs")) {
        return Ok(layout);
    }
    for tool in ["mmdebstrap", "umoci"] {
        ensure!(
            cmd::which(tool).is_some(),
            "{tool} is missing: `cargo xtask setup --tests` installs it"
        );
    }
    println!("apps: the image of Debian's servers, which takes a minute or two");
    if dir.exists() {
        std::fs::remove_dir_all(&dir).context("cannot remove the old image")?;
    }
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let (image, bundle) = (dir.join("apps:debian"), dir.join("bundle"));
    run("umoci", &["init", "--layout"], &[&layout])?;
    run("umoci", &["new", "--image"], &[&image])?;
    run("umoci", &["unpack", "--image"], &[&image, &bundle])?;
    let mut words = vec![
        "--quiet".to_owned(),
        "--variant=minbase".to_owned(),
        format!("--include={SERVERS}"),
    ];
    words.extend(LEFT_OUT.map(|path| format!("--dpkgopt=path-exclude={path}")));
    words.push("bookworm".to_owned());
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    run("mmdebstrap", &words, &[&bundle.join("rootfs")])?;
    run("umoci", &["repack", "--image"], &[&image, &bundle])?;
    let config = ["config", "--config.workingdir=/tmp", "--image"];
    run("umoci", &config, &[&image])?;
    std::fs::remove_dir_all(&bundle).context("cannot remove the unpacked image")?;
    std::fs::write(&stamp, include_str!("image.rs"))?;
    Ok(layout)
}

/// PostgreSQL's load generator, out of the server's package: installing that would start a server on this machine.
///
/// # Errors
/// The package cannot be had.
pub fn pgbench(project: &Project) -> Result<PathBuf> {
    let tree = project.target.join("test-programs/postgresql");
    let program = tree.join("usr/lib/postgresql/15/bin/pgbench");
    if !program.is_file() {
        let packages = project.target.join("test-packages");
        deb::unpack(&deb::download("postgresql-15", &packages)?, &tree)?;
    }
    Ok(program)
}

fn run(program: &str, words: &[&str], paths: &[&Path]) -> Result<()> {
    let mut command = cmd::command(program, words);
    // Names of files must not depend on who runs the tests.
    command.args(paths).env("LC_ALL", "C.UTF-8");
    cmd::output(&mut command).map(drop)
}
