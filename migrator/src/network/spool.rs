//! The source's log in a file, for the service that comes after one that was killed: frames read out of the
//! park are in no queue of the kernel any more. A crash of the whole machine ends the guest as well, so the page cache is
//! enough: nothing is synced. The service mounts a tmpfs for it, so that no disk holds packets up.
//!
//! The file lives from the beginning of a hold until the pod has its frames back, or is gone from this node:
//!
//! ```text
//!   file    "mspool1\n" record*
//!   record  length u32 | crc32 (IEEE) of the body u32 | body, `length` bytes          all little endian
//!   body    kind u8 | bucket u16, 0xffff: none | seq u64 | frame, the rest
//!   kind    0 residue, 1 frame, 2 end of the residue, 3 end
//! ```
//!
//! Records are appended before their items go anywhere else; the first one that is torn ends the file. Which of them
//! were injected or acknowledged since is not in the file but in a pinned word: the highest such number. A frame record
//! without a frame only tells that its number was given out.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use nix::errno::Errno;
use nix::sys::uio::pwritev;

use super::log::{LogItem, LogKind};
use super::sys::FRAME_MAX;

const MAGIC: &[u8] = b"mspool1\n";
/// Length and checksum.
const HEADER: usize = 8;
/// What a body has before its frame.
const FIXED: usize = 11;
const NO_BUCKET: u16 = u16::MAX;
/// The file is not worth shortening below this.
const SHORT: u64 = 1 << 20;
/// Two buffers each; the kernel takes 1024 (`UIO_MAXIOV` in linux/uio.h).
const RECORDS_AT_A_TIME: usize = 512;

/// An item of the log, and the bucket that waits for it.
pub(crate) type Record = (LogItem, Option<u8>);

/// All of a record but its frame.
type Head = [u8; HEADER + FIXED];

fn head(item: &LogItem, bucket: Option<u8>) -> Head {
    let kind: u8 = match item.kind {
        LogKind::Residue => 0,
        LogKind::Frame => 1,
        LogKind::ResidueEnd => 2,
        LogKind::End => 3,
    };
    let mut head = [0; HEADER + FIXED];
    let (lead, body) = head.split_at_mut(HEADER);
    body[0] = kind;
    body[1..3].copy_from_slice(&bucket.map_or(NO_BUCKET, u16::from).to_le_bytes());
    body[3..].copy_from_slice(&item.seq.to_le_bytes());
    let mut crc = crc32fast::Hasher::new();
    crc.update(body);
    crc.update(&item.frame);
    lead[..4].copy_from_slice(&((FIXED + item.frame.len()) as u32).to_le_bytes());
    lead[4..].copy_from_slice(&crc.finalize().to_le_bytes());
    head
}

fn encode(into: &mut Vec<u8>, item: &LogItem, bucket: Option<u8>) {
    into.extend(head(item, bucket));
    into.extend_from_slice(&item.frame);
}

