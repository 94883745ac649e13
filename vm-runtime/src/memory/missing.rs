//! Pages that the guest does not have yet: whoever touches one waits until it is put in place.
//!
//! ```text
//! start   register the RAM mapping with the VMM's own userfaultfd: a hole in the file is now a missing page
//! wait    which pages somebody waits for
//! place   put pages in place, unless they are there: a page that the guest has written is never overwritten
//! end     unregister: everybody goes on, and a hole reads as zeros again
//! ```
//!
//! Without the last step, be it dropped or killed, the guest waits: the next service starts anew, calls [`MissingPages::wake`],
//! and hears of everybody again.

use std::fs::read_to_string;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::maps::{Mapping, find_mappings};
use super::uffd::Filled;
use super::{GuestMemory, uffd};
use crate::units::{PAGE_SIZE, PageIndex, PageRange};

/// The kernel refused a step of post-copy.
#[derive(Debug, thiserror::Error)]
pub enum MissingError {
    /// The VMM is gone.
    #[error("process {pid} is gone, and its memory with it")]
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
    /// A page beyond guest memory.
    #[error("page {page} is beyond guest memory")]
    Outside {
        /// The page.
        page: u64,
    },
    /// The kernel refused.
    #[error("cannot {step} in process {pid}: post-copy needs a kernel with CONFIG_USERFAULTFD")]
    Kernel {
        /// What was tried.
        step: &'static str,
        /// The VMM.
        pid: i32,
        /// Why not.
        source: io::Error,
    },
}

/// The missing pages of one VMM's guest RAM. All methods may be called from several threads.
#[derive(Debug)]
pub struct MissingPages {
    uffd: OwnedFd,
    pid: i32,
    mappings: Vec<Mapping>,
}

impl MissingPages {
    /// From here on a page that `memory`'s file does not hold is missing. Again after a service that was killed: call
    /// [`Self::wake`] then.
    ///
    /// `uffd` is the VMM's own userfaultfd, past its handshake (see [`crate::vm::Vm::uffd`]).
    ///
    /// # Errors
    /// The process is gone, does not map `memory`, or the kernel refuses.
    pub fn start(
        uffd: BorrowedFd<'_>,
        pid: i32,
        memory: &GuestMemory,
    ) -> Result<Self, MissingError> {
        let fail = |step| move |source| kernel(step, pid, source);
        let identity = memory.identity().map_err(fail("look at guest memory"))?;
        let maps =
            read_to_string(format!("/proc/{pid}/maps")).map_err(fail("read the memory map"))?;
        let mappings = find_mappings(&maps, identity);
        if mappings.is_empty() {
            return Err(MissingError::NotMapped { pid });
        }
        let missing = Self {
            uffd: uffd
                .try_clone_to_owned()
                .map_err(fail("hold the userfaultfd"))?,
            pid,
            mappings,
        };
        for mapping in &missing.mappings {
            if let Err(source) = uffd::register_missing(uffd, *mapping) {
                missing.end();
                return Err(kernel("register guest memory", pid, source));
            }
        }
        Ok(missing)
    }

    /// Ends it: everybody goes on, and what is still missing reads as zeros. Only for a guest that has everything, or never runs.
    pub fn end(&self) {
        for mapping in &self.mappings {
            if let Err(error) = uffd::unregister(self.uffd.as_fd(), *mapping) {
                // A dead VMM has nothing to unregister.
                tracing::debug!(pid = self.pid, %error, "missing pages were not unregistered");
            }
        }
        // The kernel wakes who waits before it takes the registration back (userfaultfd_unregister): whoever touches a page between
        // the two falls asleep for ever. From here on nobody does, so one more wake is enough.
        if let Err(error) = self.wake() {
            tracing::debug!(pid = self.pid, %error, "nobody was woken");
        }
    }

