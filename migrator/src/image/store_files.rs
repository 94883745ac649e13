//! The files of the store: how they are read and durably written, and what goes wrong.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::chunks::ChunkError;
use super::digest::Digest;
use super::name::BadName;
use super::record::{BadRecord, ImageRecord};

/// File name of a block device while it is made. Earlier versions kept it in this file.
pub(super) const EROFS: &str = "image.erofs";

/// What names of files and folders begin with that are gone after a restart.
pub(super) const TMP: &str = ".tmp-";

/// File name of the record.
pub(super) const RECORD: &str = "record.json";

/// File name of the order in which chunks were first read.
pub(super) const ORDER: &str = "order";

/// File that an image has while the pod that brought it may still turn back.
pub(super) const ARRIVING: &str = "arriving";

/// Folder of the chunks of all images.
pub(super) const CHUNKS: &str = "chunks";

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
        "chunk {index} of image {image} is not on this node's disk, or damaged there: `migrator image verify --repair` fetches it again"
    )]
    Damaged {
        /// The image.
        image: Digest,
        /// The chunk.
        index: u32,
    },
    /// Its chunks.
    #[error(transparent)]
    Chunk(#[from] ChunkError),
    /// The image says of a chunk that is here what is not true.
    #[error(
        "chunk {index} of the image has another length than the chunk of that digest that is here: its record is wrong"
    )]
    Misfit {
        /// The chunk.
        index: u32,
    },
    /// What is said of the image contradicts itself.
    #[error("the image's record is not valid")]
    Record(#[from] BadRecord),
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

/// Reads the record of an image.
pub(super) fn load_image(folder: &Path) -> io::Result<ImageRecord> {
    let record: ImageRecord = serde_json::from_slice(&fs::read(folder.join(RECORD))?)?;
    record.validate().map_err(io::Error::other)?;
    Ok(record)
}
