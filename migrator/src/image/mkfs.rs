//! From a tree to an EROFS file, by mkfs.erofs of erofs-utils (1.5 and later).

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How long mkfs.erofs may take. It copies about 200 MB a second; the largest image here has 64 GiB.
const DEADLINE: Duration = Duration::from_secs(15 * 60);

/// Most of its messages that is kept, in bytes.
const MAX_MESSAGES: usize = 64 << 10;

/// The one UUID of all images: they are told apart by digest, and a random one would make two builds differ.
const UUID: &str = "00000000-0000-0000-0000-000000000000";

/// Where Debian and Fedora install it; a service's PATH may lack the sbin folders.
const EXTRA_PATH: [&str; 4] = ["/usr/bin", "/usr/sbin", "/sbin", "/usr/local/bin"];

/// Why no EROFS file was made.
#[derive(Debug, thiserror::Error)]
pub enum MkfsError {
    /// The tool is not installed.
    #[error("mkfs.erofs is not installed: apt-get install erofs-utils")]
    NotInstalled,
    /// It could not be run.
    #[error("cannot run {path}")]
    Run {
        /// The tool.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// It failed.
    #[error("mkfs.erofs failed ({status}): {messages}")]
    Failed {
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it said.
        messages: String,
    },
    /// It took too long.
    #[error("mkfs.erofs did not finish within {} seconds and was stopped", DEADLINE.as_secs())]
    Deadline,
}

impl MkfsError {
    /// Whether the disk is full: the tool says so by message only.
    pub(super) fn is_disk_full(&self) -> bool {
        match self {
            Self::Failed { messages, .. } => {
                messages.contains("No space left") || messages.contains("quota exceeded")
            }
            Self::NotInstalled | Self::Run { .. } | Self::Deadline => false,
        }
    }
}

/// Finds mkfs.erofs in PATH and in the folders that distributions use.
pub fn find_mkfs() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(EXTRA_PATH.iter().map(PathBuf::from))
        .map(|folder| folder.join("mkfs.erofs"))
        .find(|file| file.is_file())
}

/// Makes the EROFS file `image` from the tree `root`.
///
/// The same tree gives the same bytes: the UUID is fixed, and the build time is `newest`, the newest
/// modification time in the tree. Modification times are kept (`-T` would set them all to one
/// value, and Python then compiles every module again, as its caches record the source's time).
/// Nothing is compressed: the guest reads blocks as they are, which costs it less under emulation.
pub(super) fn run(root: &Path, image: &Path, newest: i64) -> Result<(), MkfsError> {
    let tool = find_mkfs().ok_or(MkfsError::NotInstalled)?;
    let failed = |source| MkfsError::Run {
        path: tool.clone(),
        source,
    };
    let mut child = Command::new(&tool)
        .args(["--quiet", "--preserve-mtime", "-U", UUID])
        .arg(image)
        .arg(root)
        .env_clear()
        // Times up to this one are kept and later ones cut down to it, so one second more keeps all,
        // fractions included.
        .env("SOURCE_DATE_EPOCH", newest.saturating_add(1).to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let messages = match child.stderr.take() {
        Some(pipe) => read_until_closed(pipe, Instant::now() + DEADLINE).map_err(failed)?,
        None => Some(Vec::new()),
    };
    let Some(messages) = messages else {
        child.kill().map_err(failed)?;
        child.wait().map_err(failed)?;
        return Err(MkfsError::Deadline);
    };
    let status = child.wait().map_err(failed)?;
    if !status.success() {
        let messages = String::from_utf8_lossy(&messages).trim().to_owned();
        return Err(MkfsError::Failed { status, messages });
    }
    // Written through the page cache; the caller commits the image only when it is on the disk.
    File::open(image)
        .and_then(|file| file.sync_all())
        .map_err(failed)
}

/// Reads what the child says until it closes its end, which it does by ending; `None` at the deadline.
fn read_until_closed(
    mut pipe: std::process::ChildStderr,
    deadline: Instant,
) -> io::Result<Option<Vec<u8>>> {
    let mut messages = Vec::new();
    let mut buffer = [0u8; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        let n = pipe.read(&mut buffer)?;
        if n == 0 {
            return Ok(Some(messages));
        }
        let room = MAX_MESSAGES.saturating_sub(messages.len());
        messages.extend_from_slice(&buffer[..n.min(room)]);
    }
}
