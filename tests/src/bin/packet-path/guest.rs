//! The end of a TAP that a guest would read.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Result, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::DEADLINE;
use crate::frames::{flow_of, flows, number_of};
use crate::schedule::{Place, settle};

/// Larger than any frame.
pub(crate) const BUFFER: usize = 70_000;
/// A reader that has found nothing so often sleeps until there is something.
const SPINS: u32 = 2_000;

/// The numbers of all frames that arrived, in the order of arrival.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    numbers: Mutex<Vec<u64>>,
    count: AtomicU64,
    last: Mutex<Option<Instant>>,
}

/// What is wrong with an [`Inbox`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Defects {
    /// Never arrived.
    pub(crate) lost: u64,
    /// Arrived more than once.
    pub(crate) doubled: u64,
    /// Arrived after a later one of the same flow.
    pub(crate) overtaken: u64,
}

impl Inbox {
    /// How many frames have arrived.
    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    /// When the last one did.
    pub(crate) fn last(&self) -> Option<Instant> {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for so many; false if fewer come.
    pub(crate) fn wait_for(&self, count: u64) -> bool {
        let until = Instant::now() + DEADLINE;
        while self.count() < count {
            if Instant::now() >= until {
                return false;
            }
            std::thread::yield_now();
        }
        true
    }

    /// Compares with what was sent: every number below `sent`, once, and each flow in order.
    pub(crate) fn defects(&self, sent: u64) -> Defects {
        let numbers = self.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        compare(&numbers, sent)
    }
}

fn compare(numbers: &[u64], sent: u64) -> Defects {
    let mut seen = vec![false; usize::try_from(sent).unwrap_or(0)];
    let mut highest = vec![None; flows()];
    let mut defects = Defects::default();
    for number in numbers {
        let Some(first) = usize::try_from(*number)
            .ok()
            .and_then(|number| seen.get_mut(number))
        else {
            continue;
        };
        if std::mem::replace(first, true) {
            defects.doubled += 1;
            continue;
        }
        let highest = &mut highest[flow_of(*number)];
        if highest.is_some_and(|highest| highest > *number) {
            defects.overtaken += 1;
        } else {
            *highest = Some(*number);
        }
    }
    defects.lost = seen.iter().filter(|seen| !**seen).count() as u64;
    defects
}

/// The thread that reads.
pub(crate) struct Guest {
    runs: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

impl Guest {
    /// Reads the TAP into the inbox. A reader that `spins` never waits in the kernel, so that no sender has to wake it.
    pub(crate) fn start(tap: OwnedFd, inbox: &Arc<Inbox>, place: Place, spins: bool) -> Guest {
        let runs = Arc::new(AtomicBool::new(true));
        let (go_on, inbox) = (Arc::clone(&runs), Arc::clone(inbox));
        let thread = std::thread::spawn(move || {
            settle(place)?;
            read(&tap, &inbox, &go_on, spins)
        });
        Guest { runs, thread }
    }

    /// Stops reading; what is in the TAP stays there.
    ///
    /// # Errors
    /// The TAP could not be read.
    pub(crate) fn stop(self) -> Result<()> {
        self.runs.store(false, Ordering::Release);
        match self.thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

fn read(tap: &OwnedFd, inbox: &Inbox, go_on: &AtomicBool, spins: bool) -> Result<()> {
    let mut buffer = vec![0; BUFFER];
    let mut idle = 0;
    while go_on.load(Ordering::Acquire) {
        match nix::unistd::read(tap.as_fd(), &mut buffer) {
            Ok(length) => {
                idle = 0;
                if let Some(number) = number_of(&buffer[..length]) {
                    let now = Instant::now();
                    let locked = inbox.numbers.lock();
                    locked.unwrap_or_else(PoisonError::into_inner).push(number);
                    *inbox.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
                    inbox.count.fetch_add(1, Ordering::Release);
                }
            }
            Err(Errno::EAGAIN) if spins && idle < SPINS => {
                idle += 1;
                std::hint::spin_loop();
            }
            Err(Errno::EAGAIN) => {
                let mut fds = [PollFd::new(tap.as_fd(), PollFlags::POLLIN)];
                poll(&mut fds, PollTimeout::from(5u8))?;
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// An error that names what is wrong, if anything is.
///
/// # Errors
/// Something is.
pub(crate) fn faultless(defects: Defects) -> Result<()> {
    ensure!(
        defects == Defects::default(),
        "the guest got other frames than were sent: {defects:?}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_counts_within_a_flow_only() {
        let flows = flows() as u64;
        let good = [1, 0, flows, flows + 1];
        let mut missing = compare(&good, flows + 2);
        assert_eq!(missing.lost, flows - 2);
        missing.lost = 0;
        assert_eq!(missing, Defects::default());
        let bad = compare(&[flows, 0, 0], flows + 1);
        assert_eq!((bad.doubled, bad.overtaken), (1, 1));
    }
}
