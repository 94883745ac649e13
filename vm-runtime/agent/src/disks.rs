//! Disks, found by their virtio-blk serial: images, each container's writable root over one, and volumes.

use std::ffi::{CString, OsString};
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use guest_agent::protocol::message::Mount;
use guest_agent::protocol::settings::{MemoryMount, MemoryVolume};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::boot::mount_at;
use crate::furniture::{self, Devices};

/// How long a disk may take to show up after the driver was loaded.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a container lives on, in the agent's own mount namespace.
#[derive(Debug)]
pub(crate) struct Root {
    /// The overlay: image below, a disk or guest memory above.
    pub(crate) path: PathBuf,
    /// The container's own `/dev`.
    pub(crate) devices: Devices,
}

/// A volume, mounted by the agent for containers to get a copy of that.
#[derive(Debug)]
pub(crate) struct Volume {
    /// The folder of it, in the agent's own mount namespace.
    pub(crate) source: CString,
    /// Where the container has it.
    pub(crate) path: String,
    /// Whether it may only read.
    pub(crate) read_only: bool,
}

/// Where disks that can be written are mounted.
const DISKS: &str = "/disks";

/// Where volumes in memory are mounted.
const MEMORY: &str = "/memory";

/// `discard`: what is freed is given back to the node at once. `noinit_itable`: the rest of the disk is zeros already.
const EXT4_OPTIONS: &str = "discard,noinit_itable";

/// Virtio devices, as sysfs shows them.
const BUS: &str = "/sys/bus/virtio";

/// Serials and devices of the disks that a template has given their driver, for guests that start from it. `None`: nobody has looked.
static KNOWN: Mutex<Option<Vec<(String, PathBuf)>>> = Mutex::new(None);

fn known() -> MutexGuard<'static, Option<Vec<(String, PathBuf)>>> {
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives the disks their driver and looks them up, for guests that start from this one. They are empty: how large they are, these guests'
/// VMMs tell.
pub(crate) fn prepare() -> Result<()> {
    attach()?;
    *known() = Some(list()?);
    Ok(())
}

/// Gives each disk of the VM its driver, if that has not been done; again is no error.
pub(crate) fn attach() -> Result<()> {
    if known().is_some() {
        return Ok(());
    }
    for name in without_driver()? {
        let bind = Path::new(BUS).join("drivers/virtio_blk/bind");
        fs::write(bind, name.as_encoded_bytes())
            .with_context(|| format!("attaching the disk {}", name.display()))?;
    }
    Ok(())
}

fn without_driver() -> Result<Vec<OsString>> {
    /// `VIRTIO_ID_BLOCK`, as sysfs shows it (linux/virtio_ids.h).
    const BLOCK: &str = "0x0002";
    let devices = fs::read_dir(Path::new(BUS).join("devices"));
    let devices = devices.context("listing the VM's devices")?.flatten();
    let waits = |path: PathBuf| {
        let kind = fs::read_to_string(path.join("device")).unwrap_or_default();
        kind.trim_end() == BLOCK && !path.join("driver").exists()
    };
    let waiting = devices.filter(|device| waits(device.path()));
    Ok(waiting.map(|device| device.file_name()).collect())
}

/// Mounts the image and the overlay over it; what is written goes to the disk `layer`, or to guest memory.
pub(crate) fn prepare_root(container: &str, disk: &str, layer: Option<&str>) -> Result<Root> {
    let image = mount_image(disk)?;
    let base = PathBuf::from("/containers").join(container);
    let dir = |name: &str| -> Result<String> {
        let path = base.join(name);
        fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(path.to_string_lossy().into_owned())
    };
    let root = dir("root")?;
    let (upper, work) = match layer {
        None => (dir("upper")?, dir("work")?),
        Some(layer) => {
            let layer = mount_writable(layer)?.join(container);
            let dir = |name: &str| -> Result<String> {
                let path = layer.join(name);
                fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
                Ok(path.to_string_lossy().into_owned())
            };
            (dir("upper")?, dir("work")?)
        }
    };
    let options = format!(
        "lowerdir={},upperdir={upper},workdir={work}",
        image.display()
    );
    mount_at("overlay", &root, "overlay", MsFlags::empty(), &options)?;
    furniture::sysfs()?;
    Ok(Root {
        path: root.into(),
        devices: Devices::get()?,
    })
}

/// Puts away what an earlier run of a container has written outside of volumes: each run begins with the image as it is. Returns
/// the folder, to be removed.
pub(crate) fn put_away(container: &str, layer: Option<&str>, root: Root) -> Result<PathBuf> {
    root.devices.remove();
    umount2(&root.path, MntFlags::MNT_DETACH).context("unmounting the root of before")?;
    let base = match layer {
        None => PathBuf::from("/containers").join(container),
        Some(layer) => mount_writable(layer)?.join(container),
    };
    // One that is still being removed is in nobody's way under another name.
    let aside = (0..)
        .map(|n| base.with_extension(format!("old{n}")))
        .find(|path| !path.exists());
    let aside = aside.context("no name is left")?;
    fs::rename(&base, &aside).with_context(|| format!("putting {} away", base.display()))?;
    Ok(aside)
}

