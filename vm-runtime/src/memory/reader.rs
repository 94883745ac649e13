//! Reading guest RAM page by page, for as long as a migration lasts.

use std::io;
use std::sync::Arc;

use super::{GuestMemory, MemoryView, is_zero};
use crate::units::{PAGE_SIZE, PageIndex, PageRange};

/// Copies pages out of guest RAM: through a mapping, or by `pread` where none can be had. The content is the same.
#[derive(Debug)]
pub struct PageReader {
    memory: Arc<GuestMemory>,
    view: Option<MemoryView>,
}

impl PageReader {
    /// Maps the memory. The mapping counts as shared memory of this process, and ends with this value.
    pub fn new(memory: &Arc<GuestMemory>) -> Self {
        let view = MemoryView::new(memory)
            .inspect_err(
                |error| tracing::debug!(%error, "guest memory is not mapped, but read by pread"),
            )
            .ok();
        Self {
            memory: Arc::clone(memory),
            view,
        }
    }

    /// The memory that it reads.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Makes the pages of `range` cheap to copy, now and later. Call it just before they are copied, and only for pages that hold
    /// data: a page that became a hole since is one of zeros then, no longer a hole.
    pub fn prepare(&self, range: PageRange) {
        if let Some(view) = &self.view
            && let Err(error) = view.populate(range)
        {
            // The copies fault instead.
            tracing::debug!(%error, "guest memory is not mapped ahead");
        }
    }

    /// Copies a page, and says whether the copy is all zeros.
    ///
    /// # Errors
    /// `UnexpectedEof` if it is beyond guest RAM; else what `pread` says.
    pub fn copy(&self, page: PageIndex, out: &mut [u8; PAGE_SIZE]) -> io::Result<bool> {
        match &self.view {
            Some(view) => view.copy(page, out),
            None => {
                self.memory.read(page, out)?;
                Ok(is_zero(out))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Bytes;

    #[test]
    fn both_ways_of_reading_give_the_same() {
        let memory = GuestMemory::create("reader-test", Bytes(8 * PAGE_SIZE as u64)).unwrap();
        let memory = Arc::new(memory);
        memory.write(PageIndex(1), &[3; PAGE_SIZE]).unwrap();
        memory.write(PageIndex(2), &[0; PAGE_SIZE]).unwrap();
        let mapped = PageReader::new(&memory);
        assert!(mapped.view.is_some());
        mapped.prepare(PageRange::new(1, 3));
        let plain = PageReader {
            memory: Arc::clone(&memory),
            view: None,
        };
        for reader in [&mapped, &plain] {
            let mut copy = [9; PAGE_SIZE];
            for (page, byte) in [(0, 0), (1, 3), (2, 0), (7, 0)] {
                let zero = reader.copy(PageIndex(page), &mut copy).unwrap();
                assert_eq!((zero, copy), (byte == 0, [byte; PAGE_SIZE]), "page {page}");
            }
            assert!(reader.copy(PageIndex(8), &mut copy).is_err());
        }
    }
}
