//! The files of the store: how they are read and durably written, and what goes wrong.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::digest::Digest;
use super::name::BadName;
use super::record::ImageRecord;

/// File name of the block device.
pub(super) const EROFS: &str = "image.erofs";

/// What names of files and folders begin with that are gone after a restart.
pub(super) const TMP: &str = ".tmp-";

/// File name of the record.
pub(super) const RECORD: &str = "record.json";

/// Why the store cannot do something.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system.
    #[error("cannot {what} {path}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// Another service has it.
    #[error(
        "{path} is in use by another service: stop that one, or give this one a state_dir of its own"
    )]
    Locked {
        /// The store's folder.
        path: PathBuf,
    },
    /// No such image.
    #[error(
        "there is no image `{0}` here: see `migrator image ls`, or add it with `migrator image pull` or `image import`"
    )]
    NotFound(String),
    /// A digest that several images have.
    #[error("`{0}` stands for several images: use a name of `migrator image ls`")]
    Ambiguous(String),
    /// A name that is none.
    #[error(transparent)]
    Name(#[from] BadName),
    /// A running pod needs it.
    #[error("image `{0}` is in use by a pod: stop the pod first")]
    InUse(String),
    /// No such chunk.
    #[error("image {image} has no chunk {index}")]
    NoChunk {
        /// The image.
        image: Digest,
        /// The chunk asked for.
        index: u32,
    },
    /// The disk's bytes are not those that were stored.
    #[error(
        "chunk {index} of image {image} is damaged on this node's disk: remove the image and import it again"
    )]
    Damaged {
        /// The image.
        image: Digest,
        /// The chunk.
        index: u32,
    },
}

pub(super) fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io { what, path, source }
}

pub(super) fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    File::create(path)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .map_err(io_error("write", path))
}

pub(super) fn sync_folder(path: &Path) -> Result<(), StoreError> {
    File::open(path)
        .and_then(|folder| folder.sync_all())
        .map_err(io_error("write", path))
}

/// Replaces the file `name` of the store in `root`: after a crash it is the old or the new one.
pub(super) fn write_json(
    root: &Path,
    name: &str,
    value: &impl Serialize,
) -> Result<(), StoreError> {
    let (path, next) = (root.join(name), root.join(format!("{TMP}{name}")));
    let bytes = serde_json::to_vec_pretty(value).map_err(|e| io_error("write", &path)(e.into()))?;
    write_synced(&next, &bytes)?;
    fs::rename(&next, &path).map_err(io_error("write", &path))?;
    sync_folder(root)
}

/// Reads a file of the store; one that is not there is empty.
pub(super) fn read_json<T: DeserializeOwned + Default>(path: &Path) -> Result<T, StoreError> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| io_error("read", path)(e.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(T::default()),
        Err(error) => Err(io_error("read", path)(error)),
    }
}

/// Reads the record of an image and checks that its file is there in full length.
pub(super) fn load_image(folder: &Path) -> io::Result<ImageRecord> {
    let record: ImageRecord = serde_json::from_slice(&fs::read(folder.join(RECORD))?)?;
    record.validate().map_err(io::Error::other)?;
    let size = fs::metadata(folder.join(EROFS))?.len();
    if size != record.erofs_size {
        return Err(io::Error::other(format!(
            "{EROFS} has {size} bytes, not {}",
            record.erofs_size
        )));
    }
    Ok(record)
}
