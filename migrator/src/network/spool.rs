//! The source's log in a file, for the service that comes after one that was killed: frames read out of the
//! park are in no queue of the kernel any more. A crash of the whole machine ends the guest as well, so the page cache is
//! enough: nothing is synced.
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
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bytes::Bytes;

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
/// What the buffer of a batch keeps.
const BATCH_BYTES: usize = 1 << 20;

/// An item of the log, and the bucket that waits for it.
pub(crate) type Record = (LogItem, Option<u8>);

fn encode(into: &mut Vec<u8>, item: &LogItem, bucket: Option<u8>) {
    let kind: u8 = match item.kind {
        LogKind::Residue => 0,
        LogKind::Frame => 1,
        LogKind::ResidueEnd => 2,
        LogKind::End => 3,
    };
    let start = into.len();
    into.extend(((FIXED + item.frame.len()) as u32).to_le_bytes());
    into.extend([0; 4]);
    into.push(kind);
    into.extend(bucket.map_or(NO_BUCKET, u16::from).to_le_bytes());
    into.extend(item.seq.to_le_bytes());
    into.extend_from_slice(&item.frame);
    let crc = crc32fast::hash(&into[start + HEADER..]);
    into[start + 4..start + HEADER].copy_from_slice(&crc.to_le_bytes());
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
    batch: Vec<u8>,
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
            encode(&mut self.batch, item, bucket);
        }
    }

    /// Appends the batch, with one system call.
    pub(crate) fn write(&mut self) {
        let Some(file) = &self.file else { return };
        if self.batch.is_empty() {
            return;
        }
        if let Err(error) = file.write_all_at(&self.batch, self.length) {
            self.give_up(&error);
            return;
        }
        self.length += self.batch.len() as u64;
        self.batch.clear();
        self.batch.shrink_to(BATCH_BYTES);
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
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::network::log::FIRST_FRAME_SEQ;

    fn item(kind: LogKind, seq: u64, len: usize) -> LogItem {
        LogItem {
            seq,
            kind,
            frame: Bytes::from(vec![seq as u8; len]),
        }
    }

    fn records() -> Vec<Record> {
        vec![
            (item(LogKind::Frame, FIRST_FRAME_SEQ, 24), Some(255)),
            (item(LogKind::Residue, 1, FRAME_MAX), None),
            (item(LogKind::Residue, 2, 60), Some(0)),
            (item(LogKind::ResidueEnd, 3, 0), None),
            (item(LogKind::End, FIRST_FRAME_SEQ + 1, 0), None),
        ]
    }

    fn filled(dir: &Path) -> Spool {
        let mut spool = Spool::new(&dir.join("spool"), 7);
        assert!(spool.begin());
        for (item, bucket) in records() {
            spool.push(&item, bucket);
            spool.write();
        }
        spool
    }

    #[test]
    fn what_was_written_comes_back_and_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = filled(dir.path()).path;
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let mut next = Spool::new(&dir.path().join("spool"), 7);
        assert_eq!(next.restore(), Some(records()));
        let late = (item(LogKind::Frame, FIRST_FRAME_SEQ + 2, 90), Some(4));
        next.push(&late.0, late.1);
        next.write();
        let mut last = Spool::new(&dir.path().join("spool"), 7);
        let all: Vec<_> = records().into_iter().chain([late]).collect();
        assert_eq!(last.restore(), Some(all));
        last.remove();
        assert_eq!(last.restore(), None);
    }

    #[test]
    fn a_torn_file_gives_its_whole_records_and_is_cut_behind_them() {
        let mut whole = MAGIC.to_vec();
        let mut ends = vec![whole.len()];
        for (item, bucket) in records().iter().filter(|(i, _)| i.frame.len() < 100) {
            encode(&mut whole, item, *bucket);
            ends.push(whole.len());
        }
        for cut in 0..whole.len() {
            let (found, at) = decode_all(&Bytes::copy_from_slice(&whole[..cut]));
            let expected = ends.iter().filter(|end| **end <= cut).count();
            assert_eq!(found.len(), expected.saturating_sub(1), "cut at {cut}");
            assert_eq!(at, expected.checked_sub(1).map_or(0, |last| ends[last]));
            let mut flipped = whole.clone();
            flipped[cut] ^= 0x10;
            assert!(decode_all(&Bytes::from(flipped)).0.len() < ends.len() - 1);
        }
        let dir = tempfile::tempdir().unwrap();
        let path = filled(dir.path()).path;
        let length = path.metadata().unwrap().len();
        File::options()
            .write(true)
            .open(&path)
            .and_then(|file| file.set_len(length - 1))
            .unwrap();
        let mut next = Spool::new(path.parent().unwrap(), 7);
        assert_eq!(next.restore().map(|found| found.len()), Some(4));
        next.push(&records()[4].0, None);
        next.write();
        assert_eq!(path.metadata().unwrap().len(), length);
    }

    #[test]
    fn a_long_file_is_shortened_to_its_marks() {
        let dir = tempfile::tempdir().unwrap();
        let mut spool = filled(dir.path());
        let marks = [item(LogKind::Frame, FIRST_FRAME_SEQ + 90, 0)];
        spool.shorten(&marks);
        assert!(spool.length > FRAME_MAX as u64, "short as it is");
        while spool.length < SHORT {
            spool.push(&item(LogKind::Frame, FIRST_FRAME_SEQ + 2, FRAME_MAX), None);
            spool.write();
        }
        spool.shorten(&marks);
        let [mark] = marks;
        assert_eq!(spool.restore(), Some(vec![(mark, None)]));
    }

    #[test]
    fn a_hold_forgets_the_one_before_and_does_without_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut spool = filled(dir.path());
        assert!(spool.begin());
        assert_eq!(spool.restore(), Some(Vec::new()));
        // A full disk.
        spool.file = OpenOptions::new().write(true).open("/dev/full").ok();
        for (item, bucket) in records() {
            spool.push(&item, bucket);
            spool.write();
        }
        assert!(spool.file.is_none() && spool.batch.is_empty());
        assert!(spool.begin(), "the next hold tries again");
        std::fs::write(dir.path().join("file"), "").unwrap();
        assert!(!Spool::new(&dir.path().join("file"), 7).begin());
    }
}
