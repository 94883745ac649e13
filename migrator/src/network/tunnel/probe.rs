//! The question whether frames for a pod come out of the tunnel at the other node. It is a VXLAN packet like any other, sent from a
//! socket and as long as the longest that the pod's frames will make; the other node's program sends it back.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

use migrator_ebpf::Probe;
use tokio::time::{Instant, sleep};
use vm_runtime::units::MacAddress;

use super::{NoTunnel, TunnelConfig, overhead};
use crate::network::gate::SlotGate;
use crate::network::sys;

/// How long an answer is waited for: a lost question for the neighbour is asked again after a second (`RETRANS_TIME`, ndisc and arp), and the relay
/// goes on meanwhile.
const ANSWER_LIMIT: Duration = Duration::from_millis(2500);
/// The question is sent again after this: UDP may lose it, and a neighbour may have to be found first.
const AGAIN: Duration = Duration::from_millis(50);
/// How often the answer is looked for.
const LOOK: Duration = Duration::from_millis(2);
/// Ethernet's header.
const ETHERNET: usize = 14;
/// RFC 7348: a header of 8 bytes, of which the first says that there is an identifier.
const VXLAN_HEADER: usize = 8;
const VXLAN_HAS_VNI: u8 = 0x08;

/// Asks, and waits for the answer.
pub(crate) async fn probe(
    gate: &SlotGate,
    config: TunnelConfig,
    (mac, mtu): (MacAddress, u32),
    remote: IpAddr,
) -> Result<(), NoTunnel> {
    let path_error = |source| NoTunnel::Path { remote, source };
    let socket = connect(remote, config.port).map_err(path_error)?;
    let path = sys::path_mtu(socket.as_fd(), remote.is_ipv6()).map_err(path_error)?;
    let overhead = overhead(remote);
    let too_narrow = |path| NoTunnel::TooNarrow {
        mtu,
        overhead,
        path,
        remote,
    };
    if path < mtu + overhead {
        return Err(too_narrow(path));
    }
    let probe = Probe {
        slot: gate.slot(),
        number: number(),
    };
    let packet = packet(probe, config.vni, mac, mtu);
    let until = Instant::now() + ANSWER_LIMIT;
    while Instant::now() < until {
        if let Err(source) = socket.send(&packet) {
            match source.raw_os_error() {
                // A router on the way has said how much it takes.
                Some(libc::EMSGSIZE) => {
                    let path = sys::path_mtu(socket.as_fd(), remote.is_ipv6()).unwrap_or(path);
                    return Err(too_narrow(path));
                }
                // Nobody listens over there, as an earlier question found out; or the queue is full.
                Some(libc::ECONNREFUSED | libc::EAGAIN | libc::ENOBUFS) => {}
                _ => return Err(path_error(source)),
            }
        }
        if is_answered(gate, probe.number).await {
            return Ok(());
        }
    }
    Err(NoTunnel::NoAnswer {
        remote,
        port: config.port,
        len: mtu + overhead,
    })
}

/// Waits for the answer until it is time to ask again.
pub(super) async fn is_answered(gate: &SlotGate, number: u64) -> bool {
    let again = Instant::now() + AGAIN;
    while Instant::now() < again {
        if gate.probed() == number {
            return true;
        }
        sleep(LOOK).await;
    }
    false
}

/// A number that no other node can guess, so that nobody else's answer is taken for this one's.
pub(super) fn number() -> u64 {
    // A hash under keys that are the kernel's random numbers. 0 is what the map holds before any answer.
    RandomState::new().build_hasher().finish() | 1
}

/// A socket whose packets are never cut on their way.
fn connect(remote: IpAddr, port: u16) -> std::io::Result<UdpSocket> {
    let any: IpAddr = match remote {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
    socket.set_nonblocking(true)?;
    sys::send_whole(socket.as_fd(), remote.is_ipv6())?;
    socket.connect(SocketAddr::new(remote, port))?;
    Ok(socket)
}

fn packet(probe: Probe, vni: u32, mac: MacAddress, mtu: u32) -> Vec<u8> {
    let mut packet = vec![VXLAN_HAS_VNI, 0, 0, 0];
    packet.extend((vni << 8).to_be_bytes());
    packet.extend(probe.ask(mac.0));
    let longest = VXLAN_HEADER + ETHERNET + mtu as usize;
    packet.resize(longest.max(packet.len()), 0);
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_question_is_as_long_as_the_pods_longest_frame() {
        let probe = Probe { slot: 1, number: 9 };
        let packet = packet(probe, 0x00ab_cdef, MacAddress([2, 0, 0, 0, 0, 1]), 1450);
        // With outer IPv4 and UDP: 1500.
        assert_eq!(packet.len() + 20 + 8, 1500);
        assert_eq!(packet[..8], [8, 0, 0, 0, 0xab, 0xcd, 0xef, 0]);
        assert_eq!(packet[8..14], [2, 0, 0, 0, 0, 1]);
    }

    #[test]
    fn numbers_differ_and_are_never_zero() {
        let (one, other) = (number(), number());
        assert!(one != 0 && one != other);
    }
}
