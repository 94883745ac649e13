//! Volumes as files of a file system that several nodes have mounted.
//!
//! | file | what |
//! |---|---|
//! | `.migrator-class` | `{"class":"shared","id":"…"}`: without it the folder is not the mounted one |
//! | `NAME.img` | the disk; only who holds the lock opens it |
//! | `NAME.claim` | who has it ([`super::slots`]); locked by the service that serves it, and by whoever changes it |

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::holder::{Holder, Record, Take};
use super::lock::{self, Held};
use super::slots;
use super::{SharedVolume, StorageError};
use crate::block::Disk;
use crate::block::mkfs::mkfs;

const MARKER: &str = ".migrator-class";
const DISK: &str = ".img";
const CLAIM: &str = ".claim";
/// How long a change waits for another one. A service that serves the volume does not let go.
const CHANGES_WITHIN: Duration = Duration::from_secs(2);
/// How long the owner of a pod waits for the lock: a source drops it before it sends the grant, and a killed service's goes with
/// its process, which a server across the network may learn of later.
const OWNER_WITHIN: Duration = Duration::from_secs(30);

/// What says which storage it is.
#[derive(Serialize, Deserialize)]
pub(super) struct Marker {
    pub(super) class: String,
    pub(super) id: String,
}

/// A class of the driver `file`.
#[derive(Clone, Debug)]
pub struct FileClass {
    name: String,
    dir: PathBuf,
}

/// A claim's file, locked.
struct Locked {
    file: File,
    path: PathBuf,
    number: u64,
    record: Record,
}

impl FileClass {
    pub(super) fn new(name: &str, dir: &Path) -> Self {
        Self {
            name: name.to_owned(),
            dir: dir.to_owned(),
        }
    }

