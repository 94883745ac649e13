//! From an image's layers to one block device.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::chunks::{ChunkError, Chunks, Pin};
use super::digest::Digest;
use super::holds::ImageHold;
use super::json::ProcessConfig;
use super::layer::{self, Budget, LayerError};
use super::mkfs::{self, MkfsError};
use super::name::{self, BadName};
use super::oci::{self, Chosen, OciError};
use super::passwd::{self, UserError};
use super::record::{BadRecord, CHUNK_SIZE, ImageConfig, ImageRecord, MAX_EROFS_SIZE};
use super::rootfs::{Rootfs, RootfsError};
use super::source::{Source, SourceError};
use super::store::{ImageStore, StoreError};
use super::store_files::EROFS;

/// Longest /etc/passwd and /etc/group that are read, in bytes.
const MAX_PASSWD: u64 = 1 << 20;

/// What one image may take while it is imported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImportLimits {
    /// Most bytes of files, all layers together. Default: 64 GiB.
    pub max_unpacked: u64,
    /// Most entries, all layers together. Default: two million.
    pub max_entries: u64,
}

impl Default for ImportLimits {
    fn default() -> Self {
        Self {
            max_unpacked: MAX_EROFS_SIZE,
            max_entries: 2_000_000,
        }
    }
}

