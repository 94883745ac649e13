//! Where things are: the source tree, the build folder, and what setup leaves there.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Names a `migrator` to use instead of building one.
const MIGRATOR_BIN: &str = "MIGRATOR_BIN";

/// The source tree and its build folder.
#[derive(Clone, Debug)]
pub struct Project {
    /// Folder of the workspace's Cargo.toml.
    pub root: PathBuf,
    /// Cargo's build folder: `CARGO_TARGET_DIR`, or `target` in the root.
    pub target: PathBuf,
}

impl Project {
    /// Finds both, from what cargo says when it runs a program, else from where this one was built.
    ///
    /// # Errors
    /// The source tree is gone.
    pub fn discover() -> Result<Project> {
        let manifest = std::env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = manifest
            .parent()
            .context("the crate's folder has no parent")?
            .canonicalize()
            .with_context(|| {
                format!("cannot find the source tree around {}", manifest.display())
            })?;
        let target = match std::env::var_os("CARGO_TARGET_DIR") {
            Some(dir) => root.join(dir),
            None => root.join("target"),
        };
        std::fs::create_dir_all(&target)
            .with_context(|| format!("cannot create {}", target.display()))?;
        Ok(Project { root, target })
    }

    /// The guest's kernel, modules and initramfs.
    pub fn guest_dir(&self) -> PathBuf {
        self.target.join("guest")
    }

    /// The guest's kernel image.
    pub fn kernel(&self) -> PathBuf {
        self.guest_dir().join("vmlinuz")
    }

    /// The guest's initramfs.
    pub fn initramfs(&self) -> PathBuf {
        self.guest_dir().join("initramfs.cpio")
    }

    /// A static busybox: the demo image's first layer, and what tests put into guests.
    pub fn busybox(&self) -> PathBuf {
        self.guest_dir().join("busybox")
    }

    /// The demo's OCI image layout.
    pub fn demo_image(&self) -> PathBuf {
        self.target.join("demo-image")
    }

    /// The `migrator` program: `MIGRATOR_BIN`, or as `cargo build -p migrator` leaves it.
    pub fn migrator(&self) -> PathBuf {
        std::env::var_os(MIGRATOR_BIN).map_or_else(
            || self.target.join("debug/migrator"),
            |program| self.root.join(program),
        )
    }

    /// Whether `MIGRATOR_BIN` names a program that is not ours to build.
    pub fn has_given_migrator(&self) -> bool {
        std::env::var_os(MIGRATOR_BIN).is_some()
    }

    /// `path` as the user would write it: relative to the source tree where it is inside.
    pub fn short<'a>(&self, path: &'a Path) -> std::path::Display<'a> {
        path.strip_prefix(&self.root).unwrap_or(path).display()
    }
}