    pub(super) fn id(&self) -> Result<String, StorageError> {
        let path = self.dir.join(MARKER);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(StorageError::NoMarker {
                    class: self.name.clone(),
                    path,
                });
            }
            Err(source) => return Err(failed("read", &path)(source)),
        };
        marker(&self.name, &path.display().to_string(), &text)
    }

    pub(super) fn init(&self) -> Result<String, StorageError> {
        let path = self.dir.join(MARKER);
        let id = fresh_id();
        let marker = Marker {
            class: self.name.clone(),
            id: id.clone(),
        };
        // A link replaces nothing: of two that prepare the same storage, one does.
        let half = tempfile::Builder::new()
            .prefix(".new-")
            .tempfile_in(&self.dir)
            .map_err(failed("write to", &self.dir))?;
        let text = serde_json::to_string(&marker).map_err(|error| StorageError::Record {
            volume: MARKER.to_owned(),
            problem: error.to_string(),
        })?;
        fs::write(half.path(), text + "\n").map_err(failed("write", half.path()))?;
        let synced = half.as_file().sync_all();
        synced.map_err(failed("write", half.path()))?;
        match fs::hard_link(half.path(), &path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(StorageError::Marked {
                    class: self.name.clone(),
                });
            }
            linked => linked.map_err(failed("make", &path))?,
        }
        self.sync()?;
        Ok(id)
    }

    pub(super) fn file(&self, volume: &str) -> PathBuf {
        self.dir.join(format!("{volume}{DISK}"))
    }

    pub(super) fn create(
        &self,
        volume: &str,
        size: u64,
        ephemeral: bool,
    ) -> Result<SharedVolume, StorageError> {
        self.id()?;
        let path = self.file(volume);
        if path.exists() {
            return Err(StorageError::Taken(volume.to_owned()));
        }
        let temporary = tempfile::Builder::new()
            .prefix(".new-")
            .tempdir_in(&self.dir)
            .map_err(failed("make a folder in", &self.dir))?;
        let half = temporary.path().join("disk");
        let disk = |source| StorageError::Disk {
            volume: volume.to_owned(),
            source,
        };
        let made = Disk::create(&half, size).map_err(disk)?;
        mkfs(&half).map_err(|source| StorageError::Mkfs {
            volume: volume.to_owned(),
            source,
        })?;
        made.flush().map_err(disk)?;
        match fs::hard_link(&half, &path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(StorageError::Taken(volume.to_owned()));
            }
            linked => linked.map_err(failed("make", &path))?,
        }
        self.sync()?;
        // Somebody may have taken it already.
        let fresh = &mut |record: &mut Record| {
            record.ephemeral = ephemeral;
            record.barred = None;
            true
        };
        self.change(volume, fresh)?;
        self.find(volume)?.ok_or_else(|| self.not_found(volume))
    }

    pub(super) fn find(&self, volume: &str) -> Result<Option<SharedVolume>, StorageError> {
        self.id()?;
        let path = self.file(volume);
        let found = match fs::metadata(&path) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(failed("look at", &path)(source)),
        };
        let claim = self.claim(volume);
        let record = match fs::read(&claim) {
            Ok(bytes) => slots::read(&bytes).1,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Record::default(),
            Err(source) => return Err(failed("read", &claim)(source)),
        };
        Ok(Some(SharedVolume {
            class: self.name.clone(),
            name: volume.to_owned(),
            size: found.len(),
            // st_blocks counts 512 bytes, whatever the file system's block is (stat(2)).
            allocated: found.blocks() * 512,
            record,
        }))
    }

    pub(super) fn list(&self) -> Result<Vec<SharedVolume>, StorageError> {
        self.id()?;
        let entries = fs::read_dir(&self.dir).map_err(failed("list", &self.dir))?;
        let mut found = Vec::new();
        for entry in entries.flatten() {
            let file = entry.file_name();
            let name = file.to_str().and_then(|name| name.strip_suffix(DISK));
            if let Some(name) = name
                && let Some(volume) = self.find(name)?
            {
                found.push(volume);
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    pub(super) fn remove(&self, volume: &str) -> Result<(), StorageError> {
        self.id()?;
        let locked = self.locked(volume, CHANGES_WITHIN)?;
        if let Some(holder) = locked.record.holder {
            return Err(StorageError::Refused {
                volume: volume.to_owned(),
                source: super::holder::Refused::Held(holder),
            });
        }
        for path in [self.file(volume), locked.path] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("remove", &path)(error));
                }
                Ok(()) | Err(_) => {}
            }
        }
        self.sync()
    }

    pub(super) fn change(
        &self,
        volume: &str,
        change: &mut dyn FnMut(&mut Record) -> bool,
    ) -> Result<bool, StorageError> {
        let mut locked = self.locked(volume, CHANGES_WITHIN)?;
        let changed = change(&mut locked.record);
        if changed {
            locked.store(volume)?;
        }
        Ok(changed)
    }

    pub(super) fn take(
        &self,
        volume: &str,
        me: &Holder,
        right: Take,
    ) -> Result<Held, StorageError> {
        let within = match right {
            Take::New => CHANGES_WITHIN,
            Take::Owned => OWNER_WITHIN,
        };
        let mut locked = self.locked(volume, within)?;
        let changed = locked.record.take(me, right);
        let changed = changed.map_err(|source| StorageError::Refused {
            volume: volume.to_owned(),
            source,
        })?;
        if changed {
            locked.store(volume)?;
        }
        Ok(Held { _file: locked.file })
    }

    /// The claim of a volume that is there, with nobody else at it.
    fn locked(&self, volume: &str, within: Duration) -> Result<Locked, StorageError> {
        let path = self.claim(volume);
        loop {
            if !self.file(volume).exists() {
                return Err(self.not_found(volume));
            }
            let file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
                .map_err(failed("open", &path))?;
            if !lock::lock(&file, within).map_err(failed("lock", &path))? {
                return Err(StorageError::Served {
                    volume: volume.to_owned(),
                });
            }
            // Somebody may have removed the volume between the two, and made it again.
            let here = file.metadata().map_err(failed("look at", &path))?;
            let same = fs::metadata(&path).is_ok_and(|named| named.ino() == here.ino());
            if !same {
                continue;
            }
            let mut bytes = vec![0; 2 * slots::SLOT];
            let mut length = 0;
            while let Some(rest) = bytes.get_mut(length..).filter(|rest| !rest.is_empty()) {
                match file.read_at(rest, length as u64) {
                    Ok(0) => break,
                    Ok(more) => length += more,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(source) => return Err(failed("read", &path)(source)),
                }
            }
            bytes.truncate(length);
            let (number, record) = slots::read(&bytes);
            return Ok(Locked {
                file,
                path,
                number,
                record,
            });
        }
    }

    fn claim(&self, volume: &str) -> PathBuf {
        self.dir.join(format!("{volume}{CLAIM}"))
    }

    fn not_found(&self, volume: &str) -> StorageError {
        StorageError::NotFound {
            class: self.name.clone(),
            volume: volume.to_owned(),
        }
    }

    fn sync(&self) -> Result<(), StorageError> {
        File::open(&self.dir)
            .and_then(|dir| dir.sync_all())
            .map_err(failed("write to", &self.dir))
    }
}

impl Locked {
    /// Writes the record, durably.
    fn store(&mut self, volume: &str) -> Result<(), StorageError> {
        let slot = slots::write(self.number, &self.record);
        let (offset, slot) = slot.map_err(|problem| StorageError::Record {
            volume: volume.to_owned(),
            problem,
        })?;
        let stored = self.file.write_all_at(&slot, offset);
        stored
            .and_then(|()| self.file.sync_data())
            .map_err(failed("write", &self.path))?;
        self.number += 1;
        Ok(())
    }
}

/// The id that a mark says, if it is this class's.
pub(super) fn marker(class: &str, place: &str, text: &[u8]) -> Result<String, StorageError> {
    let wrong = |problem: String| StorageError::Marker {
        class: class.to_owned(),
        where_: place.to_owned(),
        problem,
    };
    let marker: Marker = serde_json::from_slice(text)
        .map_err(|error| wrong(format!("it cannot be read: {error}")))?;
    let word = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    if !(1..=64).contains(&marker.id.len()) || !marker.id.bytes().all(word) {
        return Err(wrong("its id is none".to_owned()));
    }
    match marker.class == class {
        true => Ok(marker.id),
        false => Err(wrong(format!(
            "it is the mark of class `{}`: give the class the same name on every node",
            marker.class
        ))),
    }
}

/// An id that no other storage has.
pub(super) fn fresh_id() -> String {
    crate::pods::plan::uuid(crate::wire::id::MigrationId::random().0)
}

fn failed(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StorageError {
    move |source| StorageError::File {
        verb,
        path: path.to_owned(),
        source,
    }
}
