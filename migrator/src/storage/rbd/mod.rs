//! Volumes as images of a Ceph pool. QEMU reads and writes them by itself, through librbd; no data passes this service, and what is
//! done here is done by Ceph's own programs.
//!
//! | in the pool | what |
//! |---|---|
//! | object `migrator_class` | which storage it is, as `.migrator-class` of the driver `file` |
//! | image `migrator.ext4.MIB`, snapshot `v1` | an empty file system of that size; protected |
//! | image `NAME` | a volume: a clone of that snapshot |
//! | its metadata `migrator.record` | who has it |
//! | object `migrator_lock.NAME` | locked (for 30 s at most) by whoever changes the record |

mod answers;
mod diff;
mod record;
mod template;
mod tool;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use vm_runtime::command_line::RbdImage;

use answers::{Info, Status, Usage};
use tool::Access;
pub use tool::ToolError;

use super::file::{Marker, fresh_id, marker};
use super::holder::{Holder, Record, Refused, Take};
use super::{SharedVolume, StorageError};

/// For what takes a tenth of a second on a healthy cluster.
const SOON: Duration = Duration::from_secs(20);
/// For what takes as long as there are objects.
const LONG: Duration = Duration::from_secs(300);
/// What images are made with: two clients that write to one exclude each other, and usage is known without looking at each object.
const FEATURES: &str = "layering,exclusive-lock,object-map,fast-diff";
/// The snapshot of a template.
const SNAPSHOT: &str = "v1";
const TEMPLATE: &str = "migrator.ext4.";
const MARKER: &str = "migrator_class";
/// A class of the driver `rbd`.
#[derive(Clone, Debug)]
pub struct RbdClass {
    name: String,
    pool: String,
    access: Access,
    /// For templates that are being made.
    dir: PathBuf,
}

impl RbdClass {
    pub(super) fn open(
        name: &str,
        pool: &str,
        monitors: &[String],
        (user, key_file): (&str, &Path),
        dir: &Path,
    ) -> Result<Self, StorageError> {
        check_key(name, key_file)?;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(failed("make", dir))?;
        let conf = dir.join(format!("{name}.conf"));
        // What librados is told, here and in QEMU: no machine's own ceph.conf has a say.
        let text = format!(
            "[global]\nmon host = {}\nclient mount timeout = 15\nlog file =\nadmin socket =\n",
            monitors.join(",")
        );
        fs::write(&conf, text).map_err(failed("write", &conf))?;
        Ok(Self {
            name: name.to_owned(),
            pool: pool.to_owned(),
            access: Access {
                conf,
                user: user.to_owned(),
                key_file: key_file.to_owned(),
            },
            dir: dir.to_owned(),
        })
    }

    pub(super) fn image(&self, volume: &str) -> RbdImage {
        RbdImage {
            pool: self.pool.clone(),
            image: volume.to_owned(),
            user: self.access.user.clone(),
            key_file: self.access.key_file.clone(),
            conf: self.access.conf.clone(),
        }
    }

    pub(super) fn id(&self) -> Result<String, StorageError> {
        let place = format!("object {MARKER} of pool {}", self.pool);
        match self.rados(&["get", MARKER, "-"], SOON) {
            Ok(text) => marker(&self.name, &place, &text),
            Err(error) if error.is_not_found() => Err(StorageError::NoMarker {
                class: self.name.clone(),
                path: place.into(),
            }),
            Err(error) => Err(self.tool(error)),
        }
    }

    pub(super) fn init(&self) -> Result<String, StorageError> {
        match self.rados(&["create", MARKER], SOON) {
            Err(error) if error.is_taken() => {
                return Err(StorageError::Marked {
                    class: self.name.clone(),
                });
            }
            made => made.map_err(|error| self.tool(error))?,
        };
        let id = fresh_id();
        let mark = Marker {
            class: self.name.clone(),
            id: id.clone(),
        };
        let text = serde_json::to_vec(&mark).map_err(|error| StorageError::Record {
            volume: MARKER.to_owned(),
            problem: error.to_string(),
        })?;
        let mut file =
            tempfile::NamedTempFile::new_in(&self.dir).map_err(failed("write to", &self.dir))?;
        file.write_all(&text)
            .map_err(failed("write", file.path()))?;
        let path = file.path().to_string_lossy().into_owned();
        self.rados(&["put", MARKER, &path], SOON)
            .map_err(|error| self.tool(error))?;
        Ok(id)
    }

