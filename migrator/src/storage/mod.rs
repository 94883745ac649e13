//! Storage that several nodes see: volumes that do not move when their pod does.
//!
//! ```text
//!   class `local`   STATE_DIR                                            see [`crate::volumes`]
//!   driver `file`   a folder of a mounted file system, served by us      DIR/NAME.img, DIR/NAME.claim
//!   driver `rbd`    an image of a Ceph pool, read and written by QEMU    POOL/NAME, its metadata
//! ```
//!
//! Who has a volume is written on the shared storage itself ([`holder`]). It changes hands at the grant, after the source's guest
//! stopped and all that it wrote is durable, and before the destination's runs. Two guards stand behind that:
//!
//! - `file`: the service that serves a volume holds a lock on its claim. The source drops it before it sends the grant; the
//!   destination opens the file only once it has it.
//! - `rbd`: Ceph's exclusive lock goes to whoever writes next, and so is none. Should the source not be heard of after the grant, its
//!   QEMU is blocklisted.

mod class;
mod error;
mod file;
mod handle;
pub mod holder;
mod lock;
mod rbd;
mod slots;

use std::collections::BTreeMap;
use std::path::Path;

use vm_runtime::command_line::RbdImage;
use vm_runtime::spec::{SharedDisk, VmSpec};
use vm_runtime::units::{Bytes, Epoch};

pub use class::Class;
pub use error::StorageError;
pub use handle::SharedHandle;
pub use holder::{Holder, Record, Take};
pub use rbd::ToolError;

use crate::config;

/// A volume of a shared class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedVolume {
    /// Its class.
    pub class: String,
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// What it takes there, in bytes.
    pub allocated: u64,
    /// Who has it.
    pub record: Record,
}

/// The shared classes of a node. Its calls block: for as long as the storage takes, or until a deadline where it is a Ceph cluster.
#[derive(Debug, Default)]
pub struct Storage {
    node: String,
    classes: BTreeMap<String, Class>,
}

impl Storage {
    /// The classes of a configuration. Nothing is asked of the storage yet: it may be down while the service starts.
    ///
    /// # Errors
    /// A key can be read by others than its owner, or the folder for what librados is told cannot be written to.
    pub fn open(
        config: &config::Storage,
        node: &str,
        state_dir: &Path,
    ) -> Result<Self, StorageError> {
        let classes = config.classes.iter().map(|(name, class)| {
            let class = Class::open(name, class, &state_dir.join("storage"))?;
            Ok((name.clone(), class))
        });
        Ok(Self {
            node: node.to_owned(),
            classes: classes.collect::<Result<_, _>>()?,
        })
    }

    /// The class of that name.
    ///
    /// # Errors
    /// This node has none.
    pub fn class(&self, name: &str) -> Result<&Class, StorageError> {
        self.classes.get(name).ok_or_else(|| StorageError::NoClass {
            class: name.to_owned(),
            known: self.classes.keys().cloned().collect(),
        })
    }

    /// A pod of this node as a holder.
    pub fn holder(&self, pod: &str, epoch: Epoch) -> Holder {
        Holder {
            node: self.node.clone(),
            pod: pod.to_owned(),
            epoch,
        }
    }