/// Writes records from `at` on, out of the buffers that they are in: a frame may have 64 KB. Returns their length.
fn append(file: &File, at: u64, records: &[(Head, Bytes)]) -> io::Result<u64> {
    let mut length = 0;
    for records in records.chunks(RECORDS_AT_A_TIME) {
        let parts = records.iter().flat_map(|(head, frame)| [&head[..], frame]);
        let mut slices: Vec<IoSlice<'_>> = parts.map(IoSlice::new).collect();
        let mut slices = slices.as_mut_slice();
        while !slices.is_empty() {
            let to = i64::try_from(at + length).map_err(io::Error::other)?;
            match pwritev(file, slices, to) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    length += written as u64;
                    IoSlice::advance_slices(&mut slices, written);
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
    Ok(length)
}

/// The record that `bytes` begin with, and its length. `None`: torn, or of another version.
fn decode(bytes: &Bytes) -> Option<(Record, usize)> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (crc, rest) = rest.split_first_chunk::<4>()?;
    let length = u32::from_le_bytes(*length) as usize;
    if !(FIXED..=FIXED + FRAME_MAX).contains(&length) {
        return None;
    }
    let body = rest.get(..length)?;
    if crc32fast::hash(body) != u32::from_le_bytes(*crc) {
        return None;
    }
    let (kind, rest) = body.split_first()?;
    let (bucket, rest) = rest.split_first_chunk::<2>()?;
    let (seq, _) = rest.split_first_chunk::<8>()?;
    let kind = match kind {
        0 => LogKind::Residue,
        1 => LogKind::Frame,
        2 => LogKind::ResidueEnd,
        3 => LogKind::End,
        _ => return None,
    };
    let bucket = match u16::from_le_bytes(*bucket) {
        NO_BUCKET => None,
        bucket => Some(u8::try_from(bucket).ok()?),
    };
    let item = LogItem {
        seq: u64::from_le_bytes(*seq),
        kind,
        frame: bytes.slice(HEADER + FIXED..HEADER + length),
    };
    Some(((item, bucket), HEADER + length))
}

/// The records of a file up to the first torn one, and how many bytes are whole.
fn decode_all(file: &Bytes) -> (Vec<Record>, usize) {
    let mut records = Vec::new();
    if !file.starts_with(MAGIC) {
        return (records, 0);
    }
    let mut at = MAGIC.len();
    while let Some((record, length)) = decode(&file.slice(at..)) {
        records.push(record);
        at += length;
    }
    (records, at)
}

/// The file of one slot. Without it everything works as long as the service lives: so what goes wrong with it is a
/// warning, and the rest of the hold is in memory only.
#[derive(Debug)]
pub(crate) struct Spool {
    path: PathBuf,
    /// None: nothing is kept.
    file: Option<File>,
    length: u64,
    batch: Vec<(Head, Bytes)>,
}

impl Spool {
    /// The spool of a slot, in folder `dir`. Touches nothing.
    pub(crate) fn new(dir: &Path, slot: u16) -> Self {
        Self {
            path: dir.join(slot.to_string()),
            file: None,
            length: 0,
            batch: Vec::new(),
        }
    }

    /// Begins anew, over whatever is there. False: nothing will be kept, and what is in the file counts for nothing.
    pub(crate) fn begin(&mut self) -> bool {
        self.batch.clear();
        match self.create() {
            Ok(file) => {
                self.file = Some(file);
                self.length = MAGIC.len() as u64;
                true
            }
            Err(error) => {
                self.give_up(&error);
                false
            }
        }
    }

    fn create(&self) -> io::Result<File> {
        if let Some(dir) = self.path.parent() {
            DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        }
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&self.path)?;
        file.write_all_at(MAGIC, 0)?;
        Ok(file)
    }

    fn give_up(&mut self, error: &io::Error) {
        self.file = None;
        self.batch = Vec::new();
        let path = self.path.display();
        tracing::warn!(%path, %error, "parked packets are in memory only: they are lost if this service is killed");
    }

    /// What a former service has left; goes on behind it. `None`: nothing, and nothing will be kept.
    pub(crate) fn restore(&mut self) -> Option<Vec<Record>> {
        let result = self.open_again();
        match result {
            Ok(records) => Some(records),
            Err(error) => {
                self.give_up(&error);
                None
            }
        }
    }

    fn open_again(&mut self) -> io::Result<Vec<Record>> {
        let file = OpenOptions::new().write(true).open(&self.path)?;
        let bytes = Bytes::from(std::fs::read(&self.path)?);
        let (records, whole) = decode_all(&bytes);
        if whole < bytes.len() {
            tracing::warn!(path = %self.path.display(), bytes = bytes.len() - whole, "the last record is torn");
        }
        // What follows would be read as a part of this file once others are before it.
        file.set_len(whole as u64)?;
        if whole == 0 {
            file.write_all_at(MAGIC, 0)?;
        }
        self.length = whole.max(MAGIC.len()) as u64;
        self.file = Some(file);
        Ok(records)
    }

    /// Adds an item to the batch.
    pub(crate) fn push(&mut self, item: &LogItem, bucket: Option<u8>) {
        if self.file.is_some() {
            self.batch.push((head(item, bucket), item.frame.clone()));
        }
    }

    /// Appends the batch.
    pub(crate) fn write(&mut self) {
        let Some(file) = &self.file else { return };
        if self.batch.is_empty() {
            return;
        }
        match append(file, self.length, &self.batch) {
            Ok(length) => self.length += length,
            Err(error) => {
                self.give_up(&error);
                return;
            }
        }
        self.batch.clear();
    }

    /// Forgets every record, now that their items have all been dealt with, and keeps `marks` instead. A short file
    /// stays as it is.
    pub(crate) fn shorten(&mut self, marks: &[LogItem]) {
        let Some(file) = &self.file else { return };
        if self.length < SHORT {
            return;
        }
        let mut bytes = MAGIC.to_vec();
        for item in marks {
            encode(&mut bytes, item, None);
        }
        // In between, what follows the marks is torn, or a record that was dealt with.
        let length = bytes.len() as u64;
        let result = file
            .write_all_at(&bytes, 0)
            .and_then(|()| file.set_len(length));
        match result {
            Ok(()) => self.length = length,
            Err(error) => self.give_up(&error),
        }
    }

    /// Removes the file.
    pub(crate) fn remove(&mut self) {
        self.file = None;
        self.batch = Vec::new();
        match std::fs::remove_file(&self.path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                // The next hold begins anew, or keeps the file from being read.
                tracing::warn!(path = %self.path.display(), %error, "could not remove the spool");
            }
        }
    }
}

#[cfg(test)]
mod tests;
