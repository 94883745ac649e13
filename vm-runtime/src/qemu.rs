//! Which QEMU: where it is, what version, and what machines it knows.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::process::Command;
use tokio::time::timeout;

/// Names looked for in `PATH` if the configuration names none.
const NAMES: [&str; 2] = ["qemu-system-x86_64", "qemu-kvm"];
/// What `--version` and `-machine help` may take, on a busy machine.
const ASK_DEADLINE: Duration = Duration::from_secs(20);

/// Where QEMU is, as the node's configuration says it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QemuConfig {
    /// The binary; found in `PATH` if absent.
    pub binary: Option<PathBuf>,
    /// Goes to `LD_LIBRARY_PATH`, for a QEMU that is unpacked and not installed.
    pub lib_dir: Option<PathBuf>,
    /// Go to `-L`: firmware and option ROMs of a QEMU that is unpacked and not installed.
    pub data_dirs: Vec<PathBuf>,
}

/// A QEMU that answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuBinary {
    /// The binary, absolute.
    pub path: PathBuf,
    /// `LD_LIBRARY_PATH` for it, if any.
    pub lib_dir: Option<PathBuf>,
    /// Its `-L` folders.
    pub data_dirs: Vec<PathBuf>,
    /// Major, minor, micro.
    pub version: (u32, u32, u32),
    /// The versioned q35 machine types it offers, such as `pc-q35-7.2`, newest first.
    pub machine_types: Vec<String>,
}

/// No usable QEMU.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// None in `PATH`.
    #[error(
        "no QEMU in PATH: install qemu-system-x86 (7.2 or later), or name its binary in the configuration"
    )]
    Missing,
    /// It cannot be run.
    #[error("cannot run {path}")]
    Run {
        /// The binary.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It did not answer in time.
    #[error("{path} did not answer `{question}` in {ASK_DEADLINE:?}")]
    Slow {
        /// The binary.
        path: PathBuf,
        /// What it was asked.
        question: &'static str,
    },
    /// It answered something else.
    #[error("{path} does not answer `{question}` as QEMU for x86-64 does: {got}")]
    Strange {
        /// The binary.
        path: PathBuf,
        /// What it was asked.
        question: &'static str,
        /// What it said.
        got: String,
    },
}

impl QemuBinary {
    /// Asks the binary at `explicit`, or the first one in `PATH`.
    ///
    /// # Errors
    /// None is there, or it is no QEMU for x86-64.
    pub async fn find(explicit: Option<&Path>) -> Result<Self, QemuError> {
        Self::open(&QemuConfig {
            binary: explicit.map(Path::to_owned),
            ..QemuConfig::default()
        })
        .await
    }

    /// Asks the QEMU that the configuration names.
    ///
    /// # Errors
    /// None is there, or it is no QEMU for x86-64.
    pub async fn open(config: &QemuConfig) -> Result<Self, QemuError> {
        let path = match &config.binary {
            Some(path) => std::path::absolute(path).map_err(|source| QemuError::Run {
                path: path.clone(),
                source,
            })?,
            None => in_path().ok_or(QemuError::Missing)?,
        };
        let mut qemu = Self {
            path,
            lib_dir: config.lib_dir.clone(),
            data_dirs: config.data_dirs.clone(),
            version: (0, 0, 0),
            machine_types: Vec::new(),
        };
        let text = qemu.ask("--version", &["--version"]).await?;
        qemu.version = parse_version(&text).ok_or_else(|| qemu.strange("--version", &text))?;
        let text = qemu.ask("-machine help", &["-machine", "help"]).await?;
        qemu.machine_types = parse_machines(&text);
        if qemu.machine_types.is_empty() {
            return Err(qemu.strange("-machine help", &text));
        }
        Ok(qemu)
    }

    /// The version as text, such as `7.2.22`.
    pub fn version_text(&self) -> String {
        let (major, minor, micro) = self.version;
        format!("{major}.{minor}.{micro}")
    }

    /// Whether it offers this machine type.
    pub fn supports(&self, machine: &str) -> bool {
        self.machine_types.iter().any(|known| known == machine)
    }

