//! Numbered frames, and who sends them.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::ensure;
use migrator::network::{Port, VNET_HEADER};
use migrator_tests::inbox::{MAGIC, Watched};
use nix::sched::{CpuSet, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;

use super::{CLIENT_MAC, POD_MAC};

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

/// What a thread writes to a TAP waits in the queue of its CPU, as frames of one flow wait in one queue of a NIC. A thread that changes CPUs while
/// the machine is busy overtakes itself, before anything of ours has seen the frames.
fn stay_on_this_cpu() {
    let mut one = CpuSet::new();
    let stays = sched_getcpu()
        .and_then(|cpu| one.set(cpu))
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &one));
    stays.expect("the kernel lets a thread choose its CPU");
}

/// Sends numbered frames at about 15,000 a second.
pub(crate) struct Sender {
    sent: Arc<Watched<u64>>,
    enough: Arc<AtomicBool>,
    thread: JoinHandle<BTreeMap<u8, u64>>,
}

impl Sender {
    pub(crate) fn start(tap: OwnedFd, count: u64) -> Self {
        let sent = Arc::new(Watched::default());
        let progress = Arc::clone(&sent);
        let enough = Arc::new(AtomicBool::new(false));
        let ends = Arc::clone(&enough);
        let thread = std::thread::spawn(move || {
            stay_on_this_cpu();
            let mut numbers = BTreeMap::new();
            let mut next = Instant::now();
            for i in (0..count).take_while(|_| !ends.load(Ordering::Relaxed)) {
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
            progress.change(|sent| *sent = numbers.values().sum());
            numbers
        });
        Self {
            sent,
            enough,
            thread,
        }
    }

    pub(crate) fn wait_for(&self, count: u64) -> anyhow::Result<()> {
        let sent = self.sent.wait_for(|sent| *sent >= count);
        ensure!(*sent >= count, "the sender stopped after {} frames", *sent);
        Ok(())
    }

    /// Sends no more than it has by now.
    pub(crate) fn enough(&self) {
        self.enough.store(true, Ordering::Relaxed);
    }

    pub(crate) fn finish(self) -> BTreeMap<u8, u64> {
        self.thread.join().expect("the sender")
    }
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
