//! A volume of a shared class that a pod of this node uses, or is about to.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_runtime::spec::{SharedDisk, SharedDriver};
use vm_runtime::units::Epoch;

use super::holder::Take;
use super::lock::Held;
use super::{Storage, StorageError};

/// The volume, and what keeps others from it.
#[derive(Debug)]
pub struct SharedHandle {
    storage: Arc<Storage>,
    disk: SharedDisk,
    pod: String,
    held: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    lock: Option<Held>,
    /// The epoch in which it was taken last.
    epoch: Option<Epoch>,
    /// Clients of the source that had the image open when it was offered.
    before: Vec<String>,
}

impl SharedHandle {
    /// Takes nothing yet.
    pub fn new(storage: &Arc<Storage>, disk: &SharedDisk, pod: &str) -> Self {
        Self {
            storage: Arc::clone(storage),
            disk: disk.clone(),
            pod: pod.to_owned(),
            held: Mutex::default(),
        }
    }

    /// What it is.
    pub fn disk(&self) -> &SharedDisk {
        &self.disk
    }

    /// Who reads and writes it.
    pub fn driver(&self) -> SharedDriver {
        self.disk.driver
    }

    /// The file that the service serves; `None` if QEMU reads and writes it itself.
    ///
    /// # Errors
    /// This node does not have the class.
    pub fn file(&self) -> Result<Option<PathBuf>, StorageError> {
        Ok(self
            .storage
            .class(&self.disk.class)?
            .file(&self.disk.volume))
    }

    /// Takes it for the pod. Blocks.
    ///
    /// # Errors
    /// Another has it, it is another storage, or that fails.
    pub fn take(&self, epoch: Epoch, right: Take) -> Result<(), StorageError> {
        let class = self.storage.class_of(&self.disk)?;
        let me = self.storage.holder(&self.pod, epoch);
        let lock = class.take(&self.disk.volume, &me, right)?;
        let mut held = self.lock();
        held.lock = lock;
        held.epoch = Some(epoch);
        Ok(())
    }

    /// It was this pod's in that epoch, and may be another node's by now: nothing is taken, but by [`SharedHandle::take_back`].
    pub fn had(&self, epoch: Epoch) {
        self.lock().epoch = Some(epoch);
    }

    /// Lets another node take it. The guest stands still and what it wrote is durable; until that one has taken it, it is this node's.
    pub fn let_go(&self) {
        self.lock().lock = None;
    }

    /// Takes it back, if it was let go and nobody took it. Blocks.
    ///
    /// # Errors
    /// As [`SharedHandle::take`].
    pub fn take_back(&self) -> Result<(), StorageError> {
        let epoch = {
            let held = self.lock();
            match (held.lock.is_none(), self.driver(), held.epoch) {
                (true, SharedDriver::File, Some(epoch)) => epoch,
                _ => return Ok(()),
            }
        };
        self.take(epoch, Take::Owned)
    }

    /// Notes who has it open now, before this node's QEMU has: the source's. Blocks.
    ///
    /// # Errors
    /// The storage does not tell.
    pub fn note_source(&self) -> Result<(), StorageError> {
        let clients = self
            .storage
            .class_of(&self.disk)?
            .watchers(&self.disk.volume)?;
        self.lock().before = clients;
        Ok(())
    }

    /// The source is not heard of, and this node has the grant: whatever that one's QEMU may still send is written no more. Blocks.
    ///
    /// # Errors
    /// The storage refuses.
    pub fn fence_source(&self) -> Result<(), StorageError> {
        let before = self.lock().before.clone();
        if before.is_empty() {
            return Ok(());
        }
        tracing::warn!(
            volume = self.disk.volume,
            clients = ?before,
            "the source is not heard of: its clients are blocklisted"
        );
        self.storage.class(&self.disk.class)?.fence(&before)?;
        self.lock().before.clear();
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each field is whole by itself.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
