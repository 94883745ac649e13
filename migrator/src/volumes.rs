//! Named volumes: disks that outlive the pods that use them, as `STATE_DIR/volumes/NAME.img`.
//!
//! Which pod uses one is known by the register of pods alone: one pod at most.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use vm_runtime::pod::PodSpec;
use vm_runtime::spec::VmSpec;
use vm_runtime::units::Bytes;

use crate::block::mkfs::{MkfsError, mkfs};
use crate::block::{Disk, DiskError};
use crate::pods::disks::local_claims;
use crate::storage::StorageError;

/// Longest name: an RFC 1123 label, as the names of pods.
const MAX_NAME: usize = 63;
/// The smallest volume, as in a pod's specification.
const MIN_SIZE: Bytes = Bytes::mib(32);
const SUFFIX: &str = ".img";

/// Why something about a volume fails.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The name is none.
    #[error(
        "`{0}` is not a volume's name: use up to 63 of a-z, 0-9 and `-`, beginning and ending with a letter or digit"
    )]
    Name(String),
    /// The size is too small.
    #[error("a volume of {0}: give it {MIN_SIZE} at least")]
    Small(Bytes),
    /// There is none.
    #[error("there is no volume `{0}` on this node")]
    NotFound(String),
    /// There is one already.
    #[error("there is a volume `{0}` on this node already")]
    Taken(String),
    /// A pod has it.
    #[error("volume `{volume}` is used by pod `{pod}`")]
    Used {
        /// The volume.
        volume: String,
        /// The pod.
        pod: String,
    },
    /// Its disk cannot be made.
    #[error("volume `{volume}` cannot be made")]
    Disk {
        /// The volume.
        volume: String,
        /// Why not.
        source: DiskError,
    },
    /// Its file system cannot be made.
    #[error("volume `{volume}` cannot be made")]
    Mkfs {
        /// The volume.
        volume: String,
        /// Why not.
        source: MkfsError,
    },
    /// It is of a shared class.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The folder cannot be used.
    #[error("cannot {verb} {}", path.display())]
    Folder {
        /// What was tried.
        verb: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// What it takes on the node, in bytes.
    pub allocated: u64,
}

/// The volumes of a node. Calls block.
#[derive(Clone, Debug)]
pub struct Volumes {
    dir: PathBuf,
}

impl Volumes {
    /// Those in this folder, which need not be there.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// The file of a volume, there or not.
    ///
    /// # Errors
    /// [`VolumeError::Name`].
    pub fn path(&self, name: &str) -> Result<PathBuf, VolumeError> {
        let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
        let fine = (1..=MAX_NAME).contains(&name.len())
            && name.bytes().all(inner)
            && !name.starts_with('-')
            && !name.ends_with('-');
        match fine {
            true => Ok(self.dir.join(format!("{name}{SUFFIX}"))),
            false => Err(VolumeError::Name(name.chars().take(MAX_NAME).collect())),
        }
    }

    /// Whether name and size are those of a volume.
    ///
    /// # Errors
    /// [`VolumeError::Name`], [`VolumeError::Small`].
    pub fn check(&self, name: &str, size: Bytes) -> Result<(), VolumeError> {
        self.path(name)?;
        match size < MIN_SIZE {
            true => Err(VolumeError::Small(size)),
            false => Ok(()),
        }
    }

