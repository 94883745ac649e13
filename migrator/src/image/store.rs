//! The images of a node.
//!
//! ```text
//! images/lock                  held by the service: one store at a time
//! images/names.json            name -> id
//! images/leases.json           id -> until when it is kept, milliseconds of Unix time
//! images/<id>/record.json      its ImageRecord
//! images/<id>/order            in which order its chunks were first read
//! images/<id>/arriving         the pod that brought it has not come yet; nobody else has asked for it
//! images/chunks/               the chunks of all images, see `chunks`
//! images/content/              blobs of registries, see `content`
//! images/.tmp-*                work under way; removed at the next start
//! ```
//!
//! A folder appears under its final name only when all of it is on the disk, and disappears from it before
//! anything in it is removed.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::{self, File};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use tempfile::TempDir;

use super::chunks::{Chunks, UseOrder};
use super::content::Content;
use super::digest::Digest;
use super::gc::Leases;
use super::holds::{Holds, ImageHold};
use super::import::{self, ImportError, ImportLimits};
use super::name;
use super::record::ImageRecord;
use super::store_files::{CHUNKS, RECORD, TMP, io_error, sync_folder, write_json, write_synced};

pub use super::store_files::StoreError;

pub(super) const NAMES: &str = "names.json";
pub(super) const LEASES: &str = "leases.json";
const LOCK: &str = "lock";

/// The images of a node. Shared by reference or [`Arc`]; every call may block on the disk.
#[derive(Debug)]
pub struct ImageStore {
    root: PathBuf,
    limits: ImportLimits,
    content: Arc<Content>,
    pub(super) chunks: Arc<Chunks>,
    /// By the image's bytes.
    pub(super) orders: Mutex<BTreeMap<Digest, Arc<UseOrder>>>,
    state: Mutex<State>,
    holds: Arc<Holds>,
    _lock: Flock<File>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) images: BTreeMap<Digest, Arc<ImageRecord>>,
    pub(super) names: BTreeMap<String, Digest>,
    pub(super) leases: Leases,
}

