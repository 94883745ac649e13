//! The guest that gets numbered datagrams, and what it has got.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::ensure;
use migrator::network::VNET_HEADER;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// What has not come by then does not come.
const DEADLINE: Duration = Duration::from_secs(40);

/// A numbered datagram begins so; its flow (one byte) and its number (eight, big endian) follow.
pub const MAGIC: [u8; 4] = *b"prob";

/// A value that one thread changes and another waits for.
#[derive(Debug, Default)]
pub struct Watched<T> {
    value: Mutex<T>,
    changed: Condvar,
}

impl<T> Watched<T> {
    /// Changes it.
    ///
    /// # Panics
    /// Whoever changed it before has panicked.
    pub fn change(&self, how: impl FnOnce(&mut T)) {
        how(&mut self.value.lock().expect("not poisoned"));
        self.changed.notify_all();
    }

    /// The value as soon as it is as wanted, or after 40 s as it is then.
    ///
    /// # Panics
    /// Whoever changed it has panicked.
    pub fn wait_for(&self, wanted: impl Fn(&T) -> bool) -> MutexGuard<'_, T> {
        let value = self.value.lock().expect("not poisoned");
        let waited = self
            .changed
            .wait_timeout_while(value, DEADLINE, |value| !wanted(value));
        waited.expect("not poisoned").0
    }
}

/// What the guest has got, wherever it ran.
#[derive(Clone, Debug, Default)]
pub struct Inbox(Arc<Watched<Vec<(u8, u64)>>>);

impl Inbox {
    /// Frames that have come.
    pub fn count(&self) -> usize {
        self.0.wait_for(|_| true).len()
    }

    /// Frames of one flow that have come.
    pub fn count_of(&self, flow: u8) -> usize {
        of(&self.0.wait_for(|_| true), flow)
    }

    /// Until so many of a flow have come.
    ///
    /// # Errors
    /// They have not.
    pub fn wait_for(&self, flow: u8, count: usize) -> anyhow::Result<()> {
        let came = of(&self.0.wait_for(|arrived| of(arrived, flow) >= count), flow);
        ensure!(
            came >= count,
            "only {came} of flow {flow} came, {count} were waited for"
        );
        Ok(())
    }

    /// Until so many have come.
    ///
    /// # Errors
    /// They have not.
    pub fn wait_for_count(&self, count: usize) -> anyhow::Result<()> {
        let arrived = self.0.wait_for(|arrived| arrived.len() >= count).len();
        ensure!(arrived >= count, "only {arrived} frames came");
        Ok(())
    }

    /// How many have come, once the last frame of a flow is among them.
    pub fn arrived_of(&self, sent: &BTreeMap<u8, u64>) -> u64 {
        let last = |(flow, count): (&u8, &u64)| (*flow, count - 1);
        let lasts: Vec<_> = sent.iter().map(last).collect();
        let all = self
            .0
            .wait_for(|arrived| lasts.iter().all(|last| arrived.contains(last)));
        all.len() as u64
    }

    /// All but `lost` frames came, each once, and in order.
    ///
    /// # Errors
    /// They did not.
    pub fn check_but(&self, sent: &BTreeMap<u8, u64>, lost: u64) -> anyhow::Result<()> {
        let total = sent.values().sum::<u64>() - lost;
        let arrived = self.0.wait_for(|arrived| arrived.len() as u64 >= total);
        let mut next = BTreeMap::new();
        for (flow, number) in arrived.iter() {
            let expected = next.entry(*flow).or_insert(0);
            ensure!(
                number >= expected,
                "flow {flow}: {number} came behind {}",
                *expected - 1
            );
            *expected = number + 1;
        }
        ensure!(
            arrived.len() as u64 == total,
            "{} came, {total} should have",
            arrived.len()
        );
        Ok(())
    }