    pub(super) fn create(
        &self,
        volume: &str,
        size: u64,
        ephemeral: bool,
    ) -> Result<SharedVolume, StorageError> {
        self.id()?;
        let template = self.template(size)?;
        let clone = [
            "clone",
            "--image-feature",
            FEATURES,
            &self.path(&format!("{template}@{SNAPSHOT}")),
            &self.path(volume),
        ];
        match self.rbd(&clone, SOON) {
            Err(error) if error.is_taken() => {
                return Err(StorageError::Taken(volume.to_owned()));
            }
            made => made.map_err(|error| self.tool(error))?,
        };
        let record = Record {
            ephemeral,
            ..Record::default()
        };
        self.store(volume, &record)?;
        Ok(SharedVolume {
            class: self.name.clone(),
            name: volume.to_owned(),
            size,
            allocated: 0,
            record,
        })
    }

    pub(super) fn find(&self, volume: &str) -> Result<Option<SharedVolume>, StorageError> {
        let info: Info = match self.json(&["info", "--format", "json", &self.path(volume)], SOON) {
            Ok(info) => info,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(self.tool(error)),
        };
        let Some(record) = self.record(volume)? else {
            // Somebody else's image.
            return Ok(None);
        };
        Ok(Some(SharedVolume {
            class: self.name.clone(),
            name: volume.to_owned(),
            size: info.size,
            allocated: 0,
            record,
        }))
    }

