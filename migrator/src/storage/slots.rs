//! A record in a file that is written in place: NFS keeps a file's content coherent for whoever locks it, and not its name in a folder.
//!
//! Two slots of [`SLOT`] bytes, each a line: sixteen hexadecimal digits of the hash of what follows, then JSON with a number that grows.
//! The older slot is overwritten: so a crash in the middle of a write leaves the newer one.

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use super::holder::Record;

/// Bytes of a slot: no device writes less.
pub(super) const SLOT: usize = 512;

#[derive(Serialize, Deserialize)]
struct Content {
    number: u64,
    record: Record,
}

/// The record in force, and its number; that of a file that was never written is the first.
pub(super) fn read(bytes: &[u8]) -> (u64, Record) {
    let slots = bytes.chunks(SLOT).filter_map(decode);
    let newest = slots.max_by_key(|content| content.number);
    newest.map_or_else(Default::default, |content| (content.number, content.record))
}

/// Where the record that follows number `last` goes, and its bytes.
///
/// # Errors
/// It does not fit: names are too long.
pub(super) fn write(last: u64, record: &Record) -> Result<(u64, Vec<u8>), String> {
    let number = last + 1;
    let content = Content {
        number,
        record: record.clone(),
    };
    let json = serde_json::to_string(&content).map_err(|error| error.to_string())?;
    let mut slot = format!("{:016x} {json}\n", XxHash3_64::oneshot(json.as_bytes())).into_bytes();
    if slot.len() > SLOT {
        return Err(format!("a record of {} bytes does not fit", slot.len()));
    }
    slot.resize(SLOT, b' ');
    Ok((number % 2 * SLOT as u64, slot))
}

fn decode(slot: &[u8]) -> Option<Content> {
    let text = std::str::from_utf8(slot).ok()?;
    let (line, _) = text.split_once('\n')?;
    let (hash, json) = line.split_once(' ')?;
    let right = u64::from_str_radix(hash, 16).ok()? == XxHash3_64::oneshot(json.as_bytes());
    right.then(|| serde_json::from_str(json).ok())?
}

#[cfg(test)]
mod tests {
    use vm_runtime::units::Epoch;

    use super::super::holder::Holder;
    use super::*;

    fn record(epoch: u64) -> Record {
        Record {
            holder: Some(Holder {
                node: "a".to_owned(),
                pod: "db".to_owned(),
                epoch: Epoch(epoch),
            }),
            ..Record::default()
        }
    }

    fn put(file: &mut Vec<u8>, (offset, slot): (u64, Vec<u8>)) {
        let offset = offset as usize;
        file.resize(file.len().max(offset + slot.len()), 0);
        file[offset..offset + slot.len()].copy_from_slice(&slot);
    }

    #[test]
    fn the_newest_whole_record_counts() {
        let mut file = Vec::new();
        assert_eq!(read(&file), (0, Record::default()));
        for epoch in 1..5 {
            put(&mut file, write(epoch - 1, &record(epoch)).unwrap());
            assert_eq!(read(&file), (epoch, record(epoch)));
        }
        // A crash at each byte of the next write leaves the last one, or has the next.
        let (offset, slot) = write(4, &record(5)).unwrap();
        for cut in 0..=SLOT {
            let mut half = file.clone();
            half[offset as usize..offset as usize + cut].copy_from_slice(&slot[..cut]);
            let (number, found) = read(&half);
            assert!(found == record(number) && number >= 4, "{cut}: {number}");
        }
    }

    #[test]
    fn the_longest_names_fit() {
        let long = Holder {
            node: "n".repeat(63),
            pod: "p".repeat(63),
            epoch: Epoch(u64::MAX),
        };
        let record = Record {
            holder: Some(long.clone()),
            barred: Some(long),
            ephemeral: true,
        };
        let (_, slot) = write(u64::MAX - 1, &record).unwrap();
        assert_eq!(read(&slot), (u64::MAX, record));
    }
}
