//! What a restarted service needs to find its VM again.

use std::fs::DirBuilder;
use std::io::{self, Write};
use std::os::fd::RawFd;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::process::Process;
use crate::qemu::QemuBinary;
use crate::spec::VmSpec;

/// Name of the record in the VM's folder.
const FILE: &str = "vmm.json";
/// A link that becomes [`FILE`] by being renamed.
const NEXT: &str = "vmm.next";
/// Folders of VMMs that replace another, in the VM's folder, taken in turns. Short, because of the sockets in them.
const SUCCESSOR_DIRS: [&str; 2] = ["v1", "v2"];

/// Descriptors that QEMU holds for us, by their number there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmFds {
    /// The memfd that is guest RAM.
    pub memory: RawFd,
    /// The TAP.
    pub tap: RawFd,
    /// The number that QEMU itself reads the TAP by, if it is another one: see [`super::Successor`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netdev: Option<RawFd>,
    /// The park's TAP, which QEMU only keeps alive.
    pub park: Option<RawFd>,
    /// The userfaultfd of QEMU's address space, past its handshake.
    pub uffd: RawFd,
}

/// One process, also when its number is used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmProcess {
    /// Its number.
    pub pid: i32,
    /// When it began, field 22 of `/proc/PID/stat`.
    pub start_time: u64,
}

impl VmmProcess {
    /// Kills it if it still runs, and waits until it is gone.
    ///
    /// # Errors
    /// The kernel refuses, or does not end it in time.
    pub async fn kill(self) -> io::Result<()> {
        match Process::find(self.pid, self.start_time) {
            Ok(process) => process.kill().await,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }
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
    /// Where the record that decides is, for a VMM that replaced another: see [`super::Successor`]. `None`: it is
    /// this one's own, in `dir`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub home: Option<PathBuf>,
    /// The VMM that this one replaced. It may live still, and must not run its guest again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predecessor: Option<VmmProcess>,
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

    /// The process.
    pub fn process(&self) -> VmmProcess {
        VmmProcess {
            pid: self.pid,
            start_time: self.start_time,
        }
    }

    /// The VM's folder, where the record that decides is.
    pub fn home(&self) -> &Path {
        self.home.as_deref().unwrap_or(&self.dir)
    }

    /// Kills the VMM if it still runs, without talking to it, and waits until it is gone.
    ///
    /// # Errors
    /// The kernel refuses, or does not end it in time.
    pub async fn kill(&self) -> io::Result<()> {
        self.process().kill().await?;
        self.remove();
        Ok(())
    }

    /// The VMM that was to replace the one of this record, if there is one.
    pub(super) fn successor(&self) -> Option<Self> {
        SUCCESSOR_DIRS
            .iter()
            .filter_map(|name| Self::load(&self.home().join(name)).ok())
            .find(|next| next.predecessor == Some(self.process()))
    }

    /// Kills every VMM in a VM's folder but the one whose record decides: those that were to replace it, and the one
    /// that it replaced.
    ///
    /// # Errors
    /// The kernel refuses, or does not end one in time.
    pub async fn kill_others(home: &Path) -> io::Result<()> {
        let decides = match Self::load(home) {
            Ok(record) => Some(record),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        if let Some(other) = decides.as_ref().and_then(|record| record.predecessor) {
            other.kill().await?;
        }
        for dir in SUCCESSOR_DIRS.map(|name| home.join(name)) {
            if decides.as_ref().is_some_and(|record| record.dir == dir) {
                continue;
            }
            match Self::load(&dir) {
                Ok(other) => other.kill().await?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            clear(&dir)?;
        }
        Ok(())
    }

    /// Makes this record the one that decides, by one rename: whoever looks sees either the one before or this one.
    pub(super) fn decide(&self) -> io::Result<()> {
        let Some(home) = &self.home else {
            return self.store();
        };
        let name = self.dir.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let temporary = home.join(NEXT);
        match std::fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        symlink(Path::new(name).join(FILE), &temporary)?;
        std::fs::rename(&temporary, home.join(FILE))
    }

    pub(super) fn store(&self) -> io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(&self.dir)?;
        serde_json::to_writer(&mut file, self)?;
        file.flush()?;
        file.persist(self.dir.join(FILE))?;
        Ok(())
    }

    /// Removes the record, once the VMM is gone.
    pub(super) fn remove(&self) {
        super::throttle::forget(&self.dir);
        // Gone already is fine. In its place may be that of the VMM which has replaced it.
        if Self::load(&self.dir).is_ok_and(|found| found.process() == self.process()) {
            let _ = std::fs::remove_file(self.dir.join(FILE));
        }
    }
}

/// A folder for a VMM that is to replace the one in `taken`, empty.
pub(super) fn free_dir(home: &Path, taken: &Path) -> io::Result<PathBuf> {
    let mut dirs = SUCCESSOR_DIRS.iter().map(|name| home.join(name));
    let free = dirs.find(|dir| dir != taken);
    let dir = free.ok_or(io::ErrorKind::NotFound)?;
    clear(&dir)?;
    DirBuilder::new().mode(0o700).create(&dir)?;
    Ok(dir)
}

/// Removes the folder of a VMM that is gone.
pub(super) fn clear(dir: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::tests::example;

    fn record(dir: &Path, home: Option<&Path>, pid: i32) -> VmRecord {
        VmRecord {
            pid,
            // No process began then: what is killed here is never there.
            start_time: 1,
            qemu: QemuBinary {
                path: "/usr/bin/qemu".into(),
                lib_dir: None,
                data_dirs: Vec::new(),
                version: (7, 2, 0),
                machine_types: Vec::new(),
            },
            dir: dir.to_owned(),
            home: home.map(Path::to_owned),
            predecessor: None,
            fds: VmmFds {
                memory: 200,
                tap: 201,
                netdev: None,
                park: None,
                uffd: 3,
            },
            spec: example(),
        }
    }

    #[tokio::test]
    async fn the_last_one_to_decide_is_found_and_the_others_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path();
        let mut now = record(home, None, 1);
        now.store().unwrap();
        for round in 2..6 {
            let dir = free_dir(home, &now.dir).unwrap();
            assert_ne!(dir, now.dir);
            let mut next = record(&dir, Some(home), round);
            next.predecessor = Some(now.process());
            next.store().unwrap();
            assert_eq!(VmRecord::load(home).unwrap(), now, "it decides too early");
            next.decide().unwrap();
            assert_eq!(VmRecord::load(home).unwrap(), next);
            // The end of the one before must not take the record of the new one along.
            now.remove();
            VmRecord::kill_others(home).await.unwrap();
            assert_eq!(VmRecord::load(home).unwrap(), next);
            now = next;
        }
        now.remove();
        let error = VmRecord::load(home).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        VmRecord::kill_others(home).await.unwrap();
        assert!(SUCCESSOR_DIRS.iter().all(|name| !home.join(name).exists()));
    }

    #[tokio::test]
    async fn one_that_was_never_to_decide_goes_without_a_trace() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path();
        let now = record(home, None, 1);
        now.store().unwrap();
        let dir = free_dir(home, &now.dir).unwrap();
        let mut next = record(&dir, Some(home), 2);
        next.store().unwrap();
        assert_eq!(now.successor(), None, "it is another one's");
        next.predecessor = Some(now.process());
        next.store().unwrap();
        assert_eq!(now.successor(), Some(next));
        VmRecord::kill_others(home).await.unwrap();
        assert!(!dir.exists());
        assert_eq!(VmRecord::load(home).unwrap(), now);
    }
}