/// Why an image is not imported. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The path or the archive.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The image's manifest or configuration.
    #[error(transparent)]
    Oci(#[from] OciError),
    /// A layer.
    #[error("layer {number} of {of} (`{file}`) is not applied")]
    Layer {
        /// Which one, from 1.
        number: usize,
        /// How many there are.
        of: usize,
        /// Its file in the image.
        file: String,
        /// Why.
        source: LayerError,
    },
    /// The disk is full.
    #[error(
        "the disk of {folder} is full: an import needs about twice the image's unpacked size for a while"
    )]
    DiskFull {
        /// The store's folder.
        folder: PathBuf,
        /// What failed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Finishing the tree.
    #[error(transparent)]
    Tree(#[from] RootfsError),
    /// The tree could not be read or made.
    #[error("cannot {what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The error.
        source: io::Error,
    },
    /// The image's user.
    #[error(transparent)]
    User(#[from] UserError),
    /// The block device.
    #[error(transparent)]
    Mkfs(#[from] MkfsError),
    /// The name.
    #[error(transparent)]
    Name(#[from] BadName),
    /// The result is out of bounds.
    #[error("the image cannot be used")]
    Record(#[from] BadRecord),
    /// The chunks.
    #[error(transparent)]
    Chunk(#[from] ChunkError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Imports the image at `path` into `store`.
pub(super) fn import(
    store: &ImageStore,
    limits: &ImportLimits,
    path: &Path,
    wanted: Option<&str>,
) -> Result<(ImageRecord, ImageHold), ImportError> {
    let scratch = store.scratch()?;
    build(store, limits, path, wanted, scratch)
        .inspect_err(|_| store.sweep_all())
        .map_err(|error| disk_full(store, error))
}

fn build(
    store: &ImageStore,
    limits: &ImportLimits,
    path: &Path,
    wanted: Option<&str>,
    scratch: tempfile::TempDir,
) -> Result<(ImageRecord, ImageHold), ImportError> {
    let source = Source::open(path, scratch.path(), limits.max_unpacked)?;
    let chosen = oci::choose(&source, wanted)?;
    let name = image_name(&chosen, wanted, path)?;
    if let Some(known) = store.by_manifest(&chosen.manifest) {
        return Ok(store.add_name(&known, &name)?);
    }
    let tree = scratch.path().join("rootfs");
    let io = |what| move |source| ImportError::Io { what, source };
    let mut rootfs = Rootfs::create(&tree).map_err(io("make a folder to unpack in"))?;
    apply_layers(&source, &chosen, limits, &mut rootfs)?;
    drop(source);
    let config = image_config(&chosen.config, &rootfs)?;
    let newest = rootfs.finish()?;
    let erofs = scratch.path().join(EROFS);
    mkfs::run(&tree, &erofs, newest)?;
    fs::remove_dir_all(&tree).map_err(io("remove the unpacked image"))?;
    let (erofs_size, chunks, _pin) = cut(store.chunks(), &erofs)?;
    fs::remove_file(&erofs).map_err(io("remove the image's file"))?;
    // From here on the image is complete whatever happens.
    store.chunks().sync()?;
    let record = ImageRecord {
        name,
        manifest_digest: chosen.manifest,
        config,
        erofs_size,
        chunk_size: CHUNK_SIZE,
        erofs_digest: ImageRecord::digest_of(erofs_size, CHUNK_SIZE, &chunks),
        chunks,
    };
    record.validate()?;
    Ok(store.commit(scratch, record, true)?)
}

fn apply_layers(
    source: &Source,
    chosen: &Chosen,
    limits: &ImportLimits,
    rootfs: &mut Rootfs,
) -> Result<(), ImportError> {
    let mut budget = Budget {
        entries: limits.max_entries,
        bytes: limits.max_unpacked,
    };
    let of = chosen.layers.len();
    for (index, layer) in chosen.layers.iter().enumerate() {
        oci::verify(source, layer)?;
        let blob = source.blob(&layer.file)?;
        layer::apply(blob, layer.diff_id, rootfs, &mut budget).map_err(|source| {
            ImportError::Layer {
                number: index + 1,
                of,
                file: layer.file.clone(),
                source,
            }
        })?;
    }
    Ok(())
}

/// The name asked for, else the image's own, else the file's.
fn image_name(chosen: &Chosen, wanted: Option<&str>, path: &Path) -> Result<String, BadName> {
    if let Some(wanted) = wanted {
        return name::normalize(wanted);
    }
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    let stem = name::from_file_stem(&file);
    match chosen.name.as_deref() {
        // A bare tag, as `skopeo copy ... oci:FOLDER:TAG` and umoci write it.
        Some(own) if !own.contains([':', '/']) => {
            name::normalize(&format!("{stem}:{own}")).or_else(|_| name::normalize(&stem))
        }
        Some(own) => name::normalize(own).or_else(|_| name::normalize(&stem)),
        None => name::normalize(&stem),
    }
}

fn image_config(config: &ProcessConfig, rootfs: &Rootfs) -> Result<ImageConfig, ImportError> {
    let read = |path: &str| -> Result<String, ImportError> {
        let bytes = rootfs
            .read_small(path, MAX_PASSWD)
            .map_err(|source| ImportError::Io {
                what: "look up the image's user",
                source,
            })?;
        Ok(String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned())
    };
    let user = config.user.clone().unwrap_or_default();
    let numbers = passwd::resolve(&user, &read("etc/passwd")?, &read("etc/group")?)?;
    let env = config.env.iter().flatten().map(|text| {
        let (name, value) = text.split_once('=').unwrap_or((text, ""));
        (name.to_owned(), value.to_owned())
    });
    let config = ImageConfig {
        entrypoint: config.entrypoint.clone().unwrap_or_default(),
        cmd: config.cmd.clone().unwrap_or_default(),
        env: env.filter(|(name, _)| !name.is_empty()).collect(),
        working_dir: config.working_dir.clone().unwrap_or_default(),
        user,
        uid: numbers.uid,
        gid: numbers.gid,
        groups: numbers.groups,
        stop_signal: config.stop_signal.clone().unwrap_or_default(),
    };
    config.validate()?;
    Ok(config)
}

/// Cuts the file into chunks and stores them: its size, the chunks, and what keeps them until the image is the store's.
pub(super) fn cut(store: &Chunks, path: &Path) -> Result<(u64, Vec<Digest>, Pin), ImportError> {
    let io = |source| ImportError::Io {
        what: "read the image's block device",
        source,
    };
    let mut file = File::open(path).map_err(io)?;
    let mut buffer = vec![0u8; CHUNK_SIZE as usize];
    let (mut size, mut chunks, mut pin) = (0, Vec::new(), store.pin(Vec::new()));
    loop {
        let mut filled = 0;
        while filled < buffer.len() {
            match file.read(&mut buffer[filled..]).map_err(io)? {
                0 => break,
                n => filled += n,
            }
        }
        if filled == 0 {
            return Ok((size, chunks, pin));
        }
        size += filled as u64;
        let chunk = &buffer[..filled];
        let digest = Digest::of(chunk);
        pin.add(digest);
        store.put(&digest, chunk)?;
        chunks.push(digest);
    }
}

/// Says that the disk is full, if that is what lies beneath.
fn disk_full(store: &ImageStore, error: ImportError) -> ImportError {
    let by_mkfs = matches!(&error, ImportError::Mkfs(error) if error.is_disk_full());
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(this) = cause {
        let by_kernel = this.downcast_ref::<io::Error>().is_some_and(|error| {
            let kinds = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded];
            kinds.contains(&error.kind())
        });
        if by_mkfs || by_kernel {
            return ImportError::DiskFull {
                folder: store.root().to_owned(),
                source: Box::new(error),
            };
        }
        cause = this.source();
    }
    error
}
