//! A pod's disks that can be written: which there are, their files, and serving them to its VMM.
//!
//! Disk `N` of the VM's specification has its socket at `pods/NAME/dN.nbd`, and its file at `pods/NAME/dN.img`, or, if it is a named
//! volume, at `volumes/CLAIM.img`. A named volume that a migration fills is in the pod's folder until the pod is this node's: so
//! what removes the folder removes all of a pod that has not come.
//!
//! A disk of a shared class ([`crate::storage`]) is not here: a file that the service serves, or an image that QEMU reads and writes by itself. It
//! is taken when the pod begins, or at the grant, and does not move.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::statvfs::statvfs;
use vm_runtime::pod::{PodSpec, VolumeSource};
use vm_runtime::spec::{SharedDisk, SharedDriver, VmSpec, WritableDisk};
use vm_runtime::units::{Bytes, Epoch};

use super::error::{Cause, PodError};
use crate::api::types::DiskInfo;
use crate::block::mkfs::mkfs;
use crate::block::nbd::Server;
use crate::block::{Disk, DiskError};
use crate::storage::{SharedHandle, Storage, StorageError, Take};
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
    size: Bytes,
    /// What the service serves; `None` if QEMU reads and writes the disk by itself.
    served: Option<Arc<Disk>>,
    /// Where it is, if it does not move.
    shared: Option<SharedHandle>,
    socket: PathBuf,
    server: Mutex<Option<Server>>,
}

/// How a pod's disks come to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// With empty file systems; named volumes are there, and are taken in this epoch.
    New(Epoch),
    /// As holes, to be filled by a migration; named volumes too, which must not be there, and are in the pod's folder until [`settle`]. Shared
    /// ones are there, and the source's until [`PodDisk::take`].
    Incoming,
    /// They are there, and the pod is this node's in this epoch.
    Found(Epoch),
    /// They are there, and another node may have taken the pod over: shared ones are not touched until that is known.
    InDoubt(Epoch),
}

impl PodDisk {
    /// Begins to serve it to the VMM. Does nothing if it is served.
    pub(super) fn serve(&self) -> Result<(), Cause> {
        let Some(disk) = &self.served else {
            return Ok(());
        };
        let mut server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        if server.is_none() {
            *server = Some(Server::start(Arc::clone(disk), &self.socket)?);
        }
        Ok(())
    }

    /// The disk, if this service serves it.
    pub fn served(&self) -> Option<&Arc<Disk>> {
        self.served.as_ref()
    }

    /// The disk, if it is on this node, and so moves with its pod.
    pub fn local(&self) -> Option<&Arc<Disk>> {
        match self.shared {
            Some(_) => None,
            None => self.served.as_ref(),
        }
    }

    /// The shared volume that it is.
    pub fn shared(&self) -> Option<&SharedHandle> {
        self.shared.as_ref()
    }

    /// Ends serving it, for ever: the VM that used it is gone.
    pub fn close(&self) {
        if let Some(disk) = &self.served {
            disk.close();
        }
        *self.server.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.let_go();
    }

    /// Lets another node take a shared disk: the guest stands still, and its VMM has flushed.
    pub fn let_go(&self) {
        if let Some(shared) = &self.shared {
            shared.let_go();
        }
    }

    /// Takes a shared disk back that was let go: nobody took it. Blocks.
    ///
    /// # Errors
    /// Somebody did, or the storage fails.
    pub fn take_back(&self) -> Result<(), StorageError> {
        self.shared.as_ref().map_or(Ok(()), SharedHandle::take_back)
    }

    /// The pod is granted to this node: a shared disk is, too, and is served from here on. Blocks.
    ///
    /// # Errors
    /// The source has not let go, or the storage fails.
    pub(crate) fn take(&self, epoch: Epoch) -> Result<(), Cause> {
        let Some(shared) = &self.shared else {
            return Ok(());
        };
        shared.take(epoch, Take::Owned)?;
        if let Some(disk) = &self.served {
            disk.arrive()?;
        }
        Ok(())
    }

