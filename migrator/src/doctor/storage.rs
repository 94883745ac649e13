//! Shared storage: whether it is there, and what reads and writes it.

use std::process::{Command, Stdio};

use vm_runtime::qemu::{QemuBinary, QemuConfig};

use super::{Check, Subject, missing, present};
use crate::api::error::chain;
use crate::config::StorageClass;
use crate::storage::Storage;

const CHECK: &str = "storage_class";

/// One check a class, and one of QEMU's driver for Ceph if a class needs it.
pub(super) async fn checks(subject: &Subject) -> Vec<Check> {
    let (Some((storage, node)), Some(state_dir)) = (&subject.storage, &subject.state_dir) else {
        return Vec::new();
    };
    if storage.classes.is_empty() {
        return Vec::new();
    }
    let ceph = storage
        .classes
        .values()
        .any(|class| matches!(class, StorageClass::Rbd { .. }));
    let (config, node, dir) = (storage.clone(), node.clone(), state_dir.clone());
    let found = tokio::task::spawn_blocking(move || classes(&config, &node, &dir)).await;
    let mut checks = found.unwrap_or_default();
    if ceph {
        let qemu = QemuConfig {
            binary: subject.qemu.binary.clone(),
            lib_dir: subject.qemu.lib_dir.clone(),
            data_dirs: subject.qemu.data_dirs.clone(),
        };
        checks.push(rbd_driver(&qemu).await);
    }
    checks
}

fn classes(config: &crate::config::Storage, node: &str, dir: &std::path::Path) -> Vec<Check> {
    let purpose = "volumes that do not move with their pods";
    let remedy = "see docs/shared-storage.md";
    let storage = match Storage::open(config, node, dir) {
        Ok(storage) => storage,
        Err(error) => return vec![missing(CHECK, false, purpose, chain(&error), remedy)],
    };
    let names = config.classes.keys();
    let check = |name: &String| match storage.class(name).and_then(|class| class.id()) {
        Ok(id) => present(CHECK, false, purpose, format!("{name}, id {id}")),
        Err(error) => missing(CHECK, false, purpose, chain(&error), remedy),
    };
    names.map(check).collect()
}

/// Whether this QEMU can load its driver: one that cannot does not know it, and one that can misses what is named.
async fn rbd_driver(config: &QemuConfig) -> Check {
    let (name, purpose) = ("qemu_rbd", "volumes on Ceph");
    let get = "apt-get install qemu-block-extra, of the same build as QEMU";
    let qemu = match QemuBinary::open(config).await {
        Ok(qemu) => qemu,
        Err(error) => return missing(name, false, purpose, chain(&error), get),
    };
    let mut command = Command::new(&qemu.path);
    command
        .args([
            "-machine",
            "none",
            "-nodefaults",
            "-display",
            "none",
            "-blockdev",
        ])
        .arg("driver=rbd,node-name=x,pool=p,image=i,conf=/nonexistent")
        .stdin(Stdio::null());
    if let Some(dir) = &qemu.lib_dir {
        command.env("LD_LIBRARY_PATH", dir);
    }
    let said = tokio::task::spawn_blocking(move || command.output()).await;
    let said = match said.map_err(std::io::Error::other).and_then(|said| said) {
        Ok(said) => String::from_utf8_lossy(&said.stderr).into_owned(),
        Err(error) => return missing(name, false, purpose, error.to_string(), get),
    };
    match said.contains("Unknown driver") || said.contains("Unknown protocol") {
        true => missing(name, false, purpose, "this QEMU has no driver `rbd`", get),
        false => present(name, false, purpose, "the driver `rbd` loads"),
    }
}
