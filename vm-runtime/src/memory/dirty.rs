//! Which pages the guest wrote, asked from outside.
//!
//! ```text
//! start   register the RAM mapping with the VMM's own userfaultfd, write-protect it all
//! scan    PAGEMAP_SCAN: report what was written, protect it again, one walk
//! stop    unregister: the guest runs at full speed again
//! ```
//!
//! With `WP_ASYNC` the kernel resolves a write fault by itself, so the guest never waits for this
//! process, and a killed service leaves a VM that merely keeps its protection.

use std::fs::{File, read_to_string};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::maps::{Mapping, find_mappings};
use super::pagemap::{Region, scan_written};
use super::{GuestMemory, uffd};
use crate::units::{PAGE_SIZE, PageIndex, PageRange};

/// Regions that one ioctl may report: 64 Ki of 24 bytes. More make a second walk from there.
const REGIONS: usize = 1 << 16;

/// Dirty tracking failed.
#[derive(Debug, thiserror::Error)]
pub enum DirtyError {
    /// The VMM is gone.
    #[error("process {pid} is gone, and its dirty pages with it")]
    Gone {
        /// The VMM.
        pid: i32,
    },
    /// The VMM does not map this memory.
    #[error(
        "process {pid} has no writable shared mapping of this guest memory: is it the right VMM?"
    )]
    NotMapped {
        /// The VMM.
        pid: i32,
    },
    /// The kernel refused a step.
    #[error(
        "cannot {step} in process {pid}: dirty tracking needs Linux 6.7 with CONFIG_USERFAULTFD and CONFIG_PROC_PAGE_MONITOR"
    )]
    Kernel {
        /// What was tried.
        step: &'static str,
        /// The VMM.
        pid: i32,
        /// Why not.
        source: io::Error,
    },
}

/// Dirty tracking of one VMM's guest RAM, from `start` until `stop` or drop.
///
/// Its calls are short system calls (0.5-5 ms for 512 MiB): call them where a thread may block.
#[derive(Debug)]
pub struct DirtyTracker {
    uffd: OwnedFd,
    pid: i32,
    pagemap: File,
    mappings: Vec<Mapping>,
    regions: Vec<Region>,
}

impl DirtyTracker {
    /// Begins to track: from here on each page written is reported by the next scan.
    ///
    /// Works again after a service that was tracking was killed. `uffd` is the VMM's own
    /// userfaultfd, past its handshake (see [`crate::vm::Vm::uffd`]).
    ///
    /// # Errors
    /// The process is gone, does not map `memory`, or the kernel refuses.
    pub fn start(uffd: BorrowedFd<'_>, pid: i32, memory: &GuestMemory) -> Result<Self, DirtyError> {
        let fail = |step| move |source| kernel(step, pid, source);
        let identity = memory.identity().map_err(fail("look at guest memory"))?;
        let maps =
            read_to_string(format!("/proc/{pid}/maps")).map_err(fail("read the memory map"))?;
        let mappings = find_mappings(&maps, identity);
        if mappings.is_empty() {
            return Err(DirtyError::NotMapped { pid });
        }
        let pagemap =
            File::open(format!("/proc/{pid}/pagemap")).map_err(fail("open the pagemap"))?;
        // Built before the first registration, so that an error below unregisters again.
        let tracker = Self {
            uffd: uffd
                .try_clone_to_owned()
                .map_err(fail("hold the userfaultfd"))?,
            pid,
            pagemap,
            mappings,
            regions: vec![Region::default(); REGIONS],
        };
        for mapping in &tracker.mappings {
            uffd::register_wp(uffd, *mapping).map_err(fail("register guest memory"))?;
            uffd::write_protect(uffd, *mapping).map_err(fail("write-protect guest memory"))?;
        }
        Ok(tracker)
    }

    /// The pages written since the last scan (or since `start`), in order of address, each
    /// write-protected again in the same walk: a write after this is in the next scan.
    ///
    /// # Errors
    /// The process is gone, or the kernel refuses.
    pub fn scan(&mut self) -> Result<Vec<PageRange>, DirtyError> {
        let mut found = Vec::new();
        for mapping in &self.mappings {
            let mut from = mapping.start;
            while from < mapping.end {
                let (filled, walked) =
                    scan_written(&self.pagemap, *mapping, from, &mut self.regions)
                        .map_err(|source| kernel("scan for written pages", self.pid, source))?;
                for region in &self.regions[..filled] {
                    push(&mut found, pages(*mapping, *region));
                }
                if walked <= from {
                    // To go on would lose pages, to try again would never end.
                    let stuck = io::Error::other("PAGEMAP_SCAN did not get on");
                    return Err(kernel("scan for written pages", self.pid, stuck));
                }
                from = walked;
            }
        }
        Ok(found)
    }

    /// Ends tracking; the guest runs without write faults again.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for DirtyTracker {
    fn drop(&mut self) {
        for mapping in &self.mappings {
            if let Err(error) = uffd::unregister(self.uffd.as_fd(), *mapping) {
                // A dead VMM has nothing to unregister (ESRCH); else its guest runs on, slower.
                tracing::debug!(pid = self.pid, %error, "dirty tracking was not taken down");
            }
        }
    }
}

fn kernel(step: &'static str, pid: i32, source: io::Error) -> DirtyError {
    match source.raw_os_error() {
        Some(libc::ESRCH | libc::ENOENT) => DirtyError::Gone { pid },
        _ => DirtyError::Kernel { step, pid, source },
    }
}

fn pages(mapping: Mapping, region: Region) -> PageRange {
    let page = |address: u64| (address - mapping.start + mapping.offset) / PAGE_SIZE as u64;
    PageRange {
        start: PageIndex(page(region.start)),
        end: PageIndex(page(region.end)),
    }
}

/// Adds `range`, joined to the last one if they touch: two walks may cut a run in two.
fn push(found: &mut Vec<PageRange>, range: PageRange) {
    match found.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => found.push(range),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Own;
    use super::*;

    #[test]
    fn a_page_that_was_written_and_then_punched_counts_as_written() {
        // More than one page table: some are left with nothing in them.
        let own = Own::new(2048);
        let all = PageRange::new(0, 2048);
        (0..2048).for_each(|page| own.write(PageIndex(page), 1));
        let mut tracker = DirtyTracker::start(own.uffd(), own.pid(), own.memory()).unwrap();
        assert_eq!(tracker.scan().unwrap(), []);
        (0..2048).for_each(|page| own.write(PageIndex(page), 2));
        own.memory().punch(all).unwrap();
        assert_eq!(tracker.scan().unwrap(), [all]);
        assert_eq!(tracker.scan().unwrap(), []);
        own.write(PageIndex(700), 3);
        assert_eq!(tracker.scan().unwrap(), [PageRange::new(700, 701)]);
    }

    #[test]
    fn addresses_become_pages_of_the_file() {
        let mapping = Mapping {
            start: 0x1_0000,
            end: 0x2_0000,
            offset: 0x8000,
        };
        let mut region = Region::default();
        (region.start, region.end) = (0x1_1000, 0x1_3000);
        assert_eq!(pages(mapping, region), PageRange::new(9, 11));
    }

    #[test]
    fn runs_that_touch_are_joined() {
        let mut found = Vec::new();
        for (start, end) in [(1, 2), (2, 4), (5, 6)] {
            push(&mut found, PageRange::new(start, end));
        }
        assert_eq!(found, [PageRange::new(1, 4), PageRange::new(5, 6)]);
    }
}
