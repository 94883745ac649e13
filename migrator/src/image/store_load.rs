//! What a store finds when it is opened.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;

use super::digest::Digest;
use super::gc::Leases;
use super::store::{ImageStore, LEASES, NAMES};
use super::store_files::{StoreError, TMP, io_error, load_image, read_json};

impl ImageStore {
    /// Reads images, names and leases, and removes what a crash left. Damaged images are left out.
    pub(super) fn load(&self) -> Result<(), StoreError> {
        let mut state = self.state();
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
                        drop(state.images.insert(id, Arc::new(record)))
                    }
                    Ok(_) => {
                        tracing::warn!(path = %path.display(), "image folder of another name, left out")
                    }
                    Err(error) => {
                        tracing::warn!(path = %path.display(), %error, "damaged image, left out")
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
        Ok(())
    }
}
