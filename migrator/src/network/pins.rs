//! Pins in the node's BPF file system.

use std::io;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::error::GateError;

/// Removes a pin; one that is gone already is fine.
pub(crate) fn remove_pin(pin: &Path) -> Result<(), GateError> {
    match std::fs::remove_file(pin) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(GateError::Unpin {
            path: pin.to_owned(),
            source,
        }),
    }
}

/// Mounts a BPF file system, unless the folder is one.
pub(crate) fn mount_bpffs(dir: &Path) -> io::Result<()> {
    std::fs::create_dir_all(dir)?;
    if statfs(dir)?.filesystem_type() != BPF_FS_MAGIC {
        let none: Option<&str> = None;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("bpf"), dir, Some("bpf"), flags, none)?;
    }
    Ok(())
}
