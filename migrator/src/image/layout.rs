//! Blobs of the content as an OCI layout (image-spec 1.1, image-layout.md), for the import and for an archive.

use std::fs;
use std::io;
use std::path::Path;

use serde_json::json;

use super::content::Content;
use super::digest::Digest;
use super::holds::ImageHold;
use super::import::{self, ImportError};
use super::record::ImageRecord;
use super::store::ImageStore;

/// An image whose blobs are all in the content.
#[derive(Clone, Debug)]
pub(crate) struct Blobs {
    /// Its manifest.
    pub(crate) manifest: Digest,
    /// The manifest's size in bytes.
    pub(crate) manifest_size: u64,
    /// The manifest's type.
    pub(crate) media_type: String,
    /// Configuration and layers, each once.
    pub(crate) blobs: Vec<Digest>,
}

impl Blobs {
    /// The two files of a layout that are no blobs.
    pub(super) fn files(&self, name: &str) -> [(&'static str, Vec<u8>); 2] {
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [{
                "mediaType": self.media_type,
                "digest": self.manifest,
                "size": self.manifest_size,
                "annotations": {
                    "io.containerd.image.name": name,
                    "org.opencontainers.image.ref.name": name,
                },
            }],
        });
        let version = json!({ "imageLayoutVersion": "1.0.0" });
        [
            ("oci-layout", version.to_string().into_bytes()),
            ("index.json", index.to_string().into_bytes()),
        ]
    }

    /// The manifest and its blobs.
    pub(crate) fn all(&self) -> impl Iterator<Item = Digest> {
        std::iter::once(self.manifest).chain(self.blobs.iter().copied())
    }

    fn lay_out(&self, content: &Content, folder: &Path, name: &str) -> io::Result<()> {
        let blobs = folder.join("blobs/sha256");
        fs::create_dir_all(&blobs)?;
        for (file, bytes) in self.files(name) {
            fs::write(folder.join(file), bytes)?;
        }
        for digest in self.all() {
            // The same file under another name: the content may let go of its own meanwhile.
            fs::hard_link(content.path(digest), blobs.join(digest.hex()))?;
        }
        Ok(())
    }
}

impl ImageStore {
    /// Imports an image whose blobs are in the content, exactly as [`ImageStore::import`] does from a file.
    pub(crate) fn import_blobs(
        &self,
        image: &Blobs,
        name: &str,
    ) -> Result<(ImageRecord, ImageHold), ImportError> {
        let scratch = self.scratch()?;
        image
            .lay_out(self.content(), scratch.path(), name)
            .map_err(|source| ImportError::Io {
                what: "lay out the blobs of the image",
                source,
            })?;
        import::import(self, self.limits(), scratch.path(), Some(name))
    }
}