    /// Waits, for `limit` at most, until somebody waits for a page, and adds all such pages to `pages`. Each wait is
    /// told once, to one caller.
    ///
    /// # Errors
    /// The process is gone, or the kernel refuses.
    pub fn wait(&self, limit: Duration, pages: &mut Vec<PageIndex>) -> Result<(), MissingError> {
        let fail = |source: io::Error| kernel("wait for faults", self.pid, source);
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        let mut asked = [PollFd::new(self.uffd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut asked, limit) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => return Ok(()),
            Ok(_) => {}
            Err(errno) => return Err(fail(errno.into())),
        }
        let mut addresses = Vec::new();
        uffd::read_faults(self.uffd.as_fd(), &mut addresses).map_err(fail)?;
        pages.extend(addresses.iter().filter_map(|address| self.page(*address)));
        Ok(())
    }

    /// Puts whole pages in place from page `first` on, where they are missing; who waited for them goes on. Returns how
    /// many were missing: the others keep the content they have.
    ///
    /// # Errors
    /// A page is beyond guest memory, the process is gone, or the host has no memory left.
    pub fn place(&self, first: PageIndex, content: &[u8]) -> Result<u64, MissingError> {
        let range = PageRange::new(
            first.0,
            first.0.saturating_add((content.len() / PAGE_SIZE) as u64),
        );
        self.fill(range, |at, range| {
            let from = (range.start.0 - first.0) as usize * PAGE_SIZE;
            let to = (range.end.0 - first.0) as usize * PAGE_SIZE;
            uffd::copy(self.uffd.as_fd(), at, &content[from..to])
        })
    }

    /// As [`Self::place`], with zeros.
    ///
    /// # Errors
    /// As [`Self::place`].
    pub fn place_zeros(&self, range: PageRange) -> Result<u64, MissingError> {
        self.fill(range, |at, range| {
            uffd::zero(self.uffd.as_fd(), at, range.len() * PAGE_SIZE as u64)
        })
    }

    /// Lets everybody go on who waits; who still misses a page is told anew by [`Self::wait`].
    ///
    /// # Errors
    /// The process is gone, or the kernel refuses.
    pub fn wake(&self) -> Result<(), MissingError> {
        for mapping in &self.mappings {
            uffd::wake(self.uffd.as_fd(), *mapping)
                .map_err(|source| kernel("wake the guest", self.pid, source))?;
        }
        Ok(())
    }

    fn fill(
        &self,
        range: PageRange,
        part: impl Fn(u64, PageRange) -> io::Result<Filled>,
    ) -> Result<u64, MissingError> {
        let (mut at, mut filled) = (range.start.0, 0);
        while at < range.end.0 {
            let (address, left) = self
                .address(PageIndex(at))
                .ok_or(MissingError::Outside { page: at })?;
            let rest = PageRange::new(at, range.end.0.min(at + left));
            match part(address, rest) {
                Ok(Filled::Bytes(bytes)) => {
                    let pages = (bytes / PAGE_SIZE as u64).max(1);
                    filled += pages;
                    at += pages;
                }
                Ok(Filled::Exists) => at += 1,
                Err(source) => return Err(kernel("put a page in place", self.pid, source)),
            }
        }
        Ok(filled)
    }

    /// Where a page is in the process, and how many pages follow from there on without a gap.
    fn address(&self, page: PageIndex) -> Option<(u64, u64)> {
        let offset = page.0.checked_mul(PAGE_SIZE as u64)?;
        self.mappings.iter().find_map(|mapping| {
            let within = offset.checked_sub(mapping.offset)?;
            let address = mapping.start.checked_add(within)?;
            (address < mapping.end).then(|| (address, (mapping.end - address) / PAGE_SIZE as u64))
        })
    }

    fn page(&self, address: u64) -> Option<PageIndex> {
        self.mappings
            .iter()
            .find(|mapping| (mapping.start..mapping.end).contains(&address))
            .map(|mapping| PageIndex((address - mapping.start + mapping.offset) / PAGE_SIZE as u64))
    }
}

