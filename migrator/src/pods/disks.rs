//! A pod's disks that can be written: which there are, their files, and serving them to its VMM.
//!
//! Disk `N` of the VM's specification has its socket at `pods/NAME/dN.nbd`, and its file at `pods/NAME/dN.img`, or, if it is a named
//! volume, at `volumes/CLAIM.img`.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::statvfs::statvfs;
use vm_runtime::pod::{PodSpec, VolumeSource};
use vm_runtime::spec::{VmSpec, WritableDisk};
use vm_runtime::units::Bytes;

use super::error::{Cause, PodError};
use crate::api::types::DiskInfo;
use crate::block::mkfs::mkfs;
use crate::block::nbd::Server;
use crate::block::{Disk, DiskError};
use crate::volumes::{VolumeError, Volumes};

/// The name of the disk that holds what containers write outside of volumes.
const ROOT: &str = "root";
/// With so much room on its file system, a guest that found it full goes on.
const ROOM_TO_GO_ON: u64 = 16 << 20;

/// A disk of a pod.
#[derive(Debug)]
pub struct PodDisk {
    /// `root`, or the volume's name in the pod.
    pub name: String,
    /// The named volume that it is, if it outlives the pod.
    pub volume: Option<String>,
    /// The disk.
    pub disk: Arc<Disk>,
    socket: PathBuf,
    server: Mutex<Option<Server>>,
}

/// How a pod's disks come to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// With empty file systems; named volumes are there.
    New,
    /// As holes, to be filled by a migration; named volumes too, which must not be there.
    Incoming,
    /// They are there.
    Found,
}

impl PodDisk {
    /// Begins to serve it to the VMM. Does nothing if it is served.
    pub(super) fn serve(&self) -> Result<(), Cause> {
        let mut server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        if server.is_none() {
            *server = Some(Server::start(Arc::clone(&self.disk), &self.socket)?);
        }
        Ok(())
    }

    /// Ends serving it, for ever: the VM that used it is gone.
    pub fn close(&self) {
        self.disk.close();
        *self.server.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Whether there is room again on the file system that it is on.
    pub(super) fn has_room(&self) -> bool {
        let room = |stat: nix::sys::statvfs::Statvfs| {
            stat.blocks_available().saturating_mul(stat.fragment_size())
        };
        statvfs(self.disk.path()).is_ok_and(|stat| room(stat) >= ROOM_TO_GO_ON)
    }

    pub(super) fn info(&self) -> DiskInfo {
        DiskInfo {
            name: self.name.clone(),
            volume: self.volume.clone(),
            size_bytes: self.disk.size(),
            allocated_bytes: self.disk.allocated_bytes().unwrap_or_default(),
        }
    }
}

/// The disks of a pod, in the order of its VM's specification.
///
/// # Errors
/// It claims a volume that is not there.
pub(super) fn plan(spec: &PodSpec, volumes: &Volumes) -> Result<Vec<WritableDisk>, VolumeError> {
    let root = spec.root_disk().map(|size| (ROOT.to_owned(), size));
    let mut wanted: Vec<(String, Bytes)> = root.into_iter().collect();
    for volume in &spec.volumes {
        let size = match &volume.source {
            VolumeSource::EmptyDir { size } => *size,
            VolumeSource::Claim { volume } => Bytes(volumes.find(volume)?.size),
        };
        wanted.push((volume.name.clone(), size));
    }
    let disk = |(at, (name, size))| WritableDisk {
        serial: format!("w{at}"),
        name,
        size,
    };
    Ok(wanted.into_iter().enumerate().map(disk).collect())
}

/// The serial of each disk of the plan, by name; that of the root first, if there is one.
pub(super) fn serials<'a>(
    spec: &PodSpec,
    disks: &'a [WritableDisk],
) -> (Option<&'a str>, Vec<(&'a str, &'a str)>) {
    let has_root = spec.root_disk().is_some();
    let (root, volumes) = disks.split_at(usize::from(has_root).min(disks.len()));
    let volumes = volumes.iter().map(|d| (d.name.as_str(), d.serial.as_str()));
    (root.first().map(|d| d.serial.as_str()), volumes.collect())
}

/// Where the VMM finds each disk, in order.
pub(super) fn sockets(dir: &Path, vm: &VmSpec) -> impl Iterator<Item = PathBuf> {
    (0..vm.writable.len()).map(|at| socket(dir, at))
}

fn socket(dir: &Path, at: usize) -> PathBuf {
    dir.join(format!("d{at}.nbd"))
}

/// Opens or makes a pod's disks; nothing is served yet. Blocks.
///
/// # Errors
/// A file cannot be opened or made, or is not of its size. Those that were made stay, in the pod's folder and for named volumes that
/// come in: the caller removes them.
pub(super) fn open(
    spec: &PodSpec,
    vm: &VmSpec,
    dir: &Path,
    volumes: &Volumes,
    origin: Origin,
) -> Result<Vec<Arc<PodDisk>>, PodError> {
    let failed = |source: Cause| PodError::step(&spec.name, "open its disks", source);
    let skipped = usize::from(spec.root_disk().is_some());
    if vm.writable.len() != spec.volumes.len() + skipped {
        return Err(failed("the VM has other disks than the pod".into()));
    }
    let open = |(at, wanted): (usize, &WritableDisk)| -> Result<Arc<PodDisk>, Cause> {
        let source = at.checked_sub(skipped).map(|at| &spec.volumes[at].source);
        let volume = match source {
            Some(VolumeSource::Claim { volume }) => Some(volume.clone()),
            Some(VolumeSource::EmptyDir { .. }) | None => None,
        };
        let path = match &volume {
            Some(volume) => volumes.path(volume)?,
            None => dir.join(format!("d{at}.img")),
        };
        let disk = match (origin, &volume) {
            (Origin::Found, _) | (Origin::New, Some(_)) => Disk::open(&path)?,
            (Origin::Incoming, _) => {
                if let (Some(_), Some(dir)) = (&volume, path.parent()) {
                    std::fs::create_dir_all(dir)?;
                }
                Disk::create(&path, wanted.size.0)?
            }
            (Origin::New, None) => {
                let disk = Disk::create(&path, wanted.size.0)?;
                mkfs(&path)?;
                disk
            }
        };
        if disk.size() != wanted.size.0 {
            let size = disk.size();
            return Err(Box::new(DiskError::Size { size }));
        }
        Ok(Arc::new(PodDisk {
            name: wanted.name.clone(),
            volume,
            disk: Arc::new(disk),
            socket: socket(dir, at),
            server: Mutex::new(None),
        }))
    };
    let disks = vm.writable.iter().enumerate().map(open);
    disks.collect::<Result<_, _>>().map_err(failed)
}

/// Serves them all. Blocks for a moment.
///
/// # Errors
/// A socket cannot be made.
pub(super) fn serve(pod: &str, disks: &[Arc<PodDisk>]) -> Result<(), PodError> {
    disks
        .iter()
        .try_for_each(|disk| disk.serve())
        .map_err(|e| PodError::step(pod, "serve its disks", e))
}
