//! Empty file systems, one of each size that was asked for, to be cloned.

use std::fs::File;

use super::answers::Snapshot;
use super::diff::Diff;
use super::tool::ToolError;
use super::{FEATURES, LONG, RbdClass, SNAPSHOT, SOON, TEMPLATE, failed};
use crate::block::Disk;
use crate::block::mkfs::mkfs;
use crate::storage::StorageError;
use crate::storage::file::fresh_id;

impl RbdClass {
    /// The image of an empty file system of this size, with its snapshot: made by whoever needs it first.
    pub(super) fn template(&self, size: u64) -> Result<String, StorageError> {
        let name = format!("{TEMPLATE}{}", size >> 20);
        if self.is_template(&name)? {
            return Ok(name);
        }
        let half = format!("{TEMPLATE}new-{}", fresh_id());
        let made = self.make_template(&half, &name, size);
        if made.is_err() || !self.is_template(&name)? {
            // What is left of it is in nobody's way.
            let at = self.path(&format!("{half}@{SNAPSHOT}"));
            let _ = self.rbd(&["snap", "unprotect", &at], SOON);
            let _ = self.rbd(&["snap", "purge", "--no-progress", &self.path(&half)], SOON);
            let _ = self.rbd(&["rm", "--no-progress", &self.path(&half)], LONG);
        }
        match made {
            Ok(()) => Ok(name),
            Err(_) if self.is_template(&name)? => Ok(name),
            Err(error) => Err(error),
        }
    }

    /// Under another name first: a template is there complete, or not at all.
    fn make_template(&self, half: &str, name: &str, size: u64) -> Result<(), StorageError> {
        let folder = tempfile::Builder::new()
            .prefix(".new-")
            .tempdir_in(&self.dir)
            .map_err(failed("make a folder in", &self.dir))?;
        let path = folder.path().join("disk");
        let disk = |source| StorageError::Disk {
            volume: name.to_owned(),
            source,
        };
        let made = Disk::create(&path, size).map_err(disk)?;
        mkfs(&path).map_err(|source| StorageError::Mkfs {
            volume: name.to_owned(),
            source,
        })?;
        let data = made.allocated().map_err(disk)?;
        let file = File::open(&path).map_err(failed("open", &path))?;
        let bytes = format!("{size}B");
        let done = |done: Result<Vec<u8>, ToolError>| done.map_err(|error| self.tool(error));
        let (image, snapshot) = (self.path(half), self.path(&format!("{half}@{SNAPSHOT}")));
        done(self.rbd(
            &[
                "create",
                "--image-feature",
                FEATURES,
                "--size",
                &bytes,
                &image,
            ],
            SOON,
        ))?;
        let mut stream = Diff::new(file, size, &data);
        let import = ["import-diff", "--no-progress", "-", &image];
        done(self.access.run("rbd", &import, Some(&mut stream), LONG))?;
        done(self.rbd(&["snap", "create", "--no-progress", &snapshot], SOON))?;
        done(self.rbd(&["snap", "protect", &snapshot], SOON))?;
        done(self.rbd(&["rename", &image, &self.path(name)], SOON))?;
        Ok(())
    }

    fn is_template(&self, name: &str) -> Result<bool, StorageError> {
        let list = ["snap", "ls", "--format", "json", &self.path(name)];
        match self.json::<Vec<Snapshot>>(&list, SOON) {
            Ok(snapshots) => Ok(snapshots
                .iter()
                .any(|snapshot| snapshot.name == SNAPSHOT && snapshot.protected == "true")),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(self.tool(error)),
        }
    }
}
