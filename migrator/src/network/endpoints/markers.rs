//! Sends end markers: on every lane, from every CPU.
//!
//! What a node has sent a pod by its old way may be in the queues of any CPU, and takes one of some paths through the network, chosen by the outer
//! header. A marker from each CPU on each lane is behind all of it, whichever way it went.

use std::io;

use migrator_ebpf::{EndMarker, LANES};
use vm_runtime::units::MacAddress;

use crate::network::grace;
use crate::network::sys::{PacketSocket, Sent};

/// One node's markers for one pod.
#[derive(Clone, Copy, Debug)]
pub(super) struct Markers {
    /// Interface index of the tunnel's device.
    pub(super) device: u32,
    /// This node's number for the one that they go to.
    pub(super) node: u16,
    pub(super) mac: MacAddress,
    pub(super) nonce: u64,
}

impl Markers {
    /// Waits until no frame is on its way that saw the pod at its old place, and sends them. Blocks, for less than a millisecond where
    /// every CPU can be visited. What a full queue does not take is asked for again.
    pub(super) fn send(self) -> io::Result<()> {
        grace::grace_period()?;
        let socket = PacketSocket::open(self.device)?;
        grace::on_each_cpu(move |cpu, cpus| {
            for lane in 0..LANES {
                let marker = EndMarker {
                    node: self.node,
                    part: cpu * LANES + lane,
                    parts: cpus * LANES,
                    nonce: self.nonce,
                };
                if socket.send(&marker.frame(self.mac.0)) != Sent::Queued {
                    return;
                }
            }
        })
    }
}
