//! The templates of a node, as folders. Calls block.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use vm_runtime::memory::{GuestMemory, page_hash};
use vm_runtime::spec::VmSpec;

use super::memory::{self, Summary};
use super::{Key, TemplateError};
use crate::config::TemplateMode;
use crate::pods::state::{read_json, unix_ms, write_json};

/// What a template is.
const FILE: &str = "template.json";
const MEMORY: &str = "memory";
const STATE: &str = "state";
/// Folders of templates that are being made or removed; short, as there are sockets in them.
const UNFINISHED: &str = ".";

/// After so many starts in a row that took too long, a template is of no use.
const LATE: u32 = 3;

/// `template.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateFile {
    /// The VM that was saved.
    pub shape: VmSpec,
    /// Version of the QEMU that saved it.
    pub qemu: String,
    /// When, in milliseconds of Unix time.
    pub made_unix_ms: u64,
    /// Pages of its memory that are not zero.
    pub pages: u64,
    /// Of the memory, see `memory.rs`.
    memory_digest: u64,
    /// XXH3 of the device state.
    state_digest: u64,
}

/// A template, as it is listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    /// Its name.
    pub key: Key,
    /// What it is.
    pub file: TemplateFile,
    /// What it takes on the node, in bytes.
    pub allocated: u64,
    /// When a pod started from it, or when it was made, in milliseconds of Unix time.
    pub used_unix_ms: u64,
    /// Pods that this service has started from it.
    pub starts: u64,
}

/// A template to start from: its files stay open, whoever removes it.
#[derive(Debug)]
pub(crate) struct Opened {
    file: TemplateFile,
    memory: File,
    state: Vec<u8>,
}

impl Opened {
    /// Fills guest memory, which is all zeros.
    ///
    /// # Errors
    /// The template is damaged.
    pub(crate) fn fill(&self, memory: &GuestMemory) -> Result<(), TemplateError> {
        let wanted = Summary {
            pages: self.file.pages,
            digest: self.file.memory_digest,
        };
        memory::load(&self.memory, memory, wanted)
    }

    /// The device state.
    pub(crate) fn state(&self) -> &[u8] {
        &self.state
    }
}

#[derive(Debug, Default)]
struct Inner {
    starts: HashMap<Key, u64>,
    /// Starts in a row that took too long.
    late: HashMap<Key, u32>,
    /// Shapes that no template could be made of: not to be tried again by this service unasked.
    hopeless: Vec<Key>,
}

/// The templates of a node.
#[derive(Debug)]
pub struct Templates {
    dir: PathBuf,
    mode: TemplateMode,
    /// What they may take together, in bytes.
    limit: u64,
    inner: Mutex<Inner>,
    /// One is made at a time.
    pub(super) building: tokio::sync::Mutex<()>,
}

