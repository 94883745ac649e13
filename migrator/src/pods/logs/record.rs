//! Records of a pod's log: `u32` little-endian length, then that many bytes of postcard.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::StreamKey;

/// Longest data of one entry, in bytes.
pub(super) const MAX_DATA: usize = 64 << 10;

/// Longest record: the data, a container's name, the numbers; or the offsets of some thousand streams.
const MAX_RECORD: usize = 256 << 10;

/// A container's output stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A piece of a container's output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Whose.
    pub key: StreamKey,
    /// Offset of the first byte in that stream.
    pub offset: u64,
    /// When it was stored, milliseconds of Unix time.
    pub unix_ms: u64,
    /// The bytes.
    pub data: Vec<u8>,
}

pub(super) type Offsets = BTreeMap<StreamKey, u64>;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Record {
    Entry(Entry),
    Offsets(Vec<(StreamKey, u64)>),
}

pub(super) fn encode(record: &Record, out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    // Writing to a vector has no way to fail; the types hold nothing that postcard refuses.
    if let Ok(body) = postcard::to_stdvec(record) {
        out.extend_from_slice(&body);
    }
    let length = u32::try_from(out.len() - start - 4).unwrap_or(0);
    if let Some(prefix) = out.get_mut(start..start + 4) {
        prefix.copy_from_slice(&length.to_le_bytes());
    }
}

/// The first record of `bytes` and its length with the prefix; `None` if it is unfinished or damaged.
pub(super) fn decode(bytes: &[u8]) -> Option<(Record, usize)> {
    let (prefix, rest) = bytes.split_first_chunk::<4>()?;
    let length = usize::try_from(u32::from_le_bytes(*prefix)).ok()?;
    if length == 0 || length > MAX_RECORD {
        return None;
    }
    let body = rest.get(..length)?;
    let (record, left) = postcard::take_from_bytes::<Record>(body).ok()?;
    left.is_empty().then_some((record, length + 4))
}

/// All records of `bytes`, which must end with the last one.
pub(super) fn decode_all(mut bytes: &[u8]) -> Result<Vec<Record>, &'static str> {
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let (record, length) = decode(bytes).ok_or("a record is cut or damaged")?;
        records.push(record);
        bytes = bytes.get(length..).unwrap_or_default();
    }
    Ok(records)
}
