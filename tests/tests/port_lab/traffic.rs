//! Numbered frames: who sends them, and the guest that gets them.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::ensure;
use migrator::network::{Port, VNET_HEADER};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{CLIENT_MAC, DEADLINE, POD_MAC};

const MAGIC: [u8; 4] = *b"prob";
/// Offset of the payload: virtio-net header, Ethernet, IPv4, UDP.
const PAYLOAD: usize = VNET_HEADER + 14 + 20 + 8;
const FLOWS: u8 = 8;
/// This flow is broadcast.
pub(crate) const GROUP_FLOW: u8 = FLOWS;

pub(crate) fn probe(flow: u8, number: u64) -> Vec<u8> {
    let mut frame = vec![0; VNET_HEADER];
    let group = flow == GROUP_FLOW;
    frame.extend(if group { [0xff; 6] } else { POD_MAC.0 });
    frame.extend(CLIENT_MAC.0);
    frame.extend([0x08, 0x00, 0x45, 0, 0, 60, 0, 0, 0, 0, 64, 17, 0, 0]);
    frame.extend([10, 77, 1, flow, 10, 77, 0, 10]);
    frame.extend([0, 7, 0, 7, 0, 40, 0, 0]);
    frame.extend(MAGIC);
    frame.push(flow);
    frame.extend(number.to_be_bytes());
    frame.resize(VNET_HEADER + 74, 0);
    finish_ipv4(&mut frame);
    frame
}

/// Fills in the header's checksum: the netfilter hooks of a bridge drop a packet without it.
pub(crate) fn finish_ipv4(frame: &mut [u8]) {
    let header = &mut frame[VNET_HEADER + 14..VNET_HEADER + 34];
    let sum: u32 = header
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    header[10..12].copy_from_slice(&(!(folded as u16)).to_be_bytes());
}

/// Sends numbered frames at about 15,000 a second.
pub(crate) struct Sender {
    sent: Arc<Watched<u64>>,
    thread: JoinHandle<BTreeMap<u8, u64>>,
}

impl Sender {
    pub(crate) fn start(tap: OwnedFd, count: u64) -> Self {
        let sent = Arc::new(Watched::default());
        let progress = Arc::clone(&sent);
        let thread = std::thread::spawn(move || {
            let mut numbers = BTreeMap::new();
            let mut next = Instant::now();
            for i in 0..count {
                let flow = if i % 40 == 39 {
                    GROUP_FLOW
                } else {
                    (i % u64::from(FLOWS)) as u8
                };
                let number = numbers.entry(flow).or_insert(0);
                nix::unistd::write(tap.as_fd(), &probe(flow, *number)).expect("the client sends");
                *number += 1;
                if i % 15 == 14 {
                    progress.change(|sent| *sent = i + 1);
                    next += Duration::from_millis(1);
                    // Not a wait for anything: this is the pace of the traffic.
                    std::thread::sleep(next.saturating_duration_since(Instant::now()));
                }
            }
            progress.change(|sent| *sent = count);
            numbers
        });
        Self { sent, thread }
    }

    pub(crate) fn wait_for(&self, count: u64) -> anyhow::Result<()> {
        let sent = self.sent.wait_for(|sent| *sent >= count);
        ensure!(*sent >= count, "the sender stopped after {} frames", *sent);
        Ok(())
    }

    pub(crate) fn finish(self) -> BTreeMap<u8, u64> {
        self.thread.join().expect("the sender")
    }
}

/// A value that one thread changes and another waits for.
#[derive(Default)]
struct Watched<T> {
    value: Mutex<T>,
    changed: Condvar,
}

impl<T> Watched<T> {
    fn change(&self, how: impl FnOnce(&mut T)) {
        how(&mut self.value.lock().expect("not poisoned"));
        self.changed.notify_all();
    }

    /// The value as soon as it is as wanted, or after [`DEADLINE`] as it is then.
    fn wait_for(&self, wanted: impl Fn(&T) -> bool) -> MutexGuard<'_, T> {
        let value = self.value.lock().expect("not poisoned");
        let waited = self
            .changed
            .wait_timeout_while(value, DEADLINE, |value| !wanted(value));
        waited.expect("not poisoned").0
    }
}

/// What the guest has got, wherever it ran.
#[derive(Clone, Default)]
pub(crate) struct Inbox(Arc<Watched<Vec<(u8, u64)>>>);

impl Inbox {
    /// Frames that have come.
    pub(crate) fn count(&self) -> usize {
        self.0.wait_for(|_| true).len()
    }

    /// Until so many have come.
    pub(crate) fn wait_for_count(&self, count: usize) -> anyhow::Result<()> {
        let arrived = self.0.wait_for(|arrived| arrived.len() >= count).len();
        ensure!(arrived >= count, "only {arrived} frames came");
        Ok(())
    }

    /// How many have come, once the last frame of a flow is among them.
    pub(crate) fn arrived_of(&self, sent: &BTreeMap<u8, u64>) -> u64 {
        let last = |(flow, count): (&u8, &u64)| (*flow, count - 1);
        let lasts: Vec<_> = sent.iter().map(last).collect();
        let all = self
            .0
            .wait_for(|arrived| lasts.iter().all(|last| arrived.contains(last)));
        all.len() as u64
    }

    /// All but `lost` frames came, each once, and in order.
    pub(crate) fn check_but(&self, sent: &BTreeMap<u8, u64>, lost: u64) -> anyhow::Result<()> {
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
    pub(crate) fn check(&self, sent: &BTreeMap<u8, u64>) -> anyhow::Result<()> {
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
            "{} breaks: {:?}",
            wrong.len(),
            &wrong[..wrong.len().min(10)]
        );
        ensure!(&next == sent, "{next:?} came, {sent:?} was sent");
        Ok(())
    }
}

/// The thread at the other end of the TAP.
pub(crate) struct Guest {
    runs: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Guest {
    pub(crate) fn start(tap: OwnedFd, inbox: &Inbox) -> Self {
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

    /// Stops reading; what is in the TAP stays there.
    pub(crate) fn stop(self) {
        self.runs.store(false, Ordering::Release);
        self.thread.join().expect("the guest");
    }
}

fn parse(frame: &[u8]) -> Option<(u8, u64)> {
    let payload = frame.get(PAYLOAD..)?;
    let (magic, rest) = payload.split_first_chunk::<4>()?;
    let (flow, rest) = rest.split_first()?;
    let number = rest.first_chunk::<8>()?;
    (*magic == MAGIC).then(|| (*flow, u64::from_be_bytes(*number)))
}

/// The guest says something, so that the switch learns where it is.
pub(crate) fn say_hello(port: &Port) -> anyhow::Result<()> {
    let mut frame = vec![0; VNET_HEADER];
    frame.extend([0xff; 6]);
    frame.extend(POD_MAC.0);
    frame.extend([0x08, 0x06]);
    frame.resize(VNET_HEADER + 60, 0);
    nix::unistd::write(port.tap_fd()?.as_fd(), &frame)?;
    Ok(())
}
