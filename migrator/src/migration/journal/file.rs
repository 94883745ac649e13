//! One record, one file of two slots: a change overwrites the older slot in place.
//!
//! Nothing about the file changes but the bytes of one slot, so a change costs one write to the disk and no transaction of the file
//! system: the grant stands between a frozen guest and its resumption. A slot that a crash of the machine has torn was never acted
//! upon; the other one holds the record in force.
//!
//! ```text
//! slot: {"version":1,"sequence":N,"crc32":C,"record":"..."} spaces newline      file: slot slot
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::JournalError;

/// Version of the files.
const VERSION: u32 = 1;
/// Bytes of a slot, or a multiple of it: a block of the usual file systems, which a disk writes as a whole.
const BLOCK: usize = 4096;

#[derive(Serialize, Deserialize)]
struct Envelope {
    version: u32,
    /// Grows with every change: the higher valid one is in force.
    sequence: u64,
    /// CRC-32 of `record`.
    crc32: u32,
    /// The record as JSON text, so that the checksum covers exactly these bytes.
    record: String,
}

/// What a file holds.
struct Content {
    /// Bytes of one slot.
    slot: usize,
    /// The envelope in force, and the slot that has it.
    current: Option<(usize, Envelope)>,
}

/// The record in force; `None` where there is no file, or one that is only reserved.
///
/// # Errors
///
/// The file cannot be read, or holds no valid slot.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, JournalError> {
    let Some((_, envelope)) = load(path)?.and_then(|content| content.current) else {
        return Ok(None);
    };
    let record =
        serde_json::from_str(&envelope.record).map_err(|e| damaged(path, e.to_string()))?;
    Ok(Some(record))
}

/// Puts a record in force; durable when it returns.
///
/// # Errors
///
/// The old record is in force then.
pub(super) fn write<T: Serialize>(path: &Path, record: &T) -> Result<(), JournalError> {
    let content = load(path)?;
    let current = content.as_ref().and_then(|c| c.current.as_ref());
    let sequence = current.map_or(1, |(_, envelope)| envelope.sequence + 1);
    let text = encode(record, sequence).map_err(|e| failed("encode", path, e.into()))?;
    match &content {
        Some(content) if text.len() < content.slot => {
            let other = current.map_or(0, |(index, _)| 1 - index);
            let offset = (other * content.slot) as u64;
            let overwrite = || {
                let file = OpenOptions::new().write(true).open(path)?;
                file.write_all_at(&padded(&text, content.slot), offset)?;
                file.sync_data()
            };
            overwrite().map_err(|e| failed("write", path, e))
        }
        Some(_) | None => create(path, &text),
    }
}

/// Takes the space for a record that may come, so that writing it neither waits for the file system nor fails on a full disk.
///
/// # Errors
///
/// There is no space.
pub(super) fn reserve(path: &Path) -> Result<(), JournalError> {
    match path.try_exists() {
        Ok(true) => Ok(()),
        Ok(false) => create(path, b""),
        Err(e) => Err(failed("read", path, e)),
    }
}

fn load(path: &Path) -> Result<Option<Content>, JournalError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed("read", path, e)),
    };
    let slot = bytes.len() / 2;
    if slot == 0 || !bytes.len().is_multiple_of(2 * BLOCK) {
        return Err(damaged(path, format!("it has {} bytes", bytes.len())));
    }
    let (mut current, mut problem) = (None::<(usize, Envelope)>, None);
    for (index, bytes) in bytes.chunks_exact(slot).enumerate() {
        match decode(bytes) {
            Ok(Some(envelope)) => {
                if current
                    .as_ref()
                    .is_none_or(|(_, other)| other.sequence < envelope.sequence)
                {
                    current = Some((index, envelope));
                }
            }
            Ok(None) => {}
            Err(why) => problem = Some(why),
        }
    }
    match (&current, problem) {
        (None, Some(why)) => return Err(damaged(path, why)),
        (Some(_), Some(why)) => {
            warn!(path = %path.display(), why, "a change of this record was cut off by a crash: the one before is in force");
        }
        (_, None) => {}
    }
    Ok(Some(Content { slot, current }))
}

fn encode<T: Serialize>(record: &T, sequence: u64) -> serde_json::Result<Vec<u8>> {
    let record = serde_json::to_string(record)?;
    serde_json::to_vec(&Envelope {
        version: VERSION,
        sequence,
        crc32: crc32fast::hash(record.as_bytes()),
        record,
    })
}

