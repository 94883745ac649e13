//! What a store finds when it is opened.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::digest::Digest;
use super::gc::Leases;
use super::record::ImageRecord;
use super::store::{ImageStore, LEASES, NAMES};
use super::store_files::{EROFS, StoreError, TMP, io_error, load_image, read_json};

impl ImageStore {
    /// Reads images, names and leases, and removes what a crash left. Damaged images are left out.
    pub(super) fn load(&self) -> Result<(), StoreError> {
        let mut state = self.state();
        // What a damaged record needs is not known.
        let mut all_known = true;
        for entry in fs::read_dir(self.root()).map_err(io_error("read", self.root()))? {
            let entry = entry.map_err(io_error("read", self.root()))?;
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            let path = entry.path();
            if name.starts_with(TMP) {
                let removed = match entry.file_type() {
                    Ok(kind) if kind.is_dir() => fs::remove_dir_all(&path),
                    _ => fs::remove_file(&path),
                };
                removed.map_err(io_error("remove", &path))?;
            } else if let Ok(id) = Digest::from_hex(&name) {
                match load_image(&path) {
                    Ok(record) if record.id() == id => {
                        if let Err(error) = self.convert(&path, &record) {
                            // A full disk, say. What lacks is fetched when it is read, or cut out at the next start.
                            tracing::error!(image = record.name, %error, "the image's file is not cut into chunks");
                        }
                        drop(state.images.insert(id, Arc::new(record)));
                    }
                    Ok(_) => {
                        all_known = false;
                        tracing::warn!(path = %path.display(), "image folder of another name, left out");
                    }
                    Err(error) => {
                        all_known = false;
                        tracing::warn!(path = %path.display(), %error, "damaged image, left out");
                    }
                }
            }
        }
        let names: BTreeMap<String, Digest> = read_json(&self.root().join(NAMES))?;
        let leases: Leases = read_json(&self.root().join(LEASES))?;
        let images = &state.images;
        state.names = names
            .into_iter()
            .filter(|(_, id)| images.contains_key(id))
            .collect();
        state.leases = leases;
        if all_known {
            let images = state.images.values();
            let needed = images.flat_map(|record| record.chunks.iter().copied());
            self.chunks().keep_only(&needed.collect());
        }
        Ok(())
    }

    /// Cuts the file into chunks in which an earlier version kept an image. It goes when all of them are on the disk: whoever has it open keeps it.
    fn convert(&self, folder: &Path, record: &ImageRecord) -> Result<(), StoreError> {
        let path = folder.join(EROFS);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(io_error("open", &path)(error)),
        };
        tracing::info!(image = record.name, "cutting the image's file into chunks");
        let mut missing = 0;
        for index in self.chunks().missing(record) {
            let mut bytes = vec![0; record.chunk_len(index)];
            let digest = &record.chunks[index as usize];
            let read = file.read_exact_at(&mut bytes, record.chunk_offset(index));
            match read {
                Ok(()) if Digest::of(&bytes) == *digest => self.chunks().put(digest, &bytes)?,
                Ok(()) | Err(_) => missing += 1,
            }
        }
        if missing > 0 {
            tracing::error!(
                image = record.name,
                missing,
                "some of the file is damaged: it is fetched when somebody has it"
            );
        }
        self.chunks().sync()?;
        fs::remove_file(&path).map_err(io_error("remove", &path))
    }
}