impl ImageStore {
    /// Opens the store in folder `root` (made if missing, mode 0700), and removes what a crash left.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        Self::open_with(root, ImportLimits::default())
    }

    /// Opens the store with limits of one's own.
    pub fn open_with(root: &Path, limits: ImportLimits) -> Result<Self, StoreError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(root)
            .map_err(io_error("make", root))?;
        // It holds setuid programs and devices of images while they are unpacked.
        fs::set_permissions(root, fs::Permissions::from_mode(0o700))
            .map_err(io_error("set the mode of", root))?;
        let path = root.join(LOCK);
        let file = File::options().create(true).append(true).open(&path);
        let file = file.map_err(io_error("open", &path))?;
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, Errno::EWOULDBLOCK)) => {
                return Err(StoreError::Locked {
                    path: root.to_owned(),
                });
            }
            Err((_, errno)) => return Err(io_error("lock", &path)(errno.into())),
        };
        let store = Self {
            root: root.to_owned(),
            limits,
            content: Arc::new(Content::open(root)?),
            chunks: Arc::new(Chunks::open(root.join(CHUNKS))?),
            orders: Mutex::default(),
            state: Mutex::default(),
            holds: Arc::default(),
            _lock: lock,
        };
        store.load()?;
        Ok(store)
    }

    /// Imports an OCI layout (folder, or archive in tar format, also gzip or zstd) or a `docker save` archive.
    ///
    /// The image goes by `name`, else by the name that it carries, else by the file's. An image that is here already
    /// gets the name. When it fails, nothing is left behind.
    pub fn import(&self, path: &Path, name: Option<&str>) -> Result<ImageRecord, ImportError> {
        import::import(self, &self.limits, path, name).map(|(record, _)| record)
    }

    /// Keeps images (by [`ImageRecord::erofs_digest`]) from [`ImageStore::collect`] and [`ImageStore::remove`] until the
    /// guard is dropped, also such as are not here yet.
    pub fn hold(&self, digests: impl IntoIterator<Item = Digest>) -> ImageHold {
        self.holds.hold(digests.into_iter().collect())
    }

    /// All images with a name, by name; then those without one.
    pub fn list(&self) -> Vec<ImageRecord> {
        let state = self.state();
        let named = state.names.iter().filter_map(|(name, id)| {
            let record = state.images.get(id)?;
            Some(ImageRecord {
                name: name.clone(),
                ..ImageRecord::clone(record)
            })
        });
        let nameless = state
            .images
            .iter()
            .filter(|(id, _)| !state.names.values().any(|named| named == *id))
            .map(|(_, record)| ImageRecord::clone(record));
        named.chain(nameless).collect()
    }

    /// Finds an image by name, by the digest of its bytes ([`ImageRecord::erofs_digest`]), or by its manifest's
    /// digest if only one image here was made from that.
    pub fn resolve(&self, reference: &str) -> Result<ImageRecord, StoreError> {
        let (_, record) = self.find(&self.state(), reference)?;
        Ok(ImageRecord::clone(&record))
    }

    /// Removes the name `reference`, and the image with it if that was its last name; or, given a digest, the
    /// image with all its names. Images whose bytes (by [`ImageRecord::erofs_digest`]) are `in_use` stay.
    pub fn remove(&self, reference: &str, in_use: &[Digest]) -> Result<(), StoreError> {
        let mut state = self.state();
        let (id, record) = self.find(&state, reference)?;
        let mut names = state.names.clone();
        if reference.parse::<Digest>().is_ok() {
            names.retain(|_, named| *named != id);
        } else {
            names.remove(&name::normalize(reference)?);
        }
        if names.values().any(|named| *named == id) {
            self.write_names(&names)?;
            state.names = names;
            return Ok(());
        }
        if in_use.contains(&record.erofs_digest) || self.holds.has(&record.erofs_digest) {
            return Err(StoreError::InUse(reference.to_owned()));
        }
        self.write_names(&names)?;
        state.names = names;
        let doomed = self.scratch()?;
        let folder = self.folder(id);
        fs::rename(&folder, doomed.path().join("image")).map_err(io_error("remove", &folder))?;
        self.sync_root()?;
        self.drop_images(&mut state, &[id]);
        Ok(())
        // The files go when `doomed` is dropped.
    }

    /// Blobs of registries.
    pub(crate) fn content(&self) -> &Arc<Content> {
        &self.content
    }

    /// What one image may take.
    pub(crate) fn limits(&self) -> &ImportLimits {
        &self.limits
    }

    pub(super) fn holds(&self) -> &Holds {
        &self.holds
    }

    /// The store's folder.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Whether exactly this image is here.
    pub(super) fn has(&self, record: &ImageRecord) -> bool {
        self.state().images.contains_key(&record.id())
    }

    /// An image made from this manifest, if there is one.
    pub(crate) fn by_manifest(&self, manifest: &Digest) -> Option<Arc<ImageRecord>> {
        let state = self.state();
        state
            .images
            .values()
            .find(|record| record.manifest_digest == *manifest)
            .cloned()
    }

    /// An empty folder on the same file system, removed when dropped and at the next start.
    pub(crate) fn scratch(&self) -> Result<TempDir, StoreError> {
        tempfile::Builder::new()
            .prefix(TMP)
            .tempdir_in(&self.root)
            .map_err(io_error("make a folder in", &self.root))
    }

    /// Takes over an image, its folder being made from `scratch`, and gives it its name: always if `take_name`,
    /// else only if nothing else has it.
    pub(super) fn commit(
        &self,
        scratch: TempDir,
        record: ImageRecord,
        take_name: bool,
    ) -> Result<(ImageRecord, ImageHold), StoreError> {
        let path = scratch.path().join(RECORD);
        let bytes = serde_json::to_vec(&record).map_err(|e| io_error("write", &path)(e.into()))?;
        write_synced(&path, &bytes)?;
        sync_folder(scratch.path())?;
        let id = record.id();
        let mut state = self.state();
        if let Entry::Vacant(place) = state.images.entry(id) {
            let folder = self.folder(id);
            fs::rename(scratch.path(), &folder).map_err(io_error("make", &folder))?;
            // It is gone from its old name: nothing to remove.
            let _ = scratch.keep();
            self.sync_root()?;
            place.insert(Arc::new(record.clone()));
        }
        self.name(&mut state, &record.name, id, take_name)?;
        let hold = self.hold([record.erofs_digest]);
        Ok((record, hold))
    }

    /// Gives an image that is here the name `name`.
    pub(crate) fn add_name(
        &self,
        record: &ImageRecord,
        name: &str,
    ) -> Result<(ImageRecord, ImageHold), StoreError> {
        let hold = self.hold([record.erofs_digest]);
        let mut state = self.state();
        if !state.images.contains_key(&record.id()) {
            // It was removed meanwhile.
            return Err(StoreError::NotFound(name.to_owned()));
        }
        self.name(&mut state, name, record.id(), true)?;
        let record = ImageRecord {
            name: name.to_owned(),
            ..record.clone()
        };
        Ok((record, hold))
    }

    fn name(
        &self,
        state: &mut State,
        name: &str,
        id: Digest,
        take: bool,
    ) -> Result<(), StoreError> {
        if take {
            self.unmark(id);
        }
        let free = !state.names.contains_key(name);
        if free || (take && state.names.get(name) != Some(&id)) {
            let mut names = state.names.clone();
            names.insert(name.to_owned(), id);
            self.write_names(&names)?;
            state.names = names;
        }
        Ok(())
    }

    pub(super) fn find(
        &self,
        state: &State,
        reference: &str,
    ) -> Result<(Digest, Arc<ImageRecord>), StoreError> {
        let missing = || StoreError::NotFound(reference.to_owned());
        let Ok(digest) = reference.parse::<Digest>() else {
            let name = name::normalize(reference)?;
            let id = state.names.get(&name).ok_or_else(missing)?;
            let record = state.images.get(id).ok_or_else(missing)?;
            let record = ImageRecord {
                name,
                ..ImageRecord::clone(record)
            };
            return Ok((*id, Arc::new(record)));
        };
        let mut found = state.images.iter().filter(|(id, record)| {
            **id == digest || record.erofs_digest == digest || record.manifest_digest == digest
        });
        let (id, record) = found.next().ok_or_else(missing)?;
        if found.next().is_some() {
            return Err(StoreError::Ambiguous(reference.to_owned()));
        }
        Ok((*id, record.clone()))
    }

    pub(super) fn by_bytes(
        &self,
        digest: &Digest,
    ) -> Result<(Digest, Arc<ImageRecord>), StoreError> {
        let state = self.state();
        let mut images = state.images.iter();
        images
            .find(|(_, record)| record.erofs_digest == *digest)
            .map(|(id, record)| (*id, record.clone()))
            .ok_or_else(|| StoreError::NotFound(digest.to_string()))
    }

    /// The folder of an image, by [`ImageRecord::id`]; what is in it goes with the image.
    pub(crate) fn folder(&self, id: Digest) -> PathBuf {
        self.root.join(id.hex())
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // Each change of the state is one assignment after the disk has it: a panic leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn sync_root(&self) -> Result<(), StoreError> {
        sync_folder(&self.root)
    }

    pub(super) fn write_names(&self, names: &BTreeMap<String, Digest>) -> Result<(), StoreError> {
        write_json(&self.root, NAMES, names)
    }

    pub(super) fn write_leases(&self, leases: &Leases) -> Result<(), StoreError> {
        write_json(&self.root, LEASES, leases)
    }
}
