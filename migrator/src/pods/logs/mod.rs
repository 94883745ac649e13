//! What the containers of a pod printed: a bounded, append-only log that moves with the pod.
//!
//! Every container's stdout and stderr is a byte stream of its own, and the guest names the offset
//! of each piece that it sends. A piece that was stored already (sent again after a reconnect or a
//! move) is cut or dropped, so nothing is doubled; a hole is recorded as such.
//!
//! On disk: segments named by the absolute position of their first byte, each a sequence of records
//! (see [`record`]), each segment starting with the streams' offsets, so that an old segment
//! can be dropped without forgetting where the streams stand.

mod record;
mod segments;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

pub use record::{Entry, LogStream};
use record::{Offsets, Record};
use segments::Segments;

/// Which stream of which container.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct StreamKey {
    /// The container's name.
    pub container: String,
    /// Its stdout or stderr.
    pub stream: LogStream,
}

/// An absolute position in a pod's log. Only positions that [`LogStore`] gave out mean something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cursor(u64);

/// A pod's log.
#[derive(Debug)]
pub struct LogStore {
    inner: Mutex<Inner>,
    end: watch::Sender<u64>,
}

#[derive(Debug)]
struct Inner {
    segments: Segments,
    offsets: Offsets,
}

/// A blob from a peer that is not a log's tail.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// Not the shape that [`LogStore::tail`] makes.
    #[error("the log that came with the pod is not readable: {0}")]
    Malformed(&'static str),
    /// It cannot be stored.
    #[error("cannot store the log that came with the pod")]
    Io(#[from] io::Error),
}

impl LogStore {
    /// Opens or makes the log in `dir`, which keeps at most about `limit` bytes.
    ///
    /// A record that a killed service left unfinished is cut off.
    ///
    /// # Errors
    /// The folder or its files cannot be made, read or written.
    pub fn open(dir: &Path, limit: u64) -> io::Result<Self> {
        let mut offsets = Offsets::new();
        let segments = Segments::open(dir, limit, &mut |record| note(&mut offsets, &record))?;
        let end = watch::Sender::new(segments.end());
        Ok(Self {
            inner: Mutex::new(Inner { segments, offsets }),
            end,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic elsewhere leaves at worst an unfinished record, which readers stop at.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores a piece of a stream that starts at `offset`; returns the offset that is expected next,
    /// which is what the guest may forget everything before.
    ///
    /// # Errors
    /// The disk: nothing was stored, and the piece may be sent again.
    pub fn append(
        &self,
        key: &StreamKey,
        offset: u64,
        data: &[u8],
        unix_ms: u64,
    ) -> io::Result<u64> {
        let mut inner = self.lock();
        let next = inner.offsets.get(key).copied().unwrap_or(0);
        let end = offset.saturating_add(data.len() as u64);
        if end <= next {
            return Ok(next);
        }
        let skip = usize::try_from(next.saturating_sub(offset)).unwrap_or(usize::MAX);
        let fresh = data.get(skip..).unwrap_or_default();
        let mut at = offset.max(next);
        for piece in fresh.chunks(record::MAX_DATA) {
            let record = Record::Entry(Entry {
                key: key.clone(),
                offset: at,
                unix_ms,
                data: piece.to_vec(),
            });
            let Inner { segments, offsets } = &mut *inner;
            segments.append(&record, offsets)?;
            at += piece.len() as u64;
            inner.offsets.insert(key.clone(), at);
        }
        let position = inner.segments.end();
        drop(inner);
        self.end.send_replace(position);
        Ok(at)
    }

    /// For each stream the offset that is expected next.
    pub fn offsets(&self) -> BTreeMap<StreamKey, u64> {
        self.lock().offsets.clone()
    }

    /// The offset that is expected next of one stream.
    pub fn next_offset(&self, key: &StreamKey) -> u64 {
        self.lock().offsets.get(key).copied().unwrap_or(0)
    }

    /// The oldest position that is still kept.
    pub fn start(&self) -> Cursor {
        Cursor(self.lock().segments.start())
    }

    /// Up to about `budget` bytes of entries from `from` on, and where the next call goes on.
    /// No entries means that the end was reached: wait for [`LogStore::watch`] to change.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn read(&self, from: Cursor, budget: u64) -> io::Result<(Vec<Entry>, Cursor)> {
        let span = self.lock().segments.span(from.0, budget)?;
        // The lock is free while the bytes are read: a slow reader never holds up the guest.
        let (records, next) = span.read()?;
        let entries = records
            .into_iter()
            .filter_map(|record| match record {
                Record::Entry(entry) => Some(entry),
                Record::Offsets(_) => None,
            })
            .collect();
        Ok((entries, Cursor(next)))
    }

    /// Every entry that is kept, oldest first, up to now.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn read_all(&self) -> io::Result<(Vec<Entry>, Cursor)> {
        let mut all = Vec::new();
        let mut at = self.start();
        loop {
            let (entries, next) = self.read(at, 1 << 20)?;
            if next == at {
                return Ok((all, at));
            }
            all.extend(entries);
            at = next;
        }
    }

    /// Changes whenever something was stored.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.end.subscribe()
    }

    /// The streams' offsets and the newest entries, at most about `bytes` of them: what a pod takes
    /// along when it moves.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn tail(&self, bytes: u64) -> io::Result<Vec<u8>> {
        let (entries, _) = self.read_all()?;
        let mut room = bytes;
        let mut first = entries.len();
        while let Some(entry) = first.checked_sub(1).and_then(|i| entries.get(i)) {
            let size = entry.data.len() as u64;
            if size > room {
                break;
            }
            room -= size;
            first -= 1;
        }
        let mut blob = Vec::new();
        record::encode(
            &Record::Offsets(self.offsets().into_iter().collect()),
            &mut blob,
        );
        for entry in entries.into_iter().skip(first) {
            record::encode(&Record::Entry(entry), &mut blob);
        }
        Ok(blob)
    }

    /// Takes over what [`LogStore::tail`] gave on another node. The bytes come from a peer: they are
    /// checked whole before any is stored. Streams that this log already has further stay as they are.
    ///
    /// # Errors
    /// See [`InstallError`].
    pub fn install(&self, blob: &[u8]) -> Result<(), InstallError> {
        let records = record::decode_all(blob).map_err(InstallError::Malformed)?;
        let mut records = records.into_iter();
        let Some(Record::Offsets(listed)) = records.next() else {
            return Err(InstallError::Malformed("it does not start with offsets"));
        };
        let mut inner = self.lock();
        let mut after = inner.offsets.clone();
        let mut fresh = Vec::new();
        for record in records {
            let Record::Entry(entry) = &record else {
                return Err(InstallError::Malformed("it has offsets in the middle"));
            };
            let known = after.get(&entry.key).copied().unwrap_or(0);
            if entry.offset < known {
                continue;
            }
            note(&mut after, &record);
            fresh.push(record);
        }
        note(&mut after, &Record::Offsets(listed));
        fresh.push(Record::Offsets(after.into_iter().collect()));
        let Inner { segments, offsets } = &mut *inner;
        segments.append_all(&fresh, offsets)?;
        let position = inner.segments.end();
        drop(inner);
        self.end.send_replace(position);
        Ok(())
    }
}

fn note(offsets: &mut Offsets, record: &Record) {
    match record {
        Record::Entry(entry) => {
            let next = offsets.entry(entry.key.clone()).or_insert(0);
            *next = (*next).max(entry.offset.saturating_add(entry.data.len() as u64));
        }
        Record::Offsets(listed) => {
            for (key, offset) in listed {
                let next = offsets.entry(key.clone()).or_insert(0);
                *next = (*next).max(*offset);
            }
        }
    }
}

#[cfg(test)]
mod tests;
