//! Image disks, found by their virtio-blk serial, and each container's writable root over them.

use std::ffi::CString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::mount::MsFlags;

use crate::boot::mount_at;

/// How long a disk may take to show up after the driver was loaded.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a container lives on, in the agent's own mount namespace.
#[derive(Debug)]
pub(crate) struct Root {
    /// The overlay: image below, tmpfs above.
    pub(crate) path: PathBuf,
    /// The container's own devpts instance. Nothing in the container can put another file in its place.
    pub(crate) pts: CString,
}

/// Mounts the image and the overlay over it.
pub(crate) fn prepare_root(container: &str, disk: &str) -> Result<Root> {
    let image = mount_image(disk)?;
    let base = PathBuf::from("/containers").join(container);
    let dir = |name: &str| -> Result<String> {
        let path = base.join(name);
        fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(path.to_string_lossy().into_owned())
    };
    let (root, pts) = (dir("root")?, dir("pts")?);
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        image.display(),
        dir("upper")?,
        dir("work")?
    );
    mount_at("overlay", &root, "overlay", MsFlags::empty(), &options)?;
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount_at(
        "devpts",
        &pts,
        "devpts",
        quiet,
        "newinstance,ptmxmode=0666,mode=0620,gid=5",
    )?;
    Ok(Root {
        path: root.into(),
        pts: CString::new(pts).context("a container's name with a NUL")?,
    })
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

fn find(disk: &str) -> Result<PathBuf> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        for entry in fs::read_dir("/sys/block")
            .context("listing the disks")?
            .flatten()
        {
            let serial = fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
            let device = Path::new("/dev").join(entry.file_name());
            if serial.trim_end() == disk && device.exists() {
                return Ok(device);
            }
        }
        if Instant::now() > deadline {
            bail!("the VM has no virtio-blk disk with the serial `{disk}`");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
