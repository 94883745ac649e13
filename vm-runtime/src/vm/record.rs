//! What a restarted service needs to find its VM again.

use std::io::{self, Write};
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::process::Process;
use crate::qemu::QemuBinary;
use crate::spec::VmSpec;

/// Name of the record in the VM's folder.
const FILE: &str = "vmm.json";

/// Descriptors that QEMU holds for us, by their number there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmFds {
    /// The memfd that is guest RAM.
    pub memory: RawFd,
    /// The TAP.
    pub tap: RawFd,
    /// The park's TAP, which QEMU only keeps alive.
    pub park: Option<RawFd>,
    /// The userfaultfd of QEMU's address space, past its handshake.
    pub uffd: RawFd,
}

/// A running VMM, for [`super::Vm::attach`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// QEMU's process.
    pub pid: i32,
    /// When it began, field 22 of `/proc/PID/stat`: guards against a reused number.
    pub start_time: u64,
    /// The binary.
    pub qemu: QemuBinary,
    /// The VM's folder: sockets, console and log.
    pub dir: PathBuf,
    /// Our descriptors in it.
    pub fds: VmmFds,
    /// What it runs.
    pub spec: VmSpec,
}

impl VmRecord {
    /// Reads the record that [`super::Vm::boot`] and [`super::Vm::incoming`] leave in the VM's
    /// folder before QEMU runs its first instruction: a service killed at any moment finds it.
    ///
    /// # Errors
    /// `NotFound` if no VMM was started in this folder; `InvalidData` if the record is damaged.
    pub fn load(dir: &Path) -> io::Result<Self> {
        let text = std::fs::read(dir.join(FILE))?;
        serde_json::from_slice(&text)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }

    /// Kills the VMM if it still runs, without talking to it, and waits until it is gone.
    ///
    /// # Errors
    /// The kernel refuses, or does not end it in time.
    pub async fn kill(&self) -> io::Result<()> {
        match Process::find(self.pid, self.start_time) {
            Ok(process) => process.kill().await?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Self::remove(&self.dir);
        Ok(())
    }

    pub(super) fn store(&self) -> io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(&self.dir)?;
        serde_json::to_writer(&mut file, self)?;
        file.flush()?;
        file.persist(self.dir.join(FILE))?;
        Ok(())
    }

    /// Removes the record from the VM's folder, once the VMM is gone.
    pub(super) fn remove(dir: &Path) {
        super::throttle::forget(dir);
        // Gone already is fine, and a stale record is recognised by pid and start time.
        let _ = std::fs::remove_file(dir.join(FILE));
    }
}
