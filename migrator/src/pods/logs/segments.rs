//! The files of a pod's log, and how they are rotated.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::record::{self, Offsets, Record};

const PREFIX: &str = "log.";

#[derive(Debug)]
struct Segment {
    start: u64,
    len: u64,
    path: PathBuf,
    file: Arc<File>,
}

/// Newest last; never empty once opened.
#[derive(Debug)]
pub(super) struct Segments {
    dir: PathBuf,
    /// A segment is closed beyond this size; two are kept.
    segment_limit: u64,
    list: Vec<Segment>,
}

/// A part of one segment, to be read without any lock.
#[derive(Debug)]
pub(super) struct Span {
    file: Option<Arc<File>>,
    at: u64,
    position: u64,
    len: u64,
    /// Where the segment ends for now.
    segment_end: u64,
}

impl Segments {
    pub(super) fn open(dir: &Path, limit: u64, seen: &mut dyn FnMut(Record)) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let mut starts = Vec::new();
        for entry in fs::read_dir(dir)? {
            let name = entry?.file_name();
            let start = name
                .to_str()
                .and_then(|n| n.strip_prefix(PREFIX))
                .and_then(|n| n.parse::<u64>().ok());
            starts.extend(start);
        }
        starts.sort_unstable();
        let mut segments = Self {
            dir: dir.to_owned(),
            segment_limit: (limit / 2).max(1 << 12),
            list: Vec::new(),
        };
        for start in starts {
            let path = segments.path(start);
            let bytes = fs::read(&path)?;
            let mut good = 0;
            while let Some((record, length)) = bytes.get(good..).and_then(record::decode) {
                seen(record);
                good += length;
            }
            let file = OpenOptions::new().read(true).append(true).open(&path)?;
            if good < bytes.len() {
                file.set_len(good as u64)?;
            }
            segments.list.push(Segment {
                start,
                len: good as u64,
                path,
                file: Arc::new(file),
            });
        }
        if segments.list.is_empty() {
            segments.add(0)?;
        }
        Ok(segments)
    }

    fn path(&self, start: u64) -> PathBuf {
        self.dir.join(format!("{PREFIX}{start:020}"))
    }

    fn add(&mut self, start: u64) -> io::Result<()> {
        let path = self.path(start);
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(&path)?;
        self.list.push(Segment {
            start,
            len: file.metadata()?.len(),
            path,
            file: Arc::new(file),
        });
        Ok(())
    }

    pub(super) fn start(&self) -> u64 {
        self.list.first().map_or(0, |s| s.start)
    }

    pub(super) fn end(&self) -> u64 {
        self.list.last().map_or(0, |s| s.start + s.len)
    }

    /// Adds a record; opens a new segment first if the newest is full. `offsets`: those before it.
    pub(super) fn append(&mut self, record: &Record, offsets: &Offsets) -> io::Result<()> {
        if self.is_full(0) {
            self.rotate(offsets)?;
        }
        let mut bytes = Vec::new();
        record::encode(record, &mut bytes);
        self.write(&bytes)
    }

    /// Adds records as [`append`](Self::append) would, in one write for each segment: a pod that comes waits for its log. `offsets` become those
    /// after what was written.
    pub(super) fn append_all(
        &mut self,
        records: &[Record],
        offsets: &mut Offsets,
    ) -> io::Result<()> {
        let mut bytes = Vec::new();
        let mut after = offsets.clone();
        for record in records {
            if self.is_full(bytes.len()) {
                self.write(&std::mem::take(&mut bytes))?;
                offsets.clone_from(&after);
                self.rotate(offsets)?;
            }
            record::encode(record, &mut bytes);
            super::note(&mut after, record);
        }
        self.write(&bytes)?;
        *offsets = after;
        Ok(())
    }

    /// Whether the newest segment is, once it has so many bytes more.
    fn is_full(&self, more: usize) -> bool {
        let newest = self.list.last();
        newest.is_none_or(|segment| segment.len + more as u64 >= self.segment_limit)
    }

    /// Opens a new segment, and removes the oldest.
    fn rotate(&mut self, offsets: &Offsets) -> io::Result<()> {
        self.add(self.end())?;
        while self.list.len() > 2 {
            let old = self.list.remove(0);
            fs::remove_file(&old.path)?;
        }
        let snapshot = Record::Offsets(offsets.clone().into_iter().collect());
        let mut bytes = Vec::new();
        record::encode(&snapshot, &mut bytes);
        self.write(&bytes)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some(newest) = self.list.last_mut() else {
            return Err(io::Error::other("the log has no segment"));
        };
        if let Err(error) = (&*newest.file).write_all(bytes) {
            // A full disk may have taken a part: what follows must not hide behind it.
            newest.file.set_len(newest.len)?;
            return Err(error);
        }
        newest.len += bytes.len() as u64;
        Ok(())
    }

    /// What to read for `from`: whole records, unless one alone is beyond the budget.
    pub(super) fn span(&self, from: u64, budget: u64) -> io::Result<Span> {
        let from = from.max(self.start());
        let segment = self
            .list
            .iter()
            .rev()
            .find(|s| s.start <= from)
            .filter(|s| from < s.start + s.len);
        Ok(match segment {
            Some(s) => Span {
                file: Some(Arc::clone(&s.file)),
                at: from - s.start,
                position: from,
                len: (s.start + s.len - from).min(budget.max(1 << 19)),
                segment_end: s.start + s.len,
            },
            None => Span {
                file: None,
                at: 0,
                position: from,
                len: 0,
                segment_end: from,
            },
        })
    }
}

impl Span {
    /// The records, and the position after them.
    pub(super) fn read(self) -> io::Result<(Vec<Record>, u64)> {
        let Some(file) = self.file else {
            return Ok((Vec::new(), self.position));
        };
        let mut bytes = vec![0; usize::try_from(self.len).unwrap_or(usize::MAX)];
        file.read_exact_at(&mut bytes, self.at)?;
        let mut records = Vec::new();
        let mut used = 0;
        while let Some((record, length)) = bytes.get(used..).and_then(record::decode) {
            records.push(record);
            used += length;
        }
        if used == 0 {
            // Damaged on disk: skip to where the next segment starts rather than stand here for ever.
            return Ok((records, self.segment_end));
        }
        Ok((records, self.position + used as u64))
    }
}
