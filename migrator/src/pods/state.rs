//! What a pod leaves on disk, so that a restarted service finds it: `pods/NAME/pod.json`.
//!
//! Beside it in the folder: the VMM's record, sockets, console and log (vm-runtime), and `logs/`.
//! Whose the pod is stands in the node's journal, and only there.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use vm_runtime::pod::PodSpec;
use vm_runtime::spec::VmSpec;

use crate::api::types::ContainerStatus;

const POD: &str = "pod.json";

/// Everything about a pod that no other file has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodFile {
    /// What was asked for.
    pub spec: PodSpec,
    /// Its VM.
    pub vm: VmSpec,
    /// Its slot on this node.
    pub slot: u16,
    /// Its containers have not been started yet: a service that finds it so removes it.
    #[serde(default)]
    pub booting: bool,
    /// It is being started again ([`super::again`]): a service that finds it so ends what there is of its VM.
    #[serde(default)]
    pub starting_again: bool,
    /// What travels with it.
    pub record: PodRecord,
}

/// What travels with a pod beside its spec: the JSON of an offer's `record`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodRecord {
    /// When it was first run, milliseconds of Unix time.
    pub created_unix_ms: u64,
    /// Its containers, as last known.
    pub containers: Vec<ContainerStatus>,
}

/// Makes a pod's folder, which must not be there.
pub fn create_folder(pods: &Path, name: &str) -> io::Result<PathBuf> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(pods)?;
    let dir = pods.join(name);
    fs::DirBuilder::new().mode(0o700).create(&dir)?;
    File::open(pods)?.sync_all()?;
    Ok(dir)
}

/// Writes `pods/NAME/pod.json`, durably: after this returns, a power cut keeps it.
pub fn store(dir: &Path, file: &PodFile) -> io::Result<()> {
    write_json(&dir.join(POD), file)
}

/// Reads what [`store`] wrote.
pub fn load(dir: &Path) -> io::Result<PodFile> {
    read_json(&dir.join(POD))
}

/// Removes a pod's folder: first its record, so that a half removed pod is not taken for a pod.
pub fn remove_folder(dir: &Path) -> io::Result<()> {
    match fs::remove_file(dir.join(POD)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Replaces a small JSON file durably: a temporary file, synced, renamed, and the folder synced.
pub fn write_json(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let temporary = path.with_extension("tmp");
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(&serde_json::to_vec_pretty(value)?)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    File::open(dir)?.sync_all()
}

/// Reads a JSON file.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    serde_json::from_slice(&fs::read(path)?).map_err(|error| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{}: {error}", path.display()),
        )
    })
}

/// Now, in milliseconds of Unix time.
pub fn unix_ms() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |t| u64::try_from(t.as_millis()).unwrap_or(u64::MAX))
}
