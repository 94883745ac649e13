//! Who has a volume, in the metadata of its image; and the lock of whoever changes that.

use std::time::{Duration, Instant};

use super::answers::LockInfo;
use super::{RbdClass, SOON};
use crate::storage::StorageError;
use crate::storage::file::fresh_id;
use crate::storage::holder::Record;

const RECORD: &str = "migrator.record";
/// How long the lock of a record lasts if its holder ends in between, in seconds.
const LOCK_SECONDS: &str = "30";
/// How long a change of a record waits for others: longer than one that was left behind lasts.
const LOCK_WITHIN: Duration = Duration::from_secs(40);
/// Between two tries.
const LOCK_AGAIN: Duration = Duration::from_millis(50);

impl RbdClass {
    /// `None`: the image is not there, or not a volume.
    pub(super) fn record(&self, volume: &str) -> Result<Option<Record>, StorageError> {
        match self.json(&["image-meta", "get", &self.path(volume), RECORD], SOON) {
            Ok(record) => Ok(Some(record)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(self.tool(error)),
        }
    }

    pub(super) fn store(&self, volume: &str, record: &Record) -> Result<(), StorageError> {
        let text = serde_json::to_string(record).map_err(|error| StorageError::Record {
            volume: volume.to_owned(),
            problem: error.to_string(),
        })?;
        self.rbd(
            &["image-meta", "set", &self.path(volume), RECORD, &text],
            SOON,
        )
        .map(drop)
        .map_err(|error| self.tool(error))
    }

    /// Keeps others from the volume's record, until it is dropped.
    pub(super) fn lock(&self, volume: &str) -> Result<RecordLock<'_>, StorageError> {
        let object = format!("migrator_lock.{volume}");
        let cookie = fresh_id();
        let deadline = Instant::now() + LOCK_WITHIN;
        loop {
            let get = [
                "lock",
                "get",
                &object,
                "record",
                "--lock-cookie",
                &cookie,
                "--lock-duration",
                LOCK_SECONDS,
            ];
            match self.rados(&get, SOON) {
                Ok(_) => {
                    return Ok(RecordLock {
                        class: self,
                        object,
                        cookie,
                    });
                }
                Err(error) if error.is_busy() && Instant::now() < deadline => {
                    std::thread::sleep(LOCK_AGAIN);
                }
                Err(error) if error.is_busy() => {
                    return Err(StorageError::Served {
                        volume: volume.to_owned(),
                    });
                }
                Err(error) => return Err(self.tool(error)),
            }
        }
    }
}

/// The lock of a record.
pub(super) struct RecordLock<'a> {
    class: &'a RbdClass,
    object: String,
    cookie: String,
}

impl Drop for RecordLock<'_> {
    fn drop(&mut self) {
        // A lock is its client's, and each call is a client of its own: it is broken, under the name that it has. If that fails, it
        // ends by itself.
        let info = ["lock", "info", &self.object, "record", "--format", "json"];
        let Ok(text) = self.class.rados(&info, SOON) else {
            return;
        };
        let Ok(LockInfo { lockers }) = serde_json::from_slice(&text) else {
            return;
        };
        for locker in lockers.iter().filter(|l| l.cookie == self.cookie) {
            let broken = [
                "lock",
                "break",
                &self.object,
                "record",
                &locker.name,
                "--lock-cookie",
                &self.cookie,
            ];
            let _ = self.class.rados(&broken, SOON);
        }
    }
}
