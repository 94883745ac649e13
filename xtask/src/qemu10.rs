//! QEMU 10 beside Debian 12's 7.2: from bookworm-backports, unpacked into the build folder, nothing installed.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::project::Project;
use crate::{cmd, deb};

/// apt reads this list only, in folders of its own: the machine's sources stay as they are.
const SOURCES: &str = "\
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm main
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm-backports main
";

/// An unpacked QEMU, as a node's configuration names it.
#[derive(Clone, Debug)]
pub struct Unpacked {
    /// The program.
    pub binary: PathBuf,
    /// Its shared libraries.
    pub lib_dir: PathBuf,
    /// Its firmware.
    pub data_dirs: Vec<PathBuf>,
}

/// Where it is, there or not.
pub fn unpacked(project: &Project) -> Unpacked {
    let usr = root(project).join("usr");
    Unpacked {
        binary: usr.join("bin/qemu-system-x86_64"),
        lib_dir: usr.join("lib/x86_64-linux-gnu"),
        data_dirs: ["share/qemu", "share/seabios"]
            .map(|data| usr.join(data))
            .to_vec(),
    }
}

/// The folder that its packages are unpacked into.
pub fn root(project: &Project) -> PathBuf {
    dir(project).join("root")
}

fn dir(project: &Project) -> PathBuf {
    project.target.join("qemu10")
}

/// Makes sure that it is there.
///
/// # Errors
/// The packages cannot be downloaded, or what they hold does not start.
pub fn ensure(project: &Project) -> Result<Unpacked> {
    let (dir, qemu) = (dir(project), unpacked(project));
    let mark = dir.join("complete");
    if mark.is_file() {
        return Ok(qemu);
    }
    println!(
        "setup: QEMU 10 from bookworm-backports, unpacked into {}",
        project.short(&dir)
    );
    let _ = std::fs::remove_dir_all(&dir);
    let apt = dir.join("apt");
    for folder in ["lists/partial", "cache/archives/partial"] {
        let folder = apt.join(folder);
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
    }
    std::fs::write(apt.join("sources.list"), SOURCES)
        .context("cannot write apt's list of sources")?;
    cmd::output(apt_get(&apt).args(["update", "-qq"]))?;
    let install = [
        "install",
        "-y",
        "-qq",
        "--download-only",
        "--no-install-recommends",
        "-t",
        "bookworm-backports",
        "qemu-system-x86",
    ];
    cmd::output(apt_get(&apt).args(install))?;
    let archives = apt.join("cache/archives");
    for entry in std::fs::read_dir(&archives)
        .with_context(|| format!("cannot list {}", archives.display()))?
    {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            deb::unpack(&path, &root(project))?;
        }
    }
    let mut version = std::process::Command::new(&qemu.binary);
    let said = cmd::output(
        version
            .arg("--version")
            .env("LD_LIBRARY_PATH", &qemu.lib_dir),
    )
    .context("the unpacked QEMU does not start")?;
    anyhow::ensure!(
        said.contains("version 10"),
        "bookworm-backports holds another QEMU: {said}"
    );
    std::fs::remove_dir_all(&apt)?;
    std::fs::write(mark, said)?;
    Ok(qemu)
}

fn apt_get(apt: &Path) -> std::process::Command {
    let mut command = cmd::command(
        "apt-get",
        [
            "-o",
            "APT::Sandbox::User=root",
            "-o",
            "Dir::Etc::sourceparts=-",
        ],
    );
    for (key, value) in [
        ("Dir::Etc::sourcelist", apt.join("sources.list")),
        ("Dir::State::lists", apt.join("lists")),
        ("Dir::Cache", apt.join("cache")),
    ] {
        command.arg("-o").arg(format!("{key}={}", value.display()));
    }
    command
}