    /// Makes a volume with an empty file system; the size becomes whole MiB. It is there after a power cut, or not at all.
    ///
    /// # Errors
    /// Name or size are none, it is there already, or there is no room.
    pub fn create(&self, name: &str, size: Bytes) -> Result<Volume, VolumeError> {
        self.check(name, size)?;
        let path = self.path(name)?;
        self.make_dir()?;
        if path.exists() {
            return Err(VolumeError::Taken(name.to_owned()));
        }
        let temporary = tempfile::Builder::new()
            .prefix(".new-")
            .tempdir_in(&self.dir)
            .map_err(folder("make a folder in", &self.dir))?;
        let half = temporary.path().join("disk");
        let disk = |source| VolumeError::Disk {
            volume: name.to_owned(),
            source,
        };
        let made = Disk::create(&half, size.0.next_multiple_of(1 << 20)).map_err(disk)?;
        mkfs(&half).map_err(|source| VolumeError::Mkfs {
            volume: name.to_owned(),
            source,
        })?;
        made.flush().map_err(disk)?;
        // Unlike a rename, a link replaces nothing: of two that make the same volume, one does.
        match fs::hard_link(&half, &path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(VolumeError::Taken(name.to_owned()));
            }
            linked => linked.map_err(folder("make", &path))?,
        }
        self.sync()?;
        self.find(name)
    }

    /// The volume of that name.
    ///
    /// # Errors
    /// There is none, or its file is no disk.
    pub fn find(&self, name: &str) -> Result<Volume, VolumeError> {
        use std::os::unix::fs::MetadataExt;
        let path = self.path(name)?;
        match fs::metadata(&path) {
            Ok(file) => Ok(Volume {
                name: name.to_owned(),
                size: file.len(),
                // st_blocks counts 512 bytes, whatever the file system's block is (stat(2)).
                allocated: file.blocks() * 512,
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(VolumeError::NotFound(name.to_owned()))
            }
            Err(source) => Err(folder("look at", &path)(source)),
        }
    }

    /// All of them, by name.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn list(&self) -> Result<Vec<Volume>, VolumeError> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(folder("list", &self.dir)(source)),
        };
        let mut found = Vec::new();
        for entry in entries.flatten() {
            let file = entry.file_name();
            let name = file.to_str().and_then(|name| name.strip_suffix(SUFFIX));
            // What has been removed since, or was never a volume, is none.
            if let Some(Ok(volume)) = name.map(|name| self.find(name)) {
                found.push(volume);
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// Removes a volume and all that is in it. Nobody may use it.
    ///
    /// # Errors
    /// There is none.
    pub fn remove(&self, name: &str) -> Result<(), VolumeError> {
        let path = self.path(name)?;
        match fs::remove_file(&path) {
            Ok(()) => self.sync(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(VolumeError::NotFound(name.to_owned()))
            }
            Err(source) => Err(folder("remove", &path)(source)),
        }
    }

    /// Takes a file of this file system as the volume of that name. It is there after a power cut, in the one place or the other.
    ///
    /// # Errors
    /// There is one already.
    pub(crate) fn take_in(&self, name: &str, file: &Path) -> Result<(), VolumeError> {
        let path = self.path(name)?;
        self.make_dir()?;
        if path.exists() {
            return Err(VolumeError::Taken(name.to_owned()));
        }
        fs::rename(file, &path).map_err(folder("make", &path))?;
        self.sync()
    }

    fn make_dir(&self) -> Result<(), VolumeError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
            .map_err(folder("make", &self.dir))
    }

    fn sync(&self) -> Result<(), VolumeError> {
        File::open(&self.dir)
            .and_then(|dir| dir.sync_all())
            .map_err(folder("write to", &self.dir))
    }
}

/// Removes the volumes of a pod that runs elsewhere and has them there. What cannot be removed is logged. Blocks for a moment.
pub(crate) fn remove_moved(volumes: &Volumes, pod: &PodSpec, vm: &VmSpec) {
    for claim in local_claims(pod, vm) {
        match volumes.remove(claim) {
            Ok(()) | Err(VolumeError::NotFound(_)) => {}
            Err(error) => {
                let error = crate::api::error::chain(&error);
                tracing::error!(
                    pod = pod.name,
                    volume = claim,
                    error,
                    "a volume that moved is left behind"
                );
            }
        }
    }
}

fn folder(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> VolumeError {
    move |source| VolumeError::Folder {
        verb,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_is_made_once_listed_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let volumes = Volumes::new(dir.path().join("volumes"));
        assert_eq!(volumes.list().unwrap(), []);
        let made = volumes.create("data", Bytes(Bytes::mib(64).0 - 1)).unwrap();
        assert_eq!(made.size, Bytes::mib(64).0);
        assert!(made.allocated < made.size / 2, "{made:?}");
        assert_eq!(volumes.list().unwrap(), [made]);
        let again = volumes.create("data", Bytes::mib(64)).unwrap_err();
        assert!(matches!(again, VolumeError::Taken(_)), "{again}");
        volumes.remove("data").unwrap();
        let gone = volumes.remove("data").unwrap_err();
        assert!(matches!(gone, VolumeError::NotFound(_)), "{gone}");
        assert_eq!(fs::read_dir(dir.path().join("volumes")).unwrap().count(), 0);
    }

    #[test]
    fn names_that_lead_elsewhere_and_sizes_too_small_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let volumes = Volumes::new(dir.path().to_owned());
        for name in ["", "../x", "A", "-a", "a-", "a.b", &"a".repeat(64)] {
            let refused = volumes.create(name, Bytes::mib(64)).unwrap_err();
            assert!(matches!(refused, VolumeError::Name(_)), "{name}: {refused}");
        }
        let small = volumes.create("a", Bytes::mib(1)).unwrap_err();
        assert!(matches!(small, VolumeError::Small(_)), "{small}");
    }
}