    /// Every frame of every flow came once, and in order.
    ///
    /// # Errors
    /// They did not.
    pub fn check(&self, sent: &BTreeMap<u8, u64>) -> anyhow::Result<()> {
        let total: u64 = sent.values().sum();
        // A frame too many is as wrong as one too few, so the wait ends at the first of the two.
        let arrived = self.0.wait_for(|arrived| arrived.len() as u64 >= total);
        let mut next = BTreeMap::new();
        let mut wrong = Vec::new();
        for (flow, number) in arrived.iter() {
            let expected = next.entry(*flow).or_insert(0);
            if number != expected {
                wrong.push(format!("flow {flow}: {number} came, {expected} was due"));
            }
            *expected = number + 1;
        }
        ensure!(
            wrong.is_empty(),
            "{} breaks, {} of {total} came: {:?}",
            wrong.len(),
            arrived.len(),
            &wrong[..wrong.len().min(10)]
        );
        ensure!(&next == sent, "{next:?} came, {sent:?} was sent");
        Ok(())
    }
}

/// The thread at the other end of the TAP.
#[derive(Debug)]
pub struct Guest {
    runs: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Guest {
    /// Reads from a TAP into `inbox`.
    pub fn start(tap: OwnedFd, inbox: &Inbox) -> Self {
        let runs = Arc::new(AtomicBool::new(true));
        let (go_on, inbox) = (Arc::clone(&runs), inbox.clone());
        let thread = std::thread::spawn(move || {
            let mut buffer = vec![0; 70_000];
            while go_on.load(Ordering::Acquire) {
                let mut fds = [PollFd::new(tap.as_fd(), PollFlags::POLLIN)];
                poll(&mut fds, PollTimeout::from(5u8)).expect("poll");
                if !go_on.load(Ordering::Acquire) {
                    break;
                }
                let Ok(len) = nix::unistd::read(tap.as_fd(), &mut buffer) else {
                    continue;
                };
                if let Some(arrival) = parse(&buffer[..len]) {
                    inbox.0.change(|arrived| arrived.push(arrival));
                }
            }
        });
        Self { runs, thread }
    }

    /// Passes frames between a TAP and that of a namespace which plays the guest: both have a virtio-net header of the same length.
    pub fn wired(tap: OwnedFd, stack: OwnedFd) -> Self {
        let runs = Arc::new(AtomicBool::new(true));
        let go_on = Arc::clone(&runs);
        let thread = std::thread::spawn(move || {
            let mut buffer = vec![0; 70_000];
            while go_on.load(Ordering::Acquire) {
                let mut fds = [&tap, &stack].map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN));
                poll(&mut fds, PollTimeout::from(5u8)).expect("poll");
                for (from, to) in [(&tap, &stack), (&stack, &tap)] {
                    // What is written may be dropped: the stack at either end sends it again.
                    while go_on.load(Ordering::Acquire)
                        && let Ok(len) = nix::unistd::read(from.as_fd(), &mut buffer)
                    {
                        let _ = nix::unistd::write(to.as_fd(), &buffer[..len]);
                    }
                }
            }
        });
        Self { runs, thread }
    }

    /// Stops reading; what is in the TAP stays there.
    ///
    /// # Panics
    /// The thread has.
    pub fn stop(self) {
        self.runs.store(false, Ordering::Release);
        self.thread.join().expect("the guest");
    }
}

fn of(arrived: &[(u8, u64)], flow: u8) -> usize {
    arrived.iter().filter(|(one, _)| *one == flow).count()
}

fn parse(frame: &[u8]) -> Option<(u8, u64)> {
    // Behind Ethernet and IP: a datagram's eight bytes.
    let header = match frame.get(VNET_HEADER + 12..VNET_HEADER + 14)? {
        [0x08, 0x00] => 20,
        [0x86, 0xdd] => 40,
        _ => return None,
    };
    let payload = frame.get(VNET_HEADER + 14 + header + 8..)?;
    let (magic, rest) = payload.split_first_chunk::<4>()?;
    let (flow, rest) = rest.split_first()?;
    let number = rest.first_chunk::<8>()?;
    (*magic == MAGIC).then(|| (*flow, u64::from_be_bytes(*number)))
}
