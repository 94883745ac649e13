//! An empty ext4 file system on a disk's file, by mke2fs of e2fsprogs.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

/// Where distributions install it; a service's PATH may lack the sbin folders.
const EXTRA_PATH: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];

/// The file is one hole, which reads as zeros: what mke2fs would write zeros over is left to be one. No room is kept for root alone, and
/// a damaged file system becomes read-only. Blocks are as large as the guest's pages and the file's: below 512 MiB mke2fs would take 1 KiB,
/// and a large read would straddle a page at both ends.
const OPTIONS: [&str; 12] = [
    "-q",
    "-F",
    "-t",
    "ext4",
    "-b",
    "4096",
    "-m",
    "0",
    "-e",
    "remount-ro",
    "-E",
    "lazy_itable_init=1,lazy_journal_init=1,nodiscard",
];

/// Why there is no file system.
#[derive(Debug, thiserror::Error)]
pub enum MkfsError {
    /// The tool is not installed.
    #[error("mke2fs is not installed: apt-get install e2fsprogs")]
    NotInstalled,
    /// It could not be run.
    #[error("cannot run {}", path.display())]
    Run {
        /// The tool.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It failed.
    #[error("mke2fs failed ({status}): {messages}")]
    Failed {
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        messages: String,
    },
}

/// Finds mke2fs in PATH and in the folders that distributions use.
pub fn find_mke2fs() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(EXTRA_PATH.iter().map(PathBuf::from))
        .map(|folder| folder.join("mke2fs"))
        .find(|file| file.is_file())
}

/// Makes the file system on all of the file.
///
/// # Errors
/// mke2fs is not there, or fails: on a full file system, for example.
pub fn mkfs(file: &Path) -> Result<(), MkfsError> {
    let tool = find_mke2fs().ok_or(MkfsError::NotInstalled)?;
    let output = Command::new(&tool)
        .args(OPTIONS)
        .arg(file)
        .stdin(Stdio::null())
        .output();
    let output = match output {
        Ok(output) => output,
        Err(source) => return Err(MkfsError::Run { path: tool, source }),
    };
    match output.status.success() {
        true => Ok(()),
        false => Err(MkfsError::Failed {
            status: output.status,
            messages: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        }),
    }
}