    pub(super) fn list(&self) -> Result<Vec<SharedVolume>, StorageError> {
        let usage: Usage = self
            .json(&["du", "--format", "json", "--pool", &self.pool], LONG)
            .map_err(|error| self.tool(error))?;
        let mut found = Vec::new();
        for image in usage.images {
            if image.snapshot.is_some() || image.name.starts_with(TEMPLATE) {
                continue;
            }
            // What is being removed in this moment has none any more.
            if let Some(record) = self.record(&image.name)? {
                found.push(SharedVolume {
                    class: self.name.clone(),
                    name: image.name,
                    size: image.provisioned_size,
                    allocated: image.used_size,
                    record,
                });
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    pub(super) fn remove(&self, volume: &str) -> Result<(), StorageError> {
        let _lock = self.lock(volume)?;
        let record = self.record(volume)?.ok_or_else(|| self.not_found(volume))?;
        if let Some(holder) = record.holder {
            return Err(StorageError::Refused {
                volume: volume.to_owned(),
                source: Refused::Held(holder),
            });
        }
        // Refused by Ceph as well while a client has it open.
        match self.rbd(&["rm", "--no-progress", &self.path(volume)], LONG) {
            Err(error) if error.is_busy() || error.to_string().contains("watchers") => {
                Err(StorageError::Served {
                    volume: volume.to_owned(),
                })
            }
            removed => removed.map(drop).map_err(|error| self.tool(error)),
        }
    }

    pub(super) fn change(
        &self,
        volume: &str,
        change: &mut dyn FnMut(&mut Record) -> bool,
    ) -> Result<bool, StorageError> {
        let _lock = self.lock(volume)?;
        let mut record = self.record(volume)?.ok_or_else(|| self.not_found(volume))?;
        let changed = change(&mut record);
        if changed {
            self.store(volume, &record)?;
        }
        Ok(changed)
    }

    pub(super) fn take(&self, volume: &str, me: &Holder, right: Take) -> Result<(), StorageError> {
        let mut refused = None;
        self.change(volume, &mut |record| match record.take(me, right) {
            Ok(changed) => changed,
            Err(why) => {
                refused = Some(why);
                false
            }
        })?;
        match refused {
            None => Ok(()),
            Some(source) => Err(StorageError::Refused {
                volume: volume.to_owned(),
                source,
            }),
        }
    }

    pub(super) fn watchers(&self, volume: &str) -> Result<Vec<String>, StorageError> {
        let status: Status = self
            .json(&["status", "--format", "json", &self.path(volume)], SOON)
            .map_err(|error| self.tool(error))?;
        let addresses = status.watchers.into_iter().map(|watcher| watcher.address);
        Ok(addresses.collect())
    }

    pub(super) fn fence(&self, clients: &[String]) -> Result<(), StorageError> {
        for client in clients {
            self.access
                .run("ceph", &["osd", "blocklist", "add", client], None, SOON)
                .map_err(|error| self.tool(error))?;
        }
        Ok(())
    }

    /// `POOL/IMAGE`.
    fn path(&self, image: &str) -> String {
        format!("{}/{image}", self.pool)
    }

    fn rbd(&self, args: &[&str], within: Duration) -> Result<Vec<u8>, ToolError> {
        self.access.run("rbd", args, None, within)
    }

    fn rados(&self, args: &[&str], within: Duration) -> Result<Vec<u8>, ToolError> {
        let args = [args, &["--pool", &self.pool]].concat();
        self.access.run("rados", &args, None, within)
    }

    fn json<T: DeserializeOwned>(&self, args: &[&str], within: Duration) -> Result<T, ToolError> {
        let text = self.rbd(args, within)?;
        serde_json::from_slice(&text).map_err(|error| ToolError::Strange {
            program: "rbd",
            verb: args.first().copied().unwrap_or_default().to_owned(),
            problem: error.to_string(),
        })
    }

    fn tool(&self, source: ToolError) -> StorageError {
        StorageError::Tool {
            class: self.name.clone(),
            source,
        }
    }

    fn not_found(&self, volume: &str) -> StorageError {
        StorageError::NotFound {
            class: self.name.clone(),
            volume: volume.to_owned(),
        }
    }
}

/// A key that anybody can read is nobody's.
fn check_key(class: &str, path: &Path) -> Result<(), StorageError> {
    let wrong = |problem: String| StorageError::Key {
        class: class.to_owned(),
        path: path.to_owned(),
        problem,
    };
    let file = File::open(path).map_err(|error| wrong(format!("cannot be read: {error}")))?;
    let mode = file.metadata().map(|found| found.permissions().mode());
    let mode = mode.map_err(|error| wrong(format!("cannot be looked at: {error}")))?;
    if mode & 0o077 != 0 {
        return Err(wrong(format!(
            "can be read by others (mode {:o}): chmod 600 it",
            mode & 0o777
        )));
    }
    let mut text = String::new();
    let read = file.take(4096).read_to_string(&mut text);
    let key = text.trim();
    let fine = read.is_ok() && !key.is_empty() && !key.contains(char::is_whitespace);
    match fine {
        true => Ok(()),
        false => Err(wrong(
            "has not one word of base64, as `ceph auth get-key client.USER` prints it".to_owned(),
        )),
    }
}

fn failed(verb: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> StorageError {
    move |source| StorageError::File {
        verb,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(dir: &Path, mode: u32, key: &str) -> Result<RbdClass, StorageError> {
        let key_file = dir.join("key");
        fs::write(&key_file, key).unwrap();
        fs::set_permissions(&key_file, fs::Permissions::from_mode(mode)).unwrap();
        let monitors = ["127.0.0.1:3300".to_owned()];
        RbdClass::open("ceph", "pods", &monitors, ("migrator", &key_file), dir)
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let refused = class(dir.path(), 0o644, "AQB=").unwrap_err().to_string();
        assert!(refused.contains("chmod 600"), "{refused}");
        let refused = class(dir.path(), 0o600, "[client]\nkey = x").unwrap_err();
        assert!(refused.to_string().contains("get-key"), "{refused}");
        let class = class(dir.path(), 0o600, "AQB=\n").unwrap();
        let conf = fs::read_to_string(&class.access.conf).unwrap();
        assert!(
            conf.contains("mon host = 127.0.0.1:3300\n") && !conf.contains("AQB"),
            "{conf}"
        );
        assert_eq!(class.image("db").image, "db");
    }
}