    /// `wanted` (such as [`crate::spec::MACHINE`]) if this QEMU has it, else its newest q35.
    pub fn machine_or_newest(&self, wanted: &str) -> &str {
        match self.machine_types.iter().find(|known| *known == wanted) {
            Some(known) => known,
            None => &self.machine_types[0],
        }
    }

    async fn ask(&self, question: &'static str, args: &[&str]) -> Result<String, QemuError> {
        let mut command = Command::new(&self.path);
        command
            .args(args)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        if let Some(dir) = &self.lib_dir {
            command.env("LD_LIBRARY_PATH", dir);
        }
        let path = || self.path.clone();
        match timeout(ASK_DEADLINE, command.output()).await {
            Ok(Ok(output)) => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
            Ok(Err(source)) => Err(QemuError::Run {
                path: path(),
                source,
            }),
            Err(_) => Err(QemuError::Slow {
                path: path(),
                question,
            }),
        }
    }

    fn strange(&self, question: &'static str, text: &str) -> QemuError {
        QemuError::Strange {
            path: self.path.clone(),
            question,
            got: text.lines().next().unwrap_or("nothing").to_owned(),
        }
    }
}

/// How much of QEMU's own words goes into an error, in characters.
const SAID: usize = 600;

/// The end of what QEMU said, on one line and without what a terminal would obey.
pub(crate) fn one_line(text: &str) -> String {
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    let line = lines.join(" | ").replace(char::is_control, " ");
    match line.chars().count() {
        0 => "nothing".to_owned(),
        long => line.chars().skip(long.saturating_sub(SAID)).collect(),
    }
}

fn in_path() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let dirs: Vec<PathBuf> = std::env::split_paths(&path).collect();
    NAMES
        .iter()
        .flat_map(|name| dirs.iter().map(move |dir| dir.join(name)))
        .find(|file| file.is_file())
}

/// `QEMU emulator version 7.2.22 (Debian ...)`.
fn parse_version(text: &str) -> Option<(u32, u32, u32)> {
    let rest = text.split_once("emulator version ")?.1;
    let end = rest
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(rest.len());
    let mut numbers = rest[..end].split('.').map(|part| part.parse().ok());
    let mut next = || numbers.next().flatten();
    Some((next()?, next()?, next().unwrap_or(0)))
}

fn parse_machines(text: &str) -> Vec<String> {
    let mut machines: Vec<String> = text
        .lines()
        .filter_map(|line| line.split_ascii_whitespace().next())
        .filter(|name| machine_version(name).is_some())
        .map(str::to_owned)
        .collect();
    machines.sort_by_key(|name| std::cmp::Reverse(machine_version(name)));
    machines
}

/// The version in `pc-q35-7.2`; `None` for every other machine.
fn machine_version(name: &str) -> Option<(u32, u32)> {
    let mut parts = name.strip_prefix("pc-q35-")?.split('.');
    let major = parts.next()?.parse().ok()?;
    let minor = parts.next()?.parse().ok()?;
    parts.next().is_none().then_some((major, minor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_with_and_without_a_suffix() {
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright";
        assert_eq!(parse_version(debian), Some((7, 2, 22)));
        assert_eq!(
            parse_version("QEMU emulator version 10.0"),
            Some((10, 0, 0))
        );
        assert_eq!(parse_version("bash, version 5"), None);
    }

    #[test]
    fn only_versioned_q35_machines_count_newest_first() {
        let help = "Supported machines are:\n\
            q35       Standard PC (alias of pc-q35-10.0)\n\
            pc-q35-7.2  Standard PC\npc-q35-10.0  Standard PC\npc-q35-4.0.1  Standard PC\n\
            pc-i440fx-7.2  Standard PC\n";
        assert_eq!(parse_machines(help), ["pc-q35-10.0", "pc-q35-7.2"]);
    }

    #[tokio::test]
    async fn a_missing_binary_is_named() {
        let error = QemuBinary::find(Some(Path::new("/nonexistent/qemu")))
            .await
            .unwrap_err();
        assert!(error.to_string().contains("/nonexistent/qemu"), "{error}");
    }
}
