//! `save`: an image with its layers as one OCI archive, which every other tool reads.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::digest::{Digest, HashingReader};
use super::kept::KeptError;
use super::layout::Blobs;
use super::manifest;
use super::oci::MAX_JSON;
use super::source::{Source, SourceError};
use super::store::ImageStore;

/// Why an image is not saved. No file is left behind.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The image, or its layers.
    #[error(transparent)]
    Kept(#[from] KeptError),
    /// The file is there.
    #[error("{} is there already: remove it, or name another file", .0.display())]
    Exists(PathBuf),
    /// The file cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A blob of the store is not what it was.
    #[error("blob {expected} is damaged on this node's disk: pull or import the image again")]
    Damaged {
        /// As it must be.
        expected: Digest,
    },
}

/// Why the layers of an image that was imported are not kept.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// A format without a manifest.
    #[error(
        "a docker archive has no manifest to push: keep the layers of an OCI layout or archive instead"
    )]
    NoManifest,
    /// The file.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The manifest.
    #[error(transparent)]
    Manifest(#[from] manifest::ManifestError),
    /// The content.
    #[error(transparent)]
    Content(#[from] super::content::ContentError),
    /// The store.
    #[error(transparent)]
    Store(#[from] super::store::StoreError),
}

impl ImageStore {
    /// Writes an image whose layers are kept to a new file in the form of an OCI archive. Its size in bytes.
    pub fn save(&self, reference: &str, path: &Path) -> Result<u64, SaveError> {
        let image = self.kept(reference)?;
        let _hold = self.content().hold(image.all());
        let name = self.resolve(reference).map_err(KeptError::from)?.name;
        let write = |source| SaveError::Write {
            path: path.to_owned(),
            source,
        };
        if fs::symlink_metadata(path).is_ok() {
            return Err(SaveError::Exists(path.to_owned()));
        }
        let folder = path.parent().unwrap_or(Path::new("/"));
        let file = tempfile::Builder::new()
            .prefix(".migrator-save-")
            .permissions(fs::Permissions::from_mode(0o644))
            .tempfile_in(folder)
            .map_err(write)?;
        self.archive(&image, &name, file.as_file())
            .map_err(|error| {
                match error
                    .get_ref()
                    .and_then(|inner| inner.downcast_ref::<Damaged>())
                {
                    Some(&Damaged(expected)) => SaveError::Damaged { expected },
                    None => write(error),
                }
            })?;
        file.as_file().sync_all().map_err(write)?;
        let size = file.as_file().metadata().map_err(write)?.len();
        file.persist_noclobber(path)
            .map_err(|error| match error.error {
                error if error.kind() == io::ErrorKind::AlreadyExists => {
                    SaveError::Exists(path.to_owned())
                }
                error => write(error),
            })?;
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(write)?;
        Ok(size)
    }

    fn archive(&self, image: &Blobs, name: &str, file: &File) -> io::Result<()> {
        let mut archive = tar::Builder::new(io::BufWriter::with_capacity(1 << 20, file));
        for (path, bytes) in image.files(name) {
            archive.append_data(&mut header(bytes.len() as u64), path, &*bytes)?;
        }
        for digest in image.all() {
            let blob = File::open(self.content().path(digest))?;
            let size = blob.metadata()?.len();
            let mut blob = HashingReader::new(blob.take(size));
            let path = format!("blobs/sha256/{}", digest.hex());
            archive.append_data(&mut header(size), path, &mut blob)?;
            if blob.finish().0 != digest {
                return Err(io::Error::other(Damaged(digest)));
            }
        }
        archive.into_inner()?.flush()
    }

    /// Keeps the layers of an image that was imported from `path` as the manifest `digest`.
    pub fn keep(&self, path: &Path, digest: Digest) -> Result<(), KeepError> {
        let scratch = self.scratch()?;
        let source = Source::open(path, scratch.path(), self.limits().max_unpacked)?;
        let name = |digest: Digest| format!("blobs/sha256/{}", digest.hex());
        if !source.has(&name(digest)) {
            return Err(KeepError::NoManifest);
        }
        let bytes = source.small(&name(digest), MAX_JSON)?;
        let image = manifest::image(&bytes, &manifest::own_type(&bytes)?)?;
        let blobs = image.blobs();
        let all = blobs.iter().map(|blob| blob.digest).chain([digest]);
        let _hold = self.content().hold(all);
        for blob in blobs {
            let from = source.blob(&name(blob.digest))?;
            self.content().put(blob.digest, blob.size, from)?;
        }
        let size = bytes.len() as u64;
        Ok(self.content().put(digest, size, &bytes[..])?)
    }
}

#[derive(Debug, thiserror::Error)]
#[error("blob {0} is damaged")]
struct Damaged(Digest);

fn header(size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_size(size);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}
