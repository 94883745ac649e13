//! Where an image came from, kept beside it: a file that only whoever wrote it reads, and that goes with the image.

use std::fs;
use std::io;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::digest::Digest;
use super::record::ImageRecord;
use super::store::ImageStore;
use super::store_files::{StoreError, write_json};

/// Its name in the image's folder.
const ORIGIN: &str = "registry.json";

impl ImageStore {
    /// Writes where an image of the store came from.
    pub(crate) fn set_origin(
        &self,
        image: &ImageRecord,
        origin: &impl Serialize,
    ) -> Result<(), StoreError> {
        write_json(&self.folder(image.id()), ORIGIN, origin)
    }

    /// Where the image with these bytes came from, if that was written. A file that makes no sense says nothing.
    pub(crate) fn origin<T: DeserializeOwned>(&self, bytes: &Digest) -> Option<T> {
        let record = self.record(bytes).ok()?;
        let path = self.folder(record.id()).join(ORIGIN);
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .inspect_err(|error| tracing::warn!(path = %path.display(), %error, "where an image came from is not known any more"))
                .ok(),
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::warn!(path = %path.display(), %error, "where an image came from is not known any more");
                }
                None
            }
        }
    }
}