fn kernel(step: &'static str, pid: i32, source: io::Error) -> MissingError {
    match source.raw_os_error() {
        Some(libc::ESRCH | libc::ENOENT) => MissingError::Gone { pid },
        _ => MissingError::Kernel { step, pid, source },
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::super::testing::Own;
    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    fn page(value: u8) -> [u8; PAGE_SIZE] {
        [value; PAGE_SIZE]
    }

    #[test]
    fn who_touches_a_missing_page_waits_until_it_is_placed() {
        let own = Own::new(16);
        let missing = MissingPages::start(own.uffd(), own.pid(), own.memory()).unwrap();
        thread::scope(|scope| {
            let reader = scope.spawn(|| own.read(PageIndex(5)));
            let mut pages = Vec::new();
            while pages.is_empty() {
                missing.wait(SOON, &mut pages).unwrap();
            }
            assert_eq!(pages, [PageIndex(5)]);
            assert!(!reader.is_finished());
            assert_eq!(
                missing
                    .place(PageIndex(4), &[page(1), page(2)].concat())
                    .unwrap(),
                2
            );
            assert_eq!(reader.join().unwrap(), 2);
        });
        assert_eq!(own.read(PageIndex(4)), 1);
        missing.end();
    }

    #[test]
    fn a_page_that_is_there_keeps_what_was_written_to_it() {
        let own = Own::new(16);
        own.write(PageIndex(3), 9);
        let missing = MissingPages::start(own.uffd(), own.pid(), own.memory()).unwrap();
        assert_eq!(
            missing
                .place(PageIndex(2), &[page(1), page(2), page(3)].concat())
                .unwrap(),
            2
        );
        assert_eq!([2, 3, 4].map(|at| own.read(PageIndex(at))), [1, 9, 3]);
        assert_eq!(missing.place_zeros(PageRange::new(2, 6)).unwrap(), 1);
        assert_eq!([2, 3, 4, 5].map(|at| own.read(PageIndex(at))), [1, 9, 3, 0]);
        missing.end();
    }

    #[test]
    fn a_wait_that_was_told_is_told_again_after_a_wake() {
        let own = Own::new(4);
        let missing = MissingPages::start(own.uffd(), own.pid(), own.memory()).unwrap();
        thread::scope(|scope| {
            let reader = scope.spawn(|| own.read(PageIndex(1)));
            for _ in 0..3 {
                let mut pages = Vec::new();
                while pages.is_empty() {
                    missing.wait(SOON, &mut pages).unwrap();
                }
                assert_eq!(pages, [PageIndex(1)]);
                missing.wake().unwrap();
            }
            assert_eq!(missing.place_zeros(PageRange::new(0, 4)).unwrap(), 4);
            assert_eq!(reader.join().unwrap(), 0);
        });
        missing.end();
    }

    #[test]
    fn at_its_end_holes_read_as_zeros_and_nobody_waits() {
        let own = Own::new(4);
        let missing = MissingPages::start(own.uffd(), own.pid(), own.memory()).unwrap();
        thread::scope(|scope| {
            let reader = scope.spawn(|| own.read(PageIndex(2)));
            let mut pages = Vec::new();
            while pages.is_empty() {
                missing.wait(SOON, &mut pages).unwrap();
            }
            missing.end();
            assert_eq!(reader.join().unwrap(), 0);
        });
    }

    #[test]
    fn whoever_comes_at_the_end_goes_on() {
        const PAGES: u64 = 512;
        for _ in 0..300 {
            let own = Own::new(PAGES);
            let missing = MissingPages::start(own.uffd(), own.pid(), own.memory()).unwrap();
            thread::scope(|scope| {
                for first in 0..2 {
                    let own = &own;
                    // One wait after the other, so that some begin in the very moment of the end.
                    scope.spawn(move || {
                        (first..PAGES).step_by(2).for_each(|page| {
                            own.read(PageIndex(page));
                        });
                    });
                }
                let (mut pages, mut served) = (Vec::new(), 0);
                while served < 50 {
                    missing.wait(SOON, &mut pages).unwrap();
                    for page in pages.drain(..) {
                        missing
                            .place_zeros(PageRange::new(page.0, page.0 + 1))
                            .unwrap();
                        served += 1;
                    }
                }
                missing.end();
            });
        }
    }

    #[test]
    fn nothing_beyond_guest_memory_is_placed() {
        let own = Own::new(4);
        let missing = MissingPages::start(own.uffd(), own.pid(), own.memory()).unwrap();
        for first in [4, u64::MAX / PAGE_SIZE as u64] {
            let placed = missing.place(PageIndex(first), &page(1));
            assert!(
                matches!(placed, Err(MissingError::Outside { .. })),
                "{placed:?}"
            );
        }
        missing.end();
    }
}
