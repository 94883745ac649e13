//! What a container sees as `/`. Runs in the container's first process, before its program.
//!
//! The root is changed first and everything else is mounted inside, so that a symlink in an image
//! (`/proc -> ...`) can only lead to other places in the same image.

use std::ffi::{CStr, CString};
use std::fs::{self, Permissions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{chdir, pivot_root};

use crate::boot::mount_at;
use crate::furniture::{self, Devices};
use crate::identity::{OWN_UUID, PRODUCT_UUID};
use crate::sys;

/// Files of /proc that act on the whole guest: read-only, as every container runtime has it.
const READ_ONLY: &[&str] = &["bus", "fs", "irq", "sys", "sysrq-trigger"];

/// What of it tells too much, the same list as containerd's: a file is put behind /dev/null, a folder behind an empty one.
const HIDDEN: &[&str] = &[
    "acpi",
    "asound",
    "kcore",
    "keys",
    "latency_stats",
    "sched_debug",
    "scsi",
    "timer_list",
    "timer_stats",
];

/// Copies of what stands ready for containers.
pub(crate) struct Furniture {
    dev: OwnedFd,
    sys: OwnedFd,
}

impl Furniture {
    /// Before the root is changed.
    pub(crate) fn copy(devices: &Devices) -> Result<Self> {
        let copy = |path: &CStr| {
            let copy = sys::clone_mounts(path);
            copy.with_context(|| format!("copying the mounts of {}", path.to_string_lossy()))
        };
        Ok(Self {
            dev: copy(devices.path())?,
            sys: copy(furniture::SYS)?,
        })
    }
}

/// Enters the root that a detached mount is, and mounts what a program expects. The process is alone in new mount and PID namespaces.
pub(crate) fn enter(root: &OwnedFd, furniture: Furniture) -> Result<()> {
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
        .context("making the mounts private")?;
    sys::attach_mount(root.as_fd(), furniture::ROOT).context("attaching the root")?;
    let root = furniture::ROOT;
    chdir(root).with_context(|| format!("entering {}", root.to_string_lossy()))?;
    // Both at the same place: the old root ends up on top of the new one and is taken off.
    pivot_root(".", ".").context("changing the root")?;
    umount2(".", MntFlags::MNT_DETACH).context("leaving the old root")?;
    chdir("/").context("entering the new root")?;
    umask(Mode::empty());
    let result = furnish(&furniture);
    umask(Mode::S_IWGRP | Mode::S_IWOTH);
    result
}

fn furnish(furniture: &Furniture) -> Result<()> {
    let sealed = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV;
    for dir in ["/proc", "/sys", "/dev", "/tmp"] {
        make_dir(dir, if dir == "/tmp" { 0o1777 } else { 0o755 })?;
    }
    mount_at("proc", "/proc", "proc", sealed, "")?;
    sys::attach_mount(furniture.sys.as_fd(), c"/sys").context("attaching /sys")?;
    // Its own cgroup is the root of what it sees: its limits, and what it uses of them.
    mount_at(
        "cgroup2",
        "/sys/fs/cgroup",
        "cgroup2",
        sealed | MsFlags::MS_RDONLY,
        "",
    )?;
    sys::attach_mount(furniture.dev.as_fd(), c"/dev").context("attaching /dev")?;
    mount_at("mqueue", "/dev/mqueue", "mqueue", sealed, "")?;
    for name in READ_ONLY {
        let path = format!("/proc/{name}");
        if !Path::new(&path).exists() {
            continue;
        }
        bind(&path, &path)?;
        let flags = sealed | MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(
            None::<&str>,
            path.as_str(),
            None::<&str>,
            flags,
            None::<&str>,
        )
        .with_context(|| format!("making {path} read-only"))?;
    }
    for name in HIDDEN {
        let path = format!("/proc/{name}");
        match fs::metadata(&path) {
            Ok(found) if found.is_dir() => {
                let flags = sealed | MsFlags::MS_RDONLY;
                mount_at("tmpfs", &path, "tmpfs", flags, "size=0")?;
            }
            Ok(_) => bind("/dev/null", &path)?,
            Err(_) => {}
        }
    }
    Ok(())
}

/// Makes the root read-only; what is mounted in it stays as it is.
pub(crate) fn seal() -> Result<()> {
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount_nothing("/", flags).context("making the root read-only")
}

fn bind(from: &str, to: &str) -> Result<()> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("binding {from} at {to}"))
}

fn make_dir(path: &str, mode: u32) -> Result<()> {
    if !Path::new(path).is_dir() {
        fs::create_dir_all(path).with_context(|| format!("making {path}"))?;
        fs::set_permissions(path, Permissions::from_mode(mode))
            .with_context(|| format!("setting the mode of {path}"))?;
    }
    Ok(())
}

/// Attaches the mount of a volume, after the root was changed: a symlink in an image leads to another place in the same image at most.
pub(crate) fn attach_volume(path: &str, read_only: bool, mount: &OwnedFd) -> Result<()> {
    make_dir(path, 0o755)?;
    let target = CString::new(path).context("a path with a NUL in it")?;
    sys::attach_mount(mount.as_fd(), &target)
        .with_context(|| format!("attaching the volume at {path}"))?;
    if read_only {
        let flags = MsFlags::MS_BIND
            | MsFlags::MS_REMOUNT
            | MsFlags::MS_RDONLY
            | MsFlags::MS_NODEV
            | MsFlags::MS_NOATIME;
        mount_nothing(path, flags)
            .with_context(|| format!("making the volume at {path} read-only"))?;
    }
    Ok(())
}

/// The VM's own UUID over the one that a template's kernel has read from the firmware.
pub(crate) struct Disguise(Option<OwnedFd>);

impl Disguise {
    /// Before the root is changed.
    pub(crate) fn copy() -> Result<Self> {
        if !Path::new(OWN_UUID).exists() || !Path::new(PRODUCT_UUID).exists() {
            return Ok(Self(None));
        }
        let path = CString::new(OWN_UUID).context("a path with a NUL in it")?;
        let mount = sys::clone_mount(&path);
        let mount = mount.with_context(|| format!("copying the mount of {OWN_UUID}"))?;
        Ok(Self(Some(mount)))
    }

    /// After it.
    pub(crate) fn put_on(self) -> Result<()> {
        let Some(mount) = self.0 else {
            return Ok(());
        };
        let sealed = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV;
        let target = CString::new(PRODUCT_UUID).context("a path with a NUL in it")?;
        sys::attach_mount(mount.as_fd(), &target)
            .with_context(|| format!("attaching the VM's UUID at {PRODUCT_UUID}"))?;
        let flags = sealed | MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount_nothing(PRODUCT_UUID, flags)
            .with_context(|| format!("making {PRODUCT_UUID} read-only"))?;
        Ok(())
    }
}

fn mount_nothing(path: &str, flags: MsFlags) -> nix::Result<()> {
    mount(None::<&str>, path, None::<&str>, flags, None::<&str>)
}
