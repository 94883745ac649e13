//! What every container has at `/dev` and `/sys`. It stands among the agent's own mounts, and containers get copies of these: so a template
//! has it ready for the guests that start from it.

use std::ffi::{CStr, CString};
use std::fs;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, umount2};
use nix::sys::stat::{Mode, SFlag, makedev, mknod, umask};

use crate::boot::mount_at;
use crate::cgroups;
use crate::first::Waiting;

/// Where all of it stands.
const FOLDER: &str = "/furniture";

/// The folder of [`sysfs`].
pub(crate) const SYS: &CStr = c"/furniture/sys";

/// Where a container's first process has its root before it enters it, in its own mount namespace.
pub(crate) const ROOT: &CStr = c"/furniture/root";

/// What of `/sys` tells too much: the same list as containerd's.
const HIDDEN: &[&str] = &["devices/virtual/powercap", "firmware"];

/// (name, major, minor), Documentation/admin-guide/devices.txt.
const NODES: &[(&str, u64, u64)] = &[
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

/// (name, what it leads to)
const LINKS: &[(&str, &str)] = &[
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

const PLAIN: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC);
const SEALED: MsFlags = PLAIN.union(MsFlags::MS_NODEV);

/// Made before anybody needs it.
static SPARE: Mutex<Option<Devices>> = Mutex::new(None);

/// Whether [`sysfs`] is there.
static SYS_STANDS: Mutex<bool> = Mutex::new(false);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes what the first container will need.
pub(crate) fn prepare() -> Result<()> {
    sysfs()?;
    let mut spare = lock(&SPARE);
    if spare.is_none() {
        let devices = Devices::make()?;
        let waiting = Waiting::fork(&cgroups::prepare()?, &devices)?;
        *spare = Some(Devices {
            waiting: Mutex::new(Some(waiting)),
            ..devices
        });
    }
    Ok(())
}

/// Has [`SYS`], the same for all containers: nothing in it can be written to.
pub(crate) fn sysfs() -> Result<()> {
    let mut stands = lock(&SYS_STANDS);
    if *stands {
        return Ok(());
    }
    let path = ROOT.to_string_lossy();
    fs::create_dir_all(&*path).with_context(|| format!("making {path}"))?;
    let path = SYS.to_string_lossy();
    fs::create_dir_all(&*path).with_context(|| format!("making {path}"))?;
    // One that an earlier try left half done is below this one.
    let flags = SEALED | MsFlags::MS_RDONLY;
    mount_at("sysfs", &path, "sysfs", flags, "")?;
    for hidden in HIDDEN {
        let hidden = format!("{path}/{hidden}");
        if fs::exists(&hidden).unwrap_or(true) {
            mount_at("tmpfs", &hidden, "tmpfs", flags, "size=0")?;
        }
    }
    *stands = true;
    Ok(())
}

/// A container's own `/dev`, with its terminals and its shared memory. Nothing in the container can put another file in its place.
#[derive(Debug)]
pub(crate) struct Devices {
    path: CString,
    /// The process of the container that will have them, if a template has made it.
    waiting: Mutex<Option<Waiting>>,
}

impl Devices {
    /// One that no container has had.
    pub(crate) fn get() -> Result<Self> {
        let spare = lock(&SPARE).take();
        spare.map_or_else(Self::make, Ok)
    }

    fn make() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let path = format!("{FOLDER}/dev{}", NEXT.fetch_add(1, Ordering::Relaxed));
        fs::create_dir_all(&path).with_context(|| format!("making {path}"))?;
        let options = "mode=0755,size=64k,nr_inodes=1k";
        mount_at("tmpfs", &path, "tmpfs", PLAIN, options)?;
        let made = Self {
            path: CString::new(path).context("a path with a NUL in it")?,
            waiting: Mutex::new(None),
        };
        let before = umask(Mode::empty());
        let filled = made.fill();
        umask(before);
        match filled {
            Ok(()) => Ok(made),
            Err(e) => {
                made.remove();
                Err(e)
            }
        }
    }

    fn fill(&self) -> Result<()> {
        let path = self.path.to_string_lossy();
        for dir in ["pts", "shm", "mqueue"] {
            let dir = format!("{path}/{dir}");
            fs::DirBuilder::new()
                .mode(0o755)
                .create(&dir)
                .with_context(|| format!("making {dir}"))?;
        }
        let options = "newinstance,ptmxmode=0666,mode=0620,gid=5";
        mount_at("devpts", &format!("{path}/pts"), "devpts", PLAIN, options)?;
        let options = "mode=1777,size=64m";
        mount_at("shm", &format!("{path}/shm"), "tmpfs", SEALED, options)?;
        for (name, major, minor) in NODES {
            let node = format!("{path}/{name}");
            let mode = Mode::from_bits_truncate(0o666);
            mknod(node.as_str(), SFlag::S_IFCHR, mode, makedev(*major, *minor))
                .with_context(|| format!("making {node}"))?;
        }
        for (name, target) in LINKS {
            let link = format!("{path}/{name}");
            symlink(target, &link).with_context(|| format!("making {link}"))?;
        }
        Ok(())
    }

    /// For a copy of it with all that is mounted in it.
    pub(crate) fn path(&self) -> &CString {
        &self.path
    }

    /// The process that waits for a container that has them, once.
    pub(crate) fn waiting(&self) -> Option<Waiting> {
        lock(&self.waiting).take()
    }

    /// Where a new terminal comes from.
    pub(crate) fn ptmx(&self) -> String {
        format!("{}/pts/ptmx", self.path.to_string_lossy())
    }

    /// The container has its copy: its shared memory should not outlive it.
    pub(crate) fn taken(&self) {
        let shm = format!("{}/shm", self.path.to_string_lossy());
        umount2(shm.as_str(), MntFlags::MNT_DETACH).ok();
    }

    /// Takes it apart. A container that still runs keeps its copy.
    pub(crate) fn remove(self) {
        umount2(&*self.path, MntFlags::MNT_DETACH).ok();
        fs::remove_dir(&*self.path.to_string_lossy()).ok();
    }
}
