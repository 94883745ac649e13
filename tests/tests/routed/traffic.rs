//! Numbered datagrams from real sockets.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use migrator_tests::inbox::MAGIC;
use migrator_tests::netns::Netns;

/// Datagrams of a flow in a millisecond.
const EVERY: Duration = Duration::from_millis(1);

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