    /// Whether there is room again on the file system that it is on.
    pub(super) fn has_room(&self) -> bool {
        let Some(disk) = &self.served else {
            // QEMU asks the cluster itself.
            return true;
        };
        let room = |stat: nix::sys::statvfs::Statvfs| {
            stat.blocks_available().saturating_mul(stat.fragment_size())
        };
        statvfs(disk.path()).is_ok_and(|stat| room(stat) >= ROOM_TO_GO_ON)
    }

    pub(super) fn info(&self) -> DiskInfo {
        let allocated = self.served.as_ref().map(|disk| disk.allocated_bytes());
        DiskInfo {
            name: self.name.clone(),
            volume: self.volume.clone(),
            size_bytes: self.size.0,
            allocated_bytes: allocated.and_then(Result::ok).unwrap_or_default(),
            class: self
                .shared
                .as_ref()
                .map(|shared| shared.disk().class.clone()),
        }
    }
}

/// Why a pod's disks cannot be planned.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// A volume of this node.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// One of a shared class.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// The disks of a pod, in the order of its VM's specification. Blocks.
///
/// # Errors
/// It claims a volume that is not there, or wants a class that is not.
pub(super) fn plan(
    spec: &PodSpec,
    volumes: &Volumes,
    storage: &Storage,
    uuid: &str,
) -> Result<Vec<WritableDisk>, PlanError> {
    let own = |name: &str| {
        let class = spec.storage_class.as_ref();
        let volume = format!("{}.{uuid}.{name}", spec.name);
        class
            .map(|class| storage.describe(class, volume, true))
            .transpose()
    };
    let mut wanted: Vec<(String, Bytes, Option<SharedDisk>)> = Vec::new();
    if let Some(size) = spec.root_disk() {
        wanted.push((ROOT.to_owned(), size, own(ROOT)?));
    }
    for volume in &spec.volumes {
        let (size, shared) = match &volume.source {
            VolumeSource::EmptyDir { size } => match own(&volume.name)? {
                Some(shared) => (Bytes(size.0.next_multiple_of(1 << 20)), Some(shared)),
                None => (*size, None),
            },
            VolumeSource::Claim { volume } => match volumes.find(volume) {
                Err(VolumeError::NotFound(_)) => match storage.find(volume)? {
                    Some(found) => {
                        let shared = storage.describe(&found.class, found.name, false)?;
                        (Bytes(found.size), Some(shared))
                    }
                    None => return Err(VolumeError::NotFound(volume.clone()).into()),
                },
                found => (Bytes(found?.size), None),
            },
        };
        wanted.push((volume.name.clone(), size, shared));
    }
    let disk = |(at, (name, size, shared))| WritableDisk {
        serial: format!("w{at}"),
        name,
        size,
        shared,
    };
    Ok(wanted.into_iter().enumerate().map(disk).collect())
}

/// The named volumes of a pod that are on its node.
pub(crate) fn local_claims<'a>(spec: &'a PodSpec, vm: &'a VmSpec) -> impl Iterator<Item = &'a str> {
    let shared = |name: &str| {
        let disk = vm.writable.iter().find(|disk| disk.name == name);
        disk.is_some_and(|disk| disk.shared.is_some())
    };
    spec.volumes
        .iter()
        .filter_map(move |volume| match &volume.source {
            VolumeSource::Claim { volume: claim } if !shared(&volume.name) => Some(claim.as_str()),
            VolumeSource::Claim { .. } | VolumeSource::EmptyDir { .. } => None,
        })
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
/// A file cannot be opened or made, or is not of its size, or a shared one is another's. Those that were made stay, in the pod's folder, for named
/// volumes that come in, and on shared storage: the caller removes them.
pub(super) fn open(
    spec: &PodSpec,
    vm: &VmSpec,
    dir: &Path,
    volumes: &Volumes,
    storage: &Arc<Storage>,
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
        let (served, shared) = match &wanted.shared {
            None => {
                let disk = open_local(at, wanted, volume.as_deref(), dir, volumes, origin)?;
                (Some(disk), None)
            }
            Some(shared) => {
                let handle = SharedHandle::new(storage, shared, &spec.name);
                (open_shared(wanted, &handle, storage, origin)?, Some(handle))
            }
        };
        if let Some(disk) = &served
            && disk.size() != wanted.size.0
        {
            let size = disk.size();
            return Err(Box::new(DiskError::Size { size }));
        }
        Ok(Arc::new(PodDisk {
            name: wanted.name.clone(),
            volume,
            size: wanted.size,
            served: served.map(Arc::new),
            shared,
            socket: socket(dir, at),
            server: Mutex::new(None),
        }))
    };
    let disks = vm.writable.iter().enumerate().map(open);
    disks.collect::<Result<_, _>>().map_err(failed)
}

