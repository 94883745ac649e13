//! Every chunk of an image, read and hashed.

use std::path::Path;
use std::{fs, io};

use super::files::Chunk;
use crate::image::record::ImageRecord;
use crate::image::store::ImageStore;
use crate::image::{Digest, StoreError};

/// What is wrong with an image on this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Chunks that were not what they should be, by index. They are set aside.
    pub damaged: Vec<u32>,
    /// Chunks that are not here.
    pub missing: Vec<u32>,
}

impl Verified {
    /// Whether nothing is.
    pub fn is_whole(&self) -> bool {
        self.damaged.is_empty() && self.missing.is_empty()
    }

    /// All that is wrong, in order.
    pub fn bad(&self) -> Vec<u32> {
        let mut all: Vec<u32> = self.damaged.iter().chain(&self.missing).copied().collect();
        all.sort_unstable();
        all
    }
}

impl ImageStore {
    /// Reads every chunk of an image from the disk, and hashes it. A chunk that occurs twice in it is read once.
    pub fn verify(&self, record: &ImageRecord) -> Verified {
        let mut seen = std::collections::HashMap::new();
        let mut verified = Verified::default();
        for (index, digest) in (0u32..).zip(&record.chunks) {
            let len = record.chunk_len(index);
            let found = seen.entry(*digest).or_insert_with(|| {
                let chunk = self.chunks().read_from_disk(digest, len);
                // Not kept: an image may be larger than memory.
                match chunk {
                    Chunk::Here(_) => None,
                    Chunk::Missing => Some(false),
                    Chunk::Damaged | Chunk::Misfit => Some(true),
                }
            });
            match found {
                None => {}
                Some(true) => verified.damaged.push(index),
                Some(false) => verified.missing.push(index),
            }
        }
        verified
    }

    /// Writes the block device of an image to a file, verified.
    ///
    /// # Errors
    /// A chunk is missing or damaged, or the file cannot be written.
    pub fn copy_out(&self, image: &Digest, to: &Path) -> Result<(), StoreError> {
        let record = self.record(image)?;
        let failed = |source: io::Error| StoreError::Io {
            what: "write",
            path: to.to_owned(),
            source,
        };
        let mut file = fs::File::create(to).map_err(failed)?;
        for index in 0..record.chunks.len() as u32 {
            let chunk = self.read_chunk(image, index)?;
            io::Write::write_all(&mut file, &chunk).map_err(failed)?;
        }
        Ok(())
    }
}
