//! One class: the same few calls, whichever its driver.

use std::path::Path;

use vm_runtime::command_line::RbdImage;
use vm_runtime::spec::SharedDriver;
use vm_runtime::units::Bytes;

use super::file::FileClass;
use super::holder::{Holder, Record, Take};
use super::lock;
use super::rbd::RbdClass;
use super::{SharedVolume, StorageError};
use crate::config::StorageClass;

/// A storage class of this node.
#[derive(Debug)]
pub enum Class {
    /// A folder that is mounted.
    File(FileClass),
    /// A Ceph pool.
    Rbd(RbdClass),
}

/// Does the same with either.
macro_rules! each {
    ($class:expr, $it:ident => $call:expr) => {
        match $class {
            Class::File($it) => $call,
            Class::Rbd($it) => $call,
        }
    };
}

impl Class {
    pub(super) fn open(
        name: &str,
        config: &StorageClass,
        dir: &Path,
    ) -> Result<Self, StorageError> {
        match config {
            StorageClass::File { path } => Ok(Self::File(FileClass::new(name, path))),
            StorageClass::Rbd {
                pool,
                monitors,
                user,
                key_file,
            } => RbdClass::open(name, pool, monitors, (user, key_file), dir).map(Self::Rbd),
        }
    }

    /// Who reads and writes its volumes.
    pub fn driver(&self) -> SharedDriver {
        match self {
            Self::File(_) => SharedDriver::File,
            Self::Rbd(_) => SharedDriver::Rbd,
        }
    }

    /// What the storage says that it is.
    ///
    /// # Errors
    /// It is not mounted, not prepared, or does not answer.
    pub fn id(&self) -> Result<String, StorageError> {
        each!(self, class => class.id())
    }

    /// Prepares new storage, once for all nodes. Returns what it is from now on.
    ///
    /// # Errors
    /// It is prepared already, or cannot be written to.
    pub fn init(&self) -> Result<String, StorageError> {
        each!(self, class => class.init())
    }

    /// Makes a volume with an empty file system.
    ///
    /// # Errors
    /// It is there already, or there is no room.
    pub fn create(
        &self,
        volume: &str,
        size: Bytes,
        ephemeral: bool,
    ) -> Result<SharedVolume, StorageError> {
        each!(self, class => class.create(volume, size.0.next_multiple_of(1 << 20), ephemeral))
    }

    /// The volume of that name.
    ///
    /// # Errors
    /// The storage cannot be asked.
    pub fn find(&self, volume: &str) -> Result<Option<SharedVolume>, StorageError> {
        each!(self, class => class.find(volume))
    }

    /// All of them, by name.
    ///
    /// # Errors
    /// The storage cannot be asked.
    pub fn list(&self) -> Result<Vec<SharedVolume>, StorageError> {
        each!(self, class => class.list())
    }

    /// Removes a volume and all that is in it.
    ///
    /// # Errors
    /// There is none, or somebody has it.
    pub fn remove(&self, volume: &str) -> Result<(), StorageError> {
        each!(self, class => class.remove(volume))
    }

    /// Changes a record with nobody else doing so; it is written if `change` says so, which is returned.
    ///
    /// # Errors
    /// Somebody serves the volume, or the storage fails.
    pub fn change(
        &self,
        volume: &str,
        change: &mut dyn FnMut(&mut Record) -> bool,
    ) -> Result<bool, StorageError> {
        each!(self, class => class.change(volume, change))
    }

    /// Takes a volume. What comes back is to be kept for as long as it is used, and dropped before it goes to another node.
    ///
    /// # Errors
    /// Another has it, or the storage fails.
    pub fn take(
        &self,
        volume: &str,
        me: &Holder,
        right: Take,
    ) -> Result<Option<lock::Held>, StorageError> {
        match self {
            Self::File(class) => class.take(volume, me, right).map(Some),
            Self::Rbd(class) => class.take(volume, me, right).map(|()| None),
        }
    }

    /// Gives a volume free that a pod has which does not run any more.
    ///
    /// # Errors
    /// The pod is another node's and `force` is not given, or somebody serves the volume.
    pub fn release(
        &self,
        volume: &str,
        node: &str,
        force: bool,
    ) -> Result<Option<Holder>, StorageError> {
        let mut refused = None;
        let mut freed = None;
        self.change(volume, &mut |record| match &record.holder {
            Some(holder) if holder.node != node && !force => {
                refused = Some(holder.clone());
                false
            }
            Some(_) => {
                freed = record.release_by_force();
                true
            }
            None => false,
        })?;
        match refused {
            Some(holder) => Err(StorageError::NeedsForce {
                volume: volume.to_owned(),
                holder,
            }),
            None => Ok(freed),
        }
    }

    /// The file that the service serves.
    pub(super) fn file(&self, volume: &str) -> Option<std::path::PathBuf> {
        match self {
            Self::File(class) => Some(class.file(volume)),
            Self::Rbd(_) => None,
        }
    }

    /// How QEMU reaches a volume that it reads and writes itself.
    pub(super) fn image(&self, volume: &str) -> Option<RbdImage> {
        match self {
            Self::File(_) => None,
            Self::Rbd(class) => Some(class.image(volume)),
        }
    }

    /// Who has the image open now, as Ceph addresses them; nobody where that is not known.
    ///
    /// # Errors
    /// The storage cannot be asked.
    pub fn watchers(&self, volume: &str) -> Result<Vec<String>, StorageError> {
        match self {
            Self::File(_) => Ok(Vec::new()),
            Self::Rbd(class) => class.watchers(volume),
        }
    }

    /// Nothing that these clients still send is written any more.
    ///
    /// # Errors
    /// The cluster refuses, or does not answer.
    pub fn fence(&self, clients: &[String]) -> Result<(), StorageError> {
        match self {
            Self::File(_) => Ok(()),
            Self::Rbd(class) => class.fence(clients),
        }
    }
}