fn decode(slot: &[u8]) -> Result<Option<Envelope>, String> {
    let text = slot.trim_ascii();
    if text.is_empty() {
        return Ok(None);
    }
    let envelope: Envelope = serde_json::from_slice(text).map_err(|e| e.to_string())?;
    if envelope.version != VERSION {
        return Err(format!("version {}", envelope.version));
    }
    if crc32fast::hash(envelope.record.as_bytes()) != envelope.crc32 {
        return Err("wrong checksum".to_owned());
    }
    Ok(Some(envelope))
}

/// The slot with `text` in it, which is shorter than the slot.
fn padded(text: &[u8], slot: usize) -> Vec<u8> {
    let mut bytes = text.to_vec();
    bytes.resize(slot - 1, b' ');
    bytes.push(b'\n');
    bytes
}

/// A new file with `text` in its first slot, in place of any old one: temporary file, fsync, rename, fsync of the folder.
fn create(path: &Path, text: &[u8]) -> Result<(), JournalError> {
    let slot = (text.len() + 1).next_multiple_of(BLOCK);
    let tmp = path.with_extension("tmp");
    let replace = || {
        let mut file = File::create(&tmp)?;
        file.write_all(&padded(text, slot))?;
        file.write_all(&padded(b"", slot))?;
        file.sync_all()?;
        fs::rename(&tmp, path)
    };
    replace().map_err(|e| {
        let _ = fs::remove_file(&tmp);
        failed("write", path, e)
    })?;
    let folder = path.parent().unwrap_or(Path::new("."));
    // The new record is what every later read sees; only a crash of the whole machine could undo it, and that ends the guest as well.
    if let Err(error) = File::open(folder).and_then(|dir| dir.sync_all()) {
        warn!(path = %path.display(), %error, "a crash of the machine may undo this record");
    }
    Ok(())
}

pub(super) fn failed(action: &'static str, path: &Path, source: io::Error) -> JournalError {
    JournalError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

/// The bytes of a new file with the record in it, for tests that write many.
#[cfg(test)]
pub(super) fn new_file<T: Serialize>(record: &T) -> Vec<u8> {
    let text = encode(record, 1).unwrap();
    [padded(&text, BLOCK), padded(b"", BLOCK)].concat()
}

fn damaged(path: &Path, why: String) -> JournalError {
    JournalError::Damaged {
        path: path.to_owned(),
        why,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn long(letter: &str, length: usize) -> String {
        letter.repeat(length)
    }

    #[test]
    fn a_change_overwrites_the_older_slot_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.json");
        let mut before = Vec::new();
        for number in 1..=4_u64 {
            write(&path, &number).unwrap();
            assert_eq!(read::<u64>(&path).unwrap(), Some(number));
            let after = fs::read(&path).unwrap();
            assert_eq!(after.len(), 2 * BLOCK);
            let kept = usize::from(!number.is_multiple_of(2)) * BLOCK;
            if number > 1 {
                assert_eq!(before[kept..kept + BLOCK], after[kept..kept + BLOCK]);
            }
            before = after;
        }
    }

    #[test]
    fn a_torn_change_leaves_the_record_before_in_force() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.json");
        for record in [long("a", 3000), long("b", 3000)] {
            write(&path, &record).unwrap();
        }
        let mut bytes = fs::read(&path).unwrap();
        bytes[BLOCK + 512..2 * BLOCK].fill(0);
        fs::write(&path, &bytes).unwrap();
        assert_eq!(read::<String>(&path).unwrap(), Some(long("a", 3000)));
        // The next change takes the torn slot.
        write(&path, &long("c", 3000)).unwrap();
        assert_eq!(read::<String>(&path).unwrap(), Some(long("c", 3000)));
        let after = fs::read(&path).unwrap();
        assert_eq!(after[..BLOCK], bytes[..BLOCK]);
    }

    #[test]
    fn a_record_that_outgrows_its_slot_gets_a_larger_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.json");
        for record in [long("a", 10), long("b", 5000), long("c", 10)] {
            write(&path, &record).unwrap();
            assert_eq!(read::<String>(&path).unwrap(), Some(record));
        }
        assert_eq!(fs::metadata(&path).unwrap().len(), 4 * BLOCK as u64);
    }

    #[test]
    fn a_reserved_file_holds_nothing_and_keeps_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.json");
        reserve(&path).unwrap();
        assert_eq!(read::<u64>(&path).unwrap(), None);
        write(&path, &7_u64).unwrap();
        reserve(&path).unwrap();
        assert_eq!(read::<u64>(&path).unwrap(), Some(7));
    }
}