fn open_local(
    at: usize,
    wanted: &WritableDisk,
    volume: Option<&str>,
    dir: &Path,
    volumes: &Volumes,
    origin: Origin,
) -> Result<Disk, Cause> {
    let path = match volume {
        Some(volume) if origin != Origin::Incoming => volumes.path(volume)?,
        Some(_) | None => dir.join(format!("d{at}.img")),
    };
    match (origin, volume) {
        (Origin::Found(_) | Origin::InDoubt(_), Some(volume)) => {
            // A service that was killed after the grant has not come to it.
            settle(dir, at, volume, volumes)?;
            Ok(Disk::open(&path)?)
        }
        (Origin::Found(_) | Origin::InDoubt(_), None) | (Origin::New(_), Some(_)) => {
            Ok(Disk::open(&path)?)
        }
        (Origin::Incoming, _) => {
            if let Some(volume) = volume
                && volumes.find(volume).is_ok()
            {
                return Err(Box::new(VolumeError::Taken(volume.to_owned())));
            }
            Ok(Disk::create(&path, wanted.size.0)?)
        }
        (Origin::New(_), None) => {
            let disk = Disk::create(&path, wanted.size.0)?;
            mkfs(&path)?;
            Ok(disk)
        }
    }
}

/// `None`: QEMU opens it by itself.
fn open_shared(
    wanted: &WritableDisk,
    handle: &SharedHandle,
    storage: &Storage,
    origin: Origin,
) -> Result<Option<Disk>, Cause> {
    let shared = handle.disk();
    match origin {
        Origin::New(epoch) => {
            if shared.ephemeral {
                let class = storage.class(&shared.class)?;
                class.create(&shared.volume, wanted.size, true)?;
            }
            handle.take(epoch, Take::New)?;
        }
        Origin::Found(epoch) => match handle.take(epoch, Take::Owned) {
            // QEMU has it open, and nobody else took it as far as is known: a cluster that is down is no reason to end the pod.
            Err(error) if handle.driver() == SharedDriver::Rbd && !error.is_refusal() => {
                tracing::error!(
                    volume = shared.volume,
                    error = crate::api::error::chain(&error),
                    "whose it is cannot be asked"
                );
            }
            taken => taken?,
        },
        Origin::InDoubt(epoch) => handle.had(epoch),
        Origin::Incoming => handle.note_source()?,
    }
    let Some(path) = handle.file()? else {
        return Ok(None);
    };
    Ok(Some(match origin {
        Origin::Incoming => Disk::later(&path, wanted.size.0)?,
        Origin::New(_) | Origin::Found(_) | Origin::InDoubt(_) => Disk::open(&path)?,
    }))
}

/// Whether disks were not opened because another pod has one of them.
pub(super) fn is_refusal(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if error
            .downcast_ref::<StorageError>()
            .is_some_and(StorageError::is_refusal)
        {
            return true;
        }
        next = error.source();
    }
    false
}

/// Puts a named volume that came with a pod where named volumes are; nothing if it is there.
fn settle(dir: &Path, at: usize, volume: &str, volumes: &Volumes) -> Result<(), VolumeError> {
    let came = dir.join(format!("d{at}.img"));
    match came.exists() {
        true => volumes.take_in(volume, &came),
        false => Ok(()),
    }
}

/// The pod is this node's: puts the named volumes among its disks where they outlive it. Blocks for a moment.
pub(super) fn settle_all(dir: &Path, disks: &[Arc<PodDisk>], volumes: &Volumes) {
    for (at, disk) in disks.iter().enumerate() {
        if let (Some(volume), None) = (&disk.volume, &disk.shared)
            && let Err(error) = settle(dir, at, volume, volumes)
        {
            tracing::error!(
                volume,
                error = crate::api::error::chain(&error),
                "a volume that came stays in its pod's folder until the service is started again"
            );
        }
    }
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