impl Templates {
    /// Those in this folder, which need not be there; what an earlier service left unfinished is removed.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn open(dir: PathBuf, mode: TemplateMode, limit: u64) -> Result<Self, TemplateError> {
        let templates = Self {
            dir,
            mode,
            limit,
            inner: Mutex::default(),
            building: tokio::sync::Mutex::default(),
        };
        for path in templates.folders()? {
            if name(&path).starts_with(UNFINISHED) {
                fs::remove_dir_all(&path).map_err(failed("remove", &path))?;
            }
        }
        Ok(templates)
    }

    /// Whether pods start from them.
    pub fn is_on(&self) -> bool {
        self.mode != TemplateMode::Off
    }

    /// Whether they are made unasked.
    pub fn is_auto(&self) -> bool {
        self.mode == TemplateMode::Auto
    }

    /// All of them, the one used last first.
    ///
    /// # Errors
    /// The folder cannot be read. What is no template is left out.
    pub fn list(&self) -> Result<Vec<Template>, TemplateError> {
        let mut found: Vec<Template> = self
            .folders()?
            .iter()
            .filter_map(|path| self.look(Key::parse(&name(path))?))
            .collect();
        found.sort_by_key(|template| std::cmp::Reverse(template.used_unix_ms));
        Ok(found)
    }

    /// The template of that name.
    pub fn look(&self, key: Key) -> Option<Template> {
        let dir = self.dir.join(key.as_str());
        let file: TemplateFile = read_json(&dir.join(FILE)).ok()?;
        let size = |name| fs::metadata(dir.join(name)).map(|meta| meta.blocks() * 512);
        let used = fs::metadata(dir.join(FILE)).and_then(|meta| meta.modified());
        let starts = self.lock().starts.get(&key).copied().unwrap_or_default();
        Some(Template {
            file,
            allocated: [FILE, MEMORY, STATE]
                .map(|name| size(name).unwrap_or_default())
                .iter()
                .sum(),
            used_unix_ms: millis(used.unwrap_or(UNIX_EPOCH)),
            starts,
            key,
        })
    }

    /// Opens a template to start from; `None` if there is none.
    ///
    /// # Errors
    /// It is damaged, as far as that can be seen without its memory.
    pub(crate) fn start(&self, key: &Key) -> Result<Option<Opened>, TemplateError> {
        let dir = self.dir.join(key.as_str());
        if !dir.exists() {
            return Ok(None);
        }
        let path = dir.join(FILE);
        let file: TemplateFile = read_json(&path).map_err(failed("read", &path))?;
        let path = dir.join(STATE);
        let state = fs::read(&path).map_err(failed("read", &path))?;
        if page_hash(&state) != file.state_digest {
            return Err(TemplateError::Damaged("device state"));
        }
        let path = dir.join(MEMORY);
        let memory = File::open(&path).map_err(failed("open", &path))?;
        Ok(Some(Opened {
            file,
            memory,
            state,
        }))
    }

    /// Counts a pod that has started from it.
    pub(crate) fn used(&self, key: &Key) {
        {
            let mut inner = self.lock();
            *inner.starts.entry(key.clone()).or_default() += 1;
            inner.late.remove(key);
        }
        let touch =
            || File::open(self.dir.join(key.as_str()).join(FILE))?.set_modified(SystemTime::now());
        if let Err(error) = touch() {
            tracing::debug!(template = %key, %error, "its use is not noted");
        }
    }

    /// Counts a start from it that took too long. True if so many in a row did that it must be the template: the node may just be busy.
    pub(crate) fn late(&self, key: &Key) -> bool {
        let mut inner = self.lock();
        let late = inner.late.entry(key.clone()).or_default();
        *late += 1;
        *late >= LATE
    }

    /// Removes a template. Pods that have started from it do not need it.
    ///
    /// # Errors
    /// There is none, or the folder cannot be changed.
    pub fn remove(&self, key: &Key) -> Result<(), TemplateError> {
        let dir = self.dir.join(key.as_str());
        // One rename, so that no half of it is ever found.
        let gone = self.unfinished()?;
        match fs::rename(&dir, gone.path().join("gone")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(TemplateError::NotFound(key.to_string()))
            }
            moved => moved.map_err(failed("remove", &dir)),
        }
    }

    /// A folder for what is not finished, which goes with the value, or with the next service.
    pub(super) fn unfinished(&self) -> Result<TempDir, TemplateError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
            .map_err(failed("make", &self.dir))?;
        tempfile::Builder::new()
            .prefix(UNFINISHED)
            .tempdir_in(&self.dir)
            .map_err(failed("make a folder in", &self.dir))
    }

    /// Writes what was saved into a folder that [`Templates::unfinished`] gave, and puts it in its place: it is there as a whole after
    /// a power cut, or not at all. Then removes those that were used least recently, while all of them take more than they may.
    pub(super) fn install(
        &self,
        key: &Key,
        shape: VmSpec,
        qemu: String,
        ram: &GuestMemory,
        state: &[u8],
    ) -> Result<Template, TemplateError> {
        let folder = self.unfinished()?;
        let dir = folder.path().join("t");
        fs::create_dir(&dir).map_err(failed("make", &dir))?;
        let path = dir.join(MEMORY);
        let saved = File::create_new(&path)
            .and_then(|file| {
                let saved = memory::save(ram, &file)?;
                file.sync_all()?;
                Ok(saved)
            })
            .map_err(failed("write", &path))?;
        let path = dir.join(STATE);
        fs::write(&path, state)
            .and_then(|()| File::open(&path)?.sync_all())
            .map_err(failed("write", &path))?;
        let file = TemplateFile {
            shape,
            qemu,
            made_unix_ms: unix_ms(),
            pages: saved.pages,
            memory_digest: saved.digest,
            state_digest: page_hash(state),
        };
        let path = dir.join(FILE);
        write_json(&path, &file).map_err(failed("write", &path))?;
        if self.dir.join(key.as_str()).exists() {
            self.remove(key)?;
        }
        let place = self.dir.join(key.as_str());
        fs::rename(&dir, &place)
            .and_then(|()| File::open(&self.dir)?.sync_all())
            .map_err(failed("make", &place))?;
        {
            let mut inner = self.lock();
            inner.hopeless.retain(|other| other != key);
            inner.late.remove(key);
        }
        self.prune(key)?;
        self.look(key.clone())
            .ok_or_else(|| TemplateError::NotFound(key.to_string()))
    }

    /// Removes the least recently used ones, but not `keep`.
    fn prune(&self, keep: &Key) -> Result<(), TemplateError> {
        let templates = self.list()?;
        let mut total: u64 = templates.iter().map(|t| t.allocated).sum();
        for template in templates.iter().rev().filter(|t| t.key != *keep) {
            if total <= self.limit {
                break;
            }
            self.remove(&template.key)?;
            total -= template.allocated;
            tracing::info!(template = %template.key, "removed, for another one's room");
        }
        Ok(())
    }

    /// Whether to make one of this shape unasked.
    pub(super) fn wants(&self, key: &Key) -> bool {
        self.is_auto()
            && !self.lock().hopeless.contains(key)
            && !self.dir.join(key.as_str()).exists()
    }

    /// None could be made of this shape.
    pub(super) fn give_up(&self, key: &Key) {
        self.lock().hopeless.push(key.clone());
    }

    fn folders(&self) -> Result<Vec<PathBuf>, TemplateError> {
        match fs::read_dir(&self.dir) {
            Ok(entries) => Ok(entries.flatten().map(|entry| entry.path()).collect()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(source) => Err(failed("list", &self.dir)(source)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every change is one call: a panic elsewhere leaves it whole.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

fn millis(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn failed(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TemplateError {
    let path = path.to_owned();
    move |source| TemplateError::File { verb, path, source }
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
