//! `--verify`: compares every page of the frozen source with the destination's, by hash.
//!
//! The source hashes all of its RAM file after the VM has stopped. The destination's guest does not run
//! yet, so its file changes only where a page is placed: it hashes early, marks what is placed later as
//! stale, and at the end hashes the stale pages alone. What is hashed is always read back from the file,
//! never the bytes that came over the wire.

use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use vm_runtime::memory::{GuestMemory, PageReader, is_zero, page_hash};
use vm_runtime::units::{PAGE_SIZE, PageIndex, PageRange};

use super::shard::split;

/// The hash that stands for a page of zeros, and for a hole.
pub const ZERO_HASH: u64 = 0;

/// One hash a page of guest RAM.
#[derive(Debug)]
pub struct PageHashes {
    hashes: Vec<AtomicU64>,
    /// One bit a page: placed since it was last hashed.
    stale: Vec<AtomicU64>,
    /// Held while marks are turned into hashes: whoever sees no marks must see the hashes.
    refreshing: Mutex<()>,
}

impl PageHashes {
    /// A table for `pages` pages that are all zero, as those of a new RAM file are.
    pub fn new(pages: u64) -> Self {
        let zeros = |n: u64| (0..n).map(|_| AtomicU64::new(ZERO_HASH)).collect();
        Self {
            hashes: zeros(pages),
            stale: zeros(pages.div_ceil(64)),
            refreshing: Mutex::new(()),
        }
    }

    /// Marks pages as placed. Call it after the write: a hash that is being computed at the same time
    /// cleared the mark before it read, so the mark outlives it.
    pub fn mark(&self, range: PageRange) {
        for page in range.start.0..range.end.0 {
            self.stale[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::SeqCst);
        }
    }

    /// Hashes the stale pages of `memory`, and returns how many there were. Safe beside [`Self::mark`].
    ///
    /// # Errors
    /// When the RAM file cannot be read.
    pub fn refresh(&self, memory: &GuestMemory) -> io::Result<u64> {
        let _one = self
            .refreshing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut count = 0;
        let mut page_bytes = vec![0u8; PAGE_SIZE];
        for (word, stale) in self.stale.iter().enumerate() {
            let mut bits = stale.swap(0, Ordering::SeqCst);
            while bits != 0 {
                let page = word as u64 * 64 + u64::from(bits.trailing_zeros());
                bits &= bits - 1;
                memory.read(PageIndex(page), &mut page_bytes)?;
                self.hashes[page as usize].store(hash(&page_bytes), Ordering::SeqCst);
                count += 1;
            }
        }
        Ok(count)
    }

    /// Like [`Self::refresh`], and also looks at data pages that nobody said were placed: whatever else
    /// wrote to the file (a VMM that sets up its firmware, say) shows too.
    ///
    /// # Errors
    /// When the RAM file cannot be read.
    pub fn finish(&self, memory: &GuestMemory) -> io::Result<()> {
        for range in memory.data_ranges()? {
            for page in range.start.0..range.end.0 {
                if self.hashes[page as usize].load(Ordering::SeqCst) == ZERO_HASH {
                    self.mark(PageRange::new(page, page + 1));
                }
            }
        }
        self.refresh(memory).map(drop)
    }

    /// Whether the page was all zero when it was last hashed.
    pub fn is_zero(&self, page: PageIndex) -> bool {
        let hash = self.hashes.get(page.0 as usize);
        hash.is_some_and(|hash| hash.load(Ordering::SeqCst) == ZERO_HASH)
    }

    /// Compares `theirs`, the hashes of the pages from `first` on, and returns the pages that differ.
    /// Pages beyond the end of this table count as different.
    pub fn compare(&self, first: PageIndex, theirs: &[u64]) -> Vec<PageIndex> {
        theirs
            .iter()
            .zip(first.0..)
            .filter(|(hash, page)| {
                self.hashes
                    .get(*page as usize)
                    .is_none_or(|ours| ours.load(Ordering::SeqCst) != **hash)
            })
            .map(|(_, page)| PageIndex(page))
            .collect()
    }
}

/// Hashes every page of a frozen guest's RAM, on `threads` threads. Holes are not read.
///
/// # Errors
/// When the RAM file cannot be read.
pub fn hash_all(reader: &PageReader, threads: usize) -> io::Result<Vec<u64>> {
    let memory = reader.memory();
    let hashes: Vec<_> = (0..memory.pages())
        .map(|_| AtomicU64::new(ZERO_HASH))
        .collect();
    let pieces = split(&memory.data_ranges()?, 1).concat();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut content = [0; PAGE_SIZE];
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            for page in piece.start.0..piece.end.0 {
                let zero = reader.copy(PageIndex(page), &mut content)?;
                let hash = if zero { ZERO_HASH } else { page_hash(&content) };
                hashes[page as usize].store(hash, Ordering::Relaxed);
            }
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| {
            worker
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("a hashing thread panicked")))
        })
    })?;
    Ok(hashes.into_iter().map(AtomicU64::into_inner).collect())
}

/// The hash that stands for a page's content in [`PageHashes`].
pub(super) fn hash(page: &[u8]) -> u64 {
    if is_zero(page) {
        ZERO_HASH
    } else {
        page_hash(page)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_runtime::units::Bytes;

    use super::*;

    fn memory() -> Arc<GuestMemory> {
        Arc::new(GuestMemory::create("verify-test", Bytes::mib(4)).expect("memfd"))
    }

    #[test]
    fn equal_memories_compare_equal_and_one_changed_byte_is_found() {
        let (source, destination) = (memory(), memory());
        let table = PageHashes::new(destination.pages());
        for page in [0, 3, 255, 256, 1023] {
            let content = vec![page as u8 | 1; PAGE_SIZE];
            source.write(PageIndex(page), &content).expect("write");
            destination.write(PageIndex(page), &content).expect("write");
            table.mark(PageRange::new(page, page + 1));
        }
        assert_eq!(table.refresh(&destination).expect("refresh"), 5);
        let theirs = hash_all(&PageReader::new(&source), 2).expect("hash");
        assert_eq!(table.compare(PageIndex(0), &theirs), []);

        destination
            .write(PageIndex(255), &[9; PAGE_SIZE])
            .expect("write");
        table.mark(PageRange::new(255, 256));
        table.refresh(&destination).expect("refresh");
        assert_eq!(table.compare(PageIndex(0), &theirs), [PageIndex(255)]);
    }

    #[test]
    fn a_page_that_only_one_side_has_is_found() {
        let (source, destination) = (memory(), memory());
        let table = PageHashes::new(destination.pages());
        source.write(PageIndex(7), &[1; PAGE_SIZE]).expect("write");
        let theirs = hash_all(&PageReader::new(&source), 1).expect("hash");
        assert_eq!(table.compare(PageIndex(0), &theirs), [PageIndex(7)]);
    }
}