    /// The volume of that name, in whichever class.
    ///
    /// # Errors
    /// It is in none, and a class could not be asked.
    pub fn find(&self, name: &str) -> Result<Option<SharedVolume>, StorageError> {
        let mut failed = None;
        for class in self.classes.values() {
            match class.find(name) {
                Ok(Some(found)) => return Ok(Some(found)),
                Ok(None) => {}
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(None), Err)
    }

    /// All volumes, and which classes could not be asked.
    pub fn list(&self) -> (Vec<SharedVolume>, Vec<StorageError>) {
        let (mut volumes, mut failed) = (Vec::new(), Vec::new());
        for class in self.classes.values() {
            match class.list() {
                Ok(found) => volumes.extend(found),
                Err(error) => failed.push(error),
            }
        }
        (volumes, failed)
    }

    /// How a volume is named in a VM's specification.
    ///
    /// # Errors
    /// The storage cannot be asked what it is.
    pub fn describe(
        &self,
        class: &str,
        volume: String,
        ephemeral: bool,
    ) -> Result<SharedDisk, StorageError> {
        let found = self.class(class)?;
        Ok(SharedDisk {
            class: class.to_owned(),
            class_id: found.id()?,
            volume,
            driver: found.driver(),
            ephemeral,
        })
    }

    /// Whether a disk that another node offers is here, is the same, and is that pod's.
    ///
    /// # Errors
    /// In words for the other node: what does not fit, and what to do.
    pub fn check_offered(
        &self,
        disk: &SharedDisk,
        size: Bytes,
        from: &str,
        pod: &str,
        offered: Epoch,
    ) -> Result<(), String> {
        let told = |error: StorageError| crate::api::error::chain(&error);
        let class = self.class_of(disk).map_err(told)?;
        let (name, volume) = (&disk.class, &disk.volume);
        let found = class.find(volume).map_err(told)?.ok_or_else(|| {
            format!("class `{name}` has no volume `{volume}` here: is it the same storage?")
        })?;
        if found.size != size.0 {
            return Err(format!(
                "volume `{volume}` of class `{name}` has {} bytes here, and {} were offered",
                found.size, size.0
            ));
        }
        let fits = found.record.check_offered(from, pod, offered);
        fits.map_err(|why| format!("volume `{volume}` of class `{name}` is not {from}'s: {why}"))
    }

    /// The class that a disk says, if it is the same storage.
    ///
    /// # Errors
    /// It is not here, not reachable, or another.
    pub(crate) fn class_of(&self, disk: &SharedDisk) -> Result<&Class, StorageError> {
        let class = self.class(&disk.class)?;
        let here = class.id()?;
        match here == disk.class_id && class.driver() == disk.driver {
            true => Ok(class),
            false => Err(StorageError::OtherStorage {
                class: disk.class.clone(),
                here,
                there: disk.class_id.clone(),
            }),
        }
    }

    /// How QEMU reaches the disks that it reads and writes itself, by their index among the writable ones.
    ///
    /// # Errors
    /// This node does not have the class.
    pub fn rbd_images(&self, vm: &VmSpec) -> Result<Vec<(usize, RbdImage)>, StorageError> {
        let disks = vm.writable.iter().enumerate();
        let shared = disks.filter_map(|(at, disk)| Some((at, disk.shared.as_ref()?)));
        let images = shared.map(|(at, disk)| {
            let image = self.class(&disk.class)?.image(&disk.volume);
            Ok(image.map(|image| (at, image)))
        });
        images.filter_map(Result::transpose).collect()
    }

    /// Gives back what a pod of this node has, once its VM is gone: volumes are free then, and what ends with the pod is removed.
    /// Of what another node has by now, nothing. What fails is logged. Blocks.
    pub fn give_back_all(&self, vm: &VmSpec, epoch: Epoch) {
        let me = self.holder(&vm.name, epoch);
        self.for_each(
            vm,
            "not given back: `migrator volume release` does it",
            |class, disk| {
                let mine = class.change(&disk.volume, &mut |record| record.give_back(&me))?;
                match mine && disk.ephemeral {
                    true => class.remove(&disk.volume),
                    false => Ok(()),
                }
            },
        );
    }

    /// A pod has moved to another node: notes whose its volumes are, should that one not have come to it. What fails is logged. Blocks.
    pub fn hand_over_all(&self, vm: &VmSpec, to: &str, granted: Epoch) {
        let to = Holder {
            node: to.to_owned(),
            pod: vm.name.clone(),
            epoch: granted,
        };
        let me = self.holder(&vm.name, granted);
        self.for_each(vm, "the destination notes that it has it", |class, disk| {
            let noted = class.change(&disk.volume, &mut |record| record.hand_over(&me, &to));
            match noted {
                // It serves it already.
                Err(StorageError::Served { .. }) => Ok(()),
                noted => noted.map(drop),
            }
        });
    }

    fn for_each(
        &self,
        vm: &VmSpec,
        then: &str,
        mut call: impl FnMut(&Class, &SharedDisk) -> Result<(), StorageError>,
    ) {
        for disk in vm.writable.iter().filter_map(|disk| disk.shared.as_ref()) {
            let done = self.class_of(disk).and_then(|class| call(class, disk));
            match done {
                Ok(()) | Err(StorageError::NotFound { .. }) => {}
                Err(error) => tracing::error!(
                    pod = vm.name,
                    volume = disk.volume,
                    class = disk.class,
                    error = crate::api::error::chain(&error),
                    "a volume's holder is not noted: {then}"
                ),
            }
        }
    }
}

#[cfg(test)]
mod tests;
