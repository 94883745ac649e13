//! From the kernel's first process to a machine that containers can live on.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{chdir, chroot};

use crate::sys;

/// Where cgroup v2 is mounted.
pub(crate) const CGROUPS: &str = "/sys/fs/cgroup";

/// Where the root file system is built before it becomes the root.
const NEW_ROOT: &str = "/newroot";

/// (key, value) of every sysctl that the guest wants, whatever its pod.
///
/// The socket buffers: while the VM stands still, and just after, its packets come in one burst. A UDP
/// server that never heard of SO_RCVBUF must keep 80 ms of them, which is 400 at 5,000 a second, each
/// charged with some 2.3 KB by the kernel.
const SYSCTLS: &[(&str, &str)] = &[
    ("net.core.rmem_max", "16777216"),
    ("net.core.wmem_max", "16777216"),
    ("net.core.rmem_default", "4194304"),
    ("net.core.netdev_max_backlog", "10000"),
    ("net.core.somaxconn", "4096"),
    ("net.ipv4.ip_unprivileged_port_start", "0"),
    ("net.ipv4.ping_group_range", "0 2147483647"),
    // The pod's addresses are its own: no duplicate detection (its delay), nothing from routers.
    ("net.ipv6.conf.all.accept_dad", "0"),
    ("net.ipv6.conf.default.accept_dad", "0"),
    ("net.ipv6.conf.default.dad_transmits", "0"),
    ("net.ipv6.conf.all.accept_ra", "0"),
    ("net.ipv6.conf.default.accept_ra", "0"),
    ("vm.overcommit_memory", "1"),
    // A guest that has failed must end visibly: the VM exits.
    ("kernel.panic", "-1"),
];

/// Drivers that are given no device when they are loaded: Configure does that. A guest that is saved as a template has not looked at
/// its disks by then, and what it is given later are other ones.
const WAITING: &[&str] = &["virtio_blk"];

/// Whether a device on the virtio bus gets a driver by itself.
const AUTOPROBE: &str = "/sys/bus/virtio/drivers_autoprobe";

/// Loads the modules, builds the root in a tmpfs and moves into it. Ends with every mount in place.
pub(crate) fn prepare() -> Result<()> {
    let waiting = load_modules(Path::new("/modules"))?;
    fs::create_dir_all(NEW_ROOT).context("making the new root's folder")?;
    // A container cannot pivot_root out of the kernel's own rootfs; a tmpfs moved over it can be left.
    mount_at(
        "tmpfs",
        NEW_ROOT,
        "tmpfs",
        MsFlags::empty(),
        "mode=0755,size=80%",
    )?;
    for dir in ["proc", "sys", "dev", "run", "tmp", "images", "containers"] {
        let path = Path::new(NEW_ROOT).join(dir);
        fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
    }
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount_at(
        "proc",
        "/newroot/proc",
        "proc",
        quiet | MsFlags::MS_NODEV,
        "",
    )?;
    mount_at(
        "sysfs",
        "/newroot/sys",
        "sysfs",
        quiet | MsFlags::MS_NODEV,
        "",
    )?;
    mount_at("devtmpfs", "/newroot/dev", "devtmpfs", quiet, "mode=0755")?;
    // The kernel keeps what the initramfs holds for ever; give its pages back before the move.
    fs::remove_dir_all("/modules").ok();
    fs::remove_file("/init").ok();
    chdir(NEW_ROOT).context("entering the new root")?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .context("moving the new root over the old one")?;
    chroot(".").context("changing into the new root")?;
    chdir("/").context("changing into the new root")?;
    fs::write(AUTOPROBE, "0").context("keeping drivers from devices")?;
    for (path, file) in waiting {
        load_module(&path, &file)?;
    }
    fs::write(AUTOPROBE, "1").context("letting drivers have devices")?;
    mount_at("cgroup2", CGROUPS, "cgroup2", quiet | MsFlags::MS_NODEV, "")?;
    fs::write(
        format!("{CGROUPS}/cgroup.subtree_control"),
        "+memory +cpu +pids",
    )
    .context("giving the containers' cgroups the memory, cpu and pids controllers")?;
    symlink("/proc/self/fd", "/dev/fd").ok();
    for (key, value) in SYSCTLS {
        set_sysctl(key, value)?;
    }
    fs::write("/proc/self/oom_score_adj", "-1000")
        .context("exempting the agent from the OOM killer")?;
    setrlimit(Resource::RLIMIT_NOFILE, 65_536, 1_048_576)
        .context("raising the limit of open files")?;
    Ok(())
}

/// Sets `net.core.rmem_max` and the like by its file in /proc/sys.
pub(crate) fn set_sysctl(key: &str, value: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/');
    if !key.chars().all(plain) || key.contains("..") {
        anyhow::bail!("`{key}` is not the name of a sysctl");
    }
    let path = format!("/proc/sys/{}", key.replace('.', "/"));
    fs::write(&path, value).with_context(|| format!("setting sysctl {key} to `{value}`"))
}

/// Milliseconds since the kernel started.
pub(crate) fn uptime_ms() -> u64 {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds: f64 = text
        .split(' ')
        .next()
        .and_then(|s| s.parse().ok())
        .unwrap_or(0.0);
    (seconds * 1000.0) as u64
}

/// [`mount`] with text arguments and an error that names the target.
pub(crate) fn mount_at(
    source: &str,
    target: &str,
    kind: &str,
    flags: MsFlags,
    options: &str,
) -> Result<()> {
    mount(Some(source), target, Some(kind), flags, Some(options))
        .with_context(|| format!("mounting {kind} at {target}"))
}

/// Loads `NN-name.ko` in the order of their names, which is the order of their dependencies; gives back those that wait.
fn load_modules(dir: &Path) -> Result<Vec<(PathBuf, File)>> {
    let mut files: Vec<_> = fs::read_dir(dir)
        .context("listing the initramfs's /modules")?
        .collect::<Result<_, _>>()
        .context("listing the initramfs's /modules")?;
    files.sort_by_key(fs::DirEntry::file_name);
    let mut waiting = Vec::new();
    for entry in files {
        let path = entry.path();
        let file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        if waits(&path) {
            waiting.push((path, file));
        } else {
            load_module(&path, &file)?;
        }
    }
    Ok(waiting)
}

fn waits(path: &Path) -> bool {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let name = stem.split_once('-').map_or(&*stem, |(_, name)| name);
    WAITING.contains(&name)
}

fn load_module(path: &Path, file: &File) -> Result<()> {
    sys::finit_module(file.as_fd())
        .with_context(|| format!("loading the kernel module {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_of_disks_waits_and_no_other() {
        let waits = |path: &str| waits(Path::new(path));
        assert!(waits("/modules/06-virtio_blk.ko"));
        assert!(!waits("/modules/10-virtio-rng.ko") && !waits("/modules/09-virtio_net.ko"));
    }
}
