//! Guest RAM to a file, and back. Calls block.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use vm_runtime::memory::{GuestMemory, is_zero, page_hash};
use vm_runtime::units::{PAGE_SIZE, PageIndex};

use super::TemplateError;

/// Bytes that are read at a time.
const PIECE: usize = 256 << 10;

/// What was written of a memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Summary {
    /// Pages that are not all zeros.
    pub(super) pages: u64,
    /// Of their numbers and contents.
    pub(super) digest: u64,
}

/// Number and hash of each page so far.
#[derive(Default)]
struct Tally(Vec<u8>);

impl Tally {
    fn page(&mut self, index: u64, content: &[u8]) {
        self.0.extend(index.to_le_bytes());
        self.0.extend(page_hash(content).to_le_bytes());
    }

    fn summary(&self) -> Summary {
        Summary {
            pages: (self.0.len() / 16) as u64,
            digest: page_hash(&self.0),
        }
    }
}

/// Writes what is not zero of `memory` to `file`, which is empty: a page at its place.
///
/// # Errors
/// What the kernel says.
pub(super) fn save(memory: &GuestMemory, file: &File) -> io::Result<Summary> {
    file.set_len(memory.len().0)?;
    let page = PAGE_SIZE as u64;
    let read = |at: u64, buf: &mut [u8]| memory.read(PageIndex(at / page), buf);
    let ranges = memory.data_ranges()?;
    let ranges = ranges.iter().map(|r| (r.start.0 * page, r.end.0 * page));
    copy(ranges, read, |at, bytes| file.write_all_at(bytes, at))
}

/// Fills `memory`, which is all zeros, from what [`save`] wrote.
///
/// # Errors
/// The file is of another size, or its content not what was written.
pub(super) fn load(
    file: &File,
    memory: &GuestMemory,
    wanted: Summary,
) -> Result<(), TemplateError> {
    let failed = |source| TemplateError::step("read the memory", source);
    let page = PAGE_SIZE as u64;
    if file.metadata().map_err(failed)?.len() != memory.len().0 {
        return Err(TemplateError::Damaged("memory"));
    }
    let ranges = data_ranges(file, memory.len().0).map_err(failed)?;
    let read = |at: u64, buf: &mut [u8]| file.read_exact_at(buf, at);
    let write = |at: u64, bytes: &[u8]| memory.write(PageIndex(at / page), bytes);
    let found = copy(ranges.into_iter(), read, write).map_err(failed)?;
    match found == wanted {
        true => Ok(()),
        false => Err(TemplateError::Damaged("memory")),
    }
}

/// Copies the pages of `ranges` (bytes, whole pages) that are not zero, in runs.
fn copy(
    ranges: impl Iterator<Item = (u64, u64)>,
    read: impl Fn(u64, &mut [u8]) -> io::Result<()>,
    write: impl Fn(u64, &[u8]) -> io::Result<()>,
) -> io::Result<Summary> {
    let mut tally = Tally::default();
    let mut buffer = vec![0; PIECE];
    for (start, end) in ranges {
        let mut at = start;
        while at < end {
            let length = (end - at).min(PIECE as u64) as usize;
            let piece = &mut buffer[..length];
            read(at, piece)?;
            let mut run = 0..0;
            for (number, content) in piece.chunks_exact(PAGE_SIZE).enumerate() {
                let from = number * PAGE_SIZE;
                if is_zero(content) {
                    continue;
                }
                tally.page(at / PAGE_SIZE as u64 + number as u64, content);
                if run.end != from {
                    write_run(&write, at, &piece[run.clone()], run.start)?;
                    run = from..from;
                }
                run.end = from + PAGE_SIZE;
            }
            write_run(&write, at, &piece[run.clone()], run.start)?;
            at += length as u64;
        }
    }
    Ok(tally.summary())
}

