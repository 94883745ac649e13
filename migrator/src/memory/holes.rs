//! Pages that hold data, followed by their number: what the guest gives back becomes a hole, and no scan for written pages tells.
//!
//! A page that was written since the last scan and is a hole now is reported as written by the kernel. One that was sent, not
//! written since, and then punched by the VMM is not: the destination would keep what the guest had there. So the set of pages with data
//! is kept along: a scan adds what was written, and the file's own count of its pages says whether that is all. Only if it is not, the
//! file is walked (4 ms for 512 MiB, which would be downtime).
//!
//! The count can agree by chance: when as many holes as were made are read, and not written, by the guest in the same time. It does read
//! some after a move, because a page of zeros crosses as a hole. A page that it has given back then keeps its old content at the
//! destination. The guest cannot tell, because the content of such a page is undefined until it is written (virtio 1.2, 5.5.6.7); only
//! `--verify` can: so where it compares, the file is walked at each scan.

use std::io;

use vm_runtime::memory::GuestMemory;
use vm_runtime::units::PageRange;

use super::pageset::PageSet;

/// How pages are found that have become holes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holes {
    /// By the number of pages; one whose content nobody may rely on can be overlooked.
    Counted,
    /// One by one: for a destination that is compared.
    Walked,
}

/// The pages of one guest's memory that hold data, as last seen.
#[derive(Debug)]
pub(super) struct DataPages {
    set: PageSet,
    holes: Holes,
}

impl DataPages {
    /// None yet.
    pub(super) fn new(pages: u64, holes: Holes) -> Self {
        let set = PageSet::new(pages);
        Self { set, holes }
    }

    /// Looks at the file, and gives back what it holds.
    ///
    /// # Errors
    /// It cannot be read.
    pub(super) fn begin(&mut self, memory: &GuestMemory) -> io::Result<Vec<PageRange>> {
        let ranges = memory.data_ranges()?;
        self.set = of(memory, &ranges);
        Ok(ranges)
    }

    /// After a scan that found `written`: the pages that have become holes since the last time. They must be sent, as the zeros that they
    /// are; that reads them, which makes them data again.
    ///
    /// # Errors
    /// The file cannot be read.
    pub(super) fn scanned(
        &mut self,
        memory: &GuestMemory,
        written: &[PageRange],
    ) -> io::Result<Vec<PageRange>> {
        written.iter().for_each(|range| self.set.insert(*range));
        if self.holes == Holes::Counted && memory.allocated_pages()? == self.set.len() {
            return Ok(Vec::new());
        }
        let now = of(memory, &memory.data_ranges()?);
        let punched = self.set.minus(&now);
        self.set = now;
        punched.iter().for_each(|range| self.set.insert(*range));
        Ok(punched)
    }
}

fn of(memory: &GuestMemory, ranges: &[PageRange]) -> PageSet {
    let mut set = PageSet::new(memory.pages());
    ranges.iter().for_each(|range| set.insert(*range));
    set
}

#[cfg(test)]
mod tests {
    use vm_runtime::units::{Bytes, PAGE_SIZE, PageIndex};

    use super::*;

    #[test]
    fn pages_that_were_punched_are_found_whatever_else_was_written() {
        let size = Bytes(400 * PAGE_SIZE as u64);
        let memory = GuestMemory::create("holes-test", size).unwrap();
        let write = |first, pages| {
            let content = vec![1; pages * PAGE_SIZE];
            memory.write(PageIndex(first), &content).unwrap();
        };
        write(10, 100);
        let mut data = DataPages::new(memory.pages(), Holes::Counted);
        assert_eq!(data.begin(&memory).unwrap(), [PageRange::new(10, 110)]);

        // Nothing happens; pages are written, old ones and new ones.
        assert_eq!(data.scanned(&memory, &[]).unwrap(), []);
        write(105, 10);
        let written = [PageRange::new(105, 115)];
        assert_eq!(data.scanned(&memory, &written).unwrap(), []);

        // Some are punched, while as many others are written.
        memory.punch(PageRange::new(20, 30)).unwrap();
        write(200, 10);
        let written = [PageRange::new(200, 210)];
        let punched = [PageRange::new(20, 30)];
        assert_eq!(data.scanned(&memory, &written).unwrap(), punched);
        // They are sent, by reading, which makes them data.
        write(20, 10);
        assert_eq!(data.scanned(&memory, &[]).unwrap(), []);

        // Holes are read, and nobody says so: no reason to send anything.
        write(300, 5);
        assert_eq!(data.scanned(&memory, &[]).unwrap(), []);
        memory.punch(PageRange::new(302, 303)).unwrap();
        let punched = [PageRange::new(302, 303)];
        assert_eq!(data.scanned(&memory, &[]).unwrap(), punched);
    }

    #[test]
    fn one_that_is_read_hides_one_that_is_punched_from_who_counts_alone() {
        let size = Bytes(400 * PAGE_SIZE as u64);
        for (holes, found) in [
            (Holes::Counted, vec![]),
            (Holes::Walked, vec![PageRange::new(20, 21)]),
        ] {
            let memory = GuestMemory::create("holes-test", size).unwrap();
            let content = [1; 100 * PAGE_SIZE];
            memory.write(PageIndex(10), &content).unwrap();
            let mut data = DataPages::new(memory.pages(), holes);
            data.begin(&memory).unwrap();
            memory.punch(PageRange::new(20, 21)).unwrap();
            // As a guest reads: through a mapping, which makes data of a hole.
            let view = vm_runtime::memory::MemoryView::new(&memory).unwrap();
            let zero = view.copy(PageIndex(300), &mut [1; PAGE_SIZE]).unwrap();
            assert!(zero);
            assert_eq!(data.scanned(&memory, &[]).unwrap(), found, "{holes:?}");
        }
    }
}