/// Mounts a container's volumes that are in memory; containers of one pod share them.
pub(crate) fn prepare_memory(
    volumes: &[MemoryVolume],
    mounts: &[MemoryMount],
    group: Option<u32>,
) -> Result<Vec<Volume>> {
    let prepare = |mount: &MemoryMount| {
        let volume = volumes.iter().find(|v| v.name == mount.volume);
        let volume = volume.with_context(|| format!("the pod has no volume {}", mount.volume))?;
        let target = Path::new(MEMORY).join(&volume.name);
        if !target.exists() {
            fs::create_dir_all(&target).with_context(|| format!("making {}", target.display()))?;
            let size = volume.size.map(|size| format!(",size={size}"));
            let options = format!("mode=0777{}", size.unwrap_or_default());
            let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
            let path = target.to_string_lossy();
            mount_at("tmpfs", &path, "tmpfs", quiet, &options)?;
            give(&target, group)?;
        }
        let source = CString::new(target.into_os_string().into_vec());
        Ok(Volume {
            source: source.context("a volume's name with a NUL")?,
            path: mount.path.clone(),
            read_only: mount.read_only,
        })
    };
    mounts.iter().map(prepare).collect()
}

/// Gives a volume to a group, and so what is made in it: `fsGroup`.
fn give(volume: &Path, group: Option<u32>) -> Result<()> {
    let Some(group) = group else { return Ok(()) };
    chown(volume, None, Some(group))
        .and_then(|()| fs::set_permissions(volume, fs::Permissions::from_mode(0o2777)))
        .with_context(|| format!("giving {} to group {group}", volume.display()))
}

/// Mounts a container's volumes.
pub(crate) fn prepare_volumes(mounts: &[Mount], group: Option<u32>) -> Result<Vec<Volume>> {
    let prepare = |mount: &Mount| {
        // Not the file system's own root: programs that want an empty folder do not want lost+found.
        let source = mount_writable(&mount.disk)?.join("volume");
        if !source.exists() {
            fs::create_dir(&source).with_context(|| format!("making {}", source.display()))?;
            // As emptyDir has it: containers run as different users.
            fs::set_permissions(&source, fs::Permissions::from_mode(0o777))
                .with_context(|| format!("opening {} to all", source.display()))?;
        }
        give(&source, group)?;
        let source = CString::new(source.into_os_string().into_vec());
        Ok(Volume {
            source: source.context("a disk's name with a NUL")?,
            path: mount.path.clone(),
            read_only: mount.read_only,
        })
    };
    mounts.iter().map(prepare).collect()
}

fn mount_writable(disk: &str) -> Result<PathBuf> {
    let target = Path::new(DISKS).join(disk);
    if target.exists() {
        return Ok(target);
    }
    let device = find(disk)?;
    fs::create_dir_all(&target).with_context(|| format!("making {}", target.display()))?;
    let mounted = mount_at(
        &device.to_string_lossy(),
        &target.to_string_lossy(),
        "ext4",
        MsFlags::MS_NODEV | MsFlags::MS_NOATIME,
        EXT4_OPTIONS,
    );
    if mounted.is_err() {
        fs::remove_dir(&target).ok();
    }
    mounted.with_context(|| format!("disk `{disk}`: is it an ext4 file system?"))?;
    Ok(target)
}

/// Unmounts a container's root.
pub(crate) fn let_go(root: Root) {
    root.devices.remove();
    umount2(&root.path, MntFlags::empty()).ok();
}

/// Writes everything back, and unmounts the disks; what somebody still has open becomes read-only at least, which leaves it as clean.
pub(crate) fn unmount_all() {
    nix::unistd::sync();
    for entry in fs::read_dir(DISKS).into_iter().flatten().flatten() {
        let path = entry.path();
        if umount2(&path, MntFlags::empty()).is_err() {
            let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            mount(None::<&str>, &path, None::<&str>, flags, None::<&str>).ok();
        }
    }
}

fn mount_image(disk: &str) -> Result<PathBuf> {
    let target = Path::new("/images").join(disk);
    if target.exists() {
        return Ok(target);
    }
    let device = find(disk)?;
    fs::create_dir(&target).with_context(|| format!("making {}", target.display()))?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV;
    let mounted = mount_at(
        &device.to_string_lossy(),
        &target.to_string_lossy(),
        "erofs",
        flags,
        "",
    );
    if mounted.is_err() {
        fs::remove_dir(&target).ok();
    }
    mounted.with_context(|| format!("disk `{disk}`: is it an EROFS image?"))?;
    Ok(target)
}

/// The device of a disk, once it is there and not empty.
fn find(disk: &str) -> Result<PathBuf> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let device = match &*known() {
            Some(known) => of(disk, known),
            None => of(disk, &list()?),
        };
        let found = device.as_deref().map(size);
        match (device, found) {
            (Some(device), Some(Ok(1..))) => return Ok(device),
            _ if Instant::now() <= deadline => std::thread::sleep(Duration::from_millis(1)),
            (_, None) => bail!("the VM has no virtio-blk disk with the serial `{disk}`"),
            (_, Some(size)) => {
                size.with_context(|| format!("asking the size of the disk `{disk}`"))?;
                bail!("the disk `{disk}` is empty");
            }
        }
    }
}

fn of(disk: &str, known: &[(String, PathBuf)]) -> Option<PathBuf> {
    let found = known.iter().find(|(serial, _)| serial == disk);
    found.map(|(_, device)| device.clone())
}

/// In bytes.
fn size(device: &Path) -> io::Result<u64> {
    File::open(device)?.seek(SeekFrom::End(0))
}

/// The serials of all disks that have a driver, and their devices.
fn list() -> Result<Vec<(String, PathBuf)>> {
    let entries = fs::read_dir("/sys/block").context("listing the disks")?;
    let one = |entry: fs::DirEntry| {
        let serial = fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
        let device = Path::new("/dev").join(entry.file_name());
        (serial.trim_end().to_owned(), device)
    };
    Ok(entries.flatten().map(one).collect())
}