fn write_run(
    write: impl Fn(u64, &[u8]) -> io::Result<()>,
    piece: u64,
    bytes: &[u8],
    from: usize,
) -> io::Result<()> {
    match bytes {
        [] => Ok(()),
        bytes => write(piece + from as u64, bytes),
    }
}

/// Where the file holds data, widened to whole pages. A file system without holes says: everywhere.
fn data_ranges(file: &File, len: u64) -> io::Result<Vec<(u64, u64)>> {
    let page = PAGE_SIZE as u64;
    let seek = |at: u64, whence| {
        let at = i64::try_from(at).map_err(io::Error::other)?;
        match lseek(file.as_fd(), at, whence) {
            Ok(found) => Ok(Some(found as u64)),
            // Nothing behind this offset, lseek(2).
            Err(Errno::ENXIO) => Ok(None),
            Err(errno) => Err(io::Error::from(errno)),
        }
    };
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    let mut at = 0;
    while at < len {
        let Some(start) = seek(at, Whence::SeekData)? else {
            break;
        };
        let end = seek(start, Whence::SeekHole)?.unwrap_or(len);
        let start = start / page * page;
        let end = end.max(start + 1).next_multiple_of(page).min(len);
        match ranges.last_mut() {
            Some(last) if last.1 >= start => last.1 = end,
            Some(_) | None => ranges.push((start, end)),
        }
        at = end;
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use vm_runtime::units::Bytes;

    use super::*;

    const PAGES: u64 = 1024;

    fn memory() -> GuestMemory {
        GuestMemory::create("template-test", Bytes(PAGES * PAGE_SIZE as u64)).unwrap()
    }

    fn filled() -> GuestMemory {
        let memory = memory();
        for (page, byte) in [(0, 1), (5, 2), (6, 0), (7, 3), (PAGES - 1, 4)] {
            memory.write(PageIndex(page), &[byte; PAGE_SIZE]).unwrap();
        }
        memory
    }

    fn content(memory: &GuestMemory) -> Vec<u8> {
        let mut all = vec![0; memory.len().0 as usize];
        memory.read(PageIndex(0), &mut all).unwrap();
        all
    }

    #[test]
    fn a_memory_comes_back_as_it_was_and_what_is_zero_is_kept_nowhere() {
        let (from, to) = (filled(), memory());
        let file = tempfile::tempfile().unwrap();
        let saved = save(&from, &file).unwrap();
        assert_eq!(saved.pages, 4);
        assert!(file.metadata().unwrap().blocks() * 512 <= 64 << 10);
        load(&file, &to, saved).unwrap();
        assert_eq!(content(&to), content(&from));
        assert_eq!(to.allocated_pages().unwrap(), 4);
    }

    #[test]
    fn a_file_that_has_lost_its_holes_is_as_good() {
        let (from, to) = (filled(), memory());
        let sparse = tempfile::tempfile().unwrap();
        let saved = save(&from, &sparse).unwrap();
        let full = tempfile::tempfile().unwrap();
        full.write_all_at(&content(&from), 0).unwrap();
        load(&full, &to, saved).unwrap();
        assert_eq!(content(&to), content(&from));
        assert_eq!(to.allocated_pages().unwrap(), 4);
    }

    #[test]
    fn a_bit_anywhere_a_page_too_many_and_a_cut_are_all_seen() {
        let from = filled();
        let damage = |damage: &dyn Fn(&File)| {
            let file = tempfile::tempfile().unwrap();
            let saved = save(&from, &file).unwrap();
            damage(&file);
            let loaded = load(&file, &memory(), saved);
            assert!(matches!(loaded, Err(TemplateError::Damaged("memory"))));
        };
        let page = PAGE_SIZE as u64;
        damage(&|file| file.write_all_at(&[0x83], 7 * page + 9).unwrap());
        damage(&|file| file.write_all_at(&[1], 600 * page).unwrap());
        damage(&|file| file.write_all_at(&[0; PAGE_SIZE], 5 * page).unwrap());
        damage(&|file| file.set_len((PAGES - 1) * page).unwrap());
    }
}
