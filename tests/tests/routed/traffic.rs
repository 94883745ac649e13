//! Numbered datagrams from real sockets, and the guest that gets them.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::ensure;
use migrator::network::VNET_HEADER;
use migrator_tests::netns::Netns;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::DEADLINE;

const MAGIC: [u8; 4] = *b"prob";
/// Datagrams of a flow in a millisecond.
const EVERY: Duration = Duration::from_millis(1);

/// The flow and number of each datagram, in the order in which they came.
type Arrivals = Mutex<Vec<(u8, u64)>>;

/// What the guest has got, wherever it ran.
#[derive(Clone, Default)]
pub(crate) struct Inbox(Arc<(Arrivals, Condvar)>);

impl Inbox {
    fn take(&self, arrival: (u8, u64)) {
        self.0.0.lock().expect("not poisoned").push(arrival);
        self.0.1.notify_all();
    }

    /// Until so many of a flow have come.
    pub(crate) fn wait_for(&self, flow: u8, count: usize) -> anyhow::Result<()> {
        let arrived = self.0.0.lock().expect("not poisoned");
        let of = |arrived: &[(u8, u64)]| arrived.iter().filter(|(one, _)| *one == flow).count();
        let waited = self
            .0
            .1
            .wait_timeout_while(arrived, DEADLINE, |a| of(a) < count);
        let came = of(&waited.expect("not poisoned").0);
        ensure!(
            came >= count,
            "only {came} of flow {flow} came, {count} were waited for"
        );
        Ok(())
    }

    pub(crate) fn count(&self, flow: u8) -> usize {
        let arrived = self.0.0.lock().expect("not poisoned");
        arrived.iter().filter(|(one, _)| *one == flow).count()
    }

    /// Every datagram of every flow came once, and in order.
    pub(crate) fn check(&self, sent: &BTreeMap<u8, u64>) -> anyhow::Result<()> {
        let total: u64 = sent.values().sum();
        let arrived = self.0.0.lock().expect("not poisoned");
        let short = |arrived: &mut Vec<(u8, u64)>| (arrived.len() as u64) < total;
        let arrived = self.0.1.wait_timeout_while(arrived, DEADLINE, short);
        let arrived = arrived.expect("not poisoned").0;
        let mut next = BTreeMap::new();
        let mut wrong = Vec::new();
        for (flow, number) in arrived.iter() {
            let due = next.entry(*flow).or_insert(0);
            if number != due {
                wrong.push(format!("flow {flow}: {number} came, {due} was due"));
            }
            *due = number + 1;
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

/// Sends two flows from a namespace, one of each family, until it is stopped.
pub(crate) struct Sender {
    runs: Arc<AtomicBool>,
    thread: JoinHandle<BTreeMap<u8, u64>>,
}

impl Sender {
    pub(crate) fn start(netns: &Netns, flow: u8, to: [IpAddr; 2]) -> Self {
        let runs = Arc::new(AtomicBool::new(true));
        let go_on = Arc::clone(&runs);
        let thread = netns.spawn(move || {
            let sockets = to.map(|to| {
                let any = match to {
                    IpAddr::V4(_) => "0.0.0.0:0",
                    IpAddr::V6(_) => "[::]:0",
                };
                let socket = UdpSocket::bind(any).expect("a socket");
                socket.connect(SocketAddr::new(to, 7)).expect("a route");
                socket
            });
            let mut sent = BTreeMap::from([(flow, 0u64), (flow + 1, 0)]);
            let mut next = Instant::now();
            while go_on.load(Ordering::Acquire) {
                for (socket, (flow, number)) in sockets.iter().zip(&mut sent) {
                    let mut datagram = MAGIC.to_vec();
                    datagram.push(*flow);
                    datagram.extend(number.to_be_bytes());
                    socket.send(&datagram).expect("it is sent");
                    *number += 1;
                }
                next += EVERY;
                // Not a wait for anything: this is the pace of the traffic.
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
            }
            sent
        });
        Self { runs, thread }
    }

    pub(crate) fn finish(self) -> BTreeMap<u8, u64> {
        self.runs.store(false, Ordering::Release);
        self.thread.join().expect("the sender")
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
                    inbox.take(arrival);
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
