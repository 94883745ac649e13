//! A TCP stream to a departed pod, through the tunnel: segments stay whole until the kernel cuts them behind the outer header.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, ensure};
use migrator_tests::netns::{Netns, open_tap, take_segments_whole};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::tunnel::{tunnel_to, wide};
use super::{
    DEADLINE, Guest, Inbox, Lab, POD_MAC, Role, Setup, XdpChoice, pod, say_hello, wait_for_port,
};
use crate::migrate;

const BYTES: usize = 40 << 20;
const CLIENT: &str = "02:4d:00:00:00:05";
const POD: &str = "52:54:00:00:00:10";
/// What a segment of TCP carries in 1500 bytes, with time stamps.
const SEGMENT: usize = 1448;

/// Carries frames from one TAP to another, as a VMM does between its guest and the TAP.
fn carry(from: OwnedFd, to: OwnedFd, runs: &Arc<AtomicBool>) {
    let runs = Arc::clone(runs);
    std::thread::spawn(move || {
        let mut buffer = vec![0; 70_000];
        while runs.load(Ordering::Acquire) {
            let mut fds = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(50u8)).expect("poll");
            while let Ok(len) = nix::unistd::read(from.as_fd(), &mut buffer) {
                // A device that is going down takes nothing: TCP sends it again.
                let _ = nix::unistd::write(to.as_fd(), &buffer[..len]);
            }
        }
    });
}

/// A namespace with an address, at the end of a cable or of a TAP.
fn host(
    netns: &Netns,
    device: &str,
    mac: &str,
    number: u32,
    peer: (u32, &str),
) -> anyhow::Result<()> {
    netns.ip(&format!("link set {device} address {mac} mtu 1500 up"))?;
    netns.ip(&format!("addr add 10.77.0.{number}/24 dev {device}"))?;
    let (peer, mac) = peer;
    netns.ip(&format!(
        "neigh replace 10.77.0.{peer} lladdr {mac} dev {device}"
    ))
}

fn pattern(at: usize) -> u8 {
    (at.wrapping_mul(2_654_435_761) >> 13) as u8
}

#[test]
fn a_tcp_stream_goes_through_the_tunnel_in_segments_that_are_cut_last() -> anyhow::Result<()> {
    // Segments come whole.
    let lab = Lab::with(Setup {
        xdp: XdpChoice::Off,
        ..wide()
    })?;
    let client = Netns::new()?;
    client.ip(&format!(
        "link add eth0 type veth peer name p9 netns {}",
        lab.switch.path().display()
    ))?;
    lab.switch.ip("link set p9 master sw0 up")?;
    host(&client, "eth0", CLIENT, 50, (10, POD))?;
    wait_for_port(&lab.switch, "p9")?;

    let inbox = Inbox::default();
    let at_a = lab
        .a
        .attach(&pod("pod", POD_MAC, 10), 1, Role::Local, None)?;
    let guest = Guest::start(at_a.tap_fd()?, &inbox);
    say_hello(&at_a)?;
    lab.switch.run(
        "bridge",
        &format!("fdb replace {POD} dev p1 master static sticky"),
    )?;
    let (at_b, guest) = migrate((&lab.a, &at_a, guest), (&lab.b, 7), &inbox)?;
    guest.stop();
    let guest = Netns::new()?;
    let tap = guest.spawn(|| open_tap("g0")).join().expect("the thread")?;
    for fd in [tap.as_fd(), at_b.tap_fd()?.as_fd()] {
        take_segments_whole(fd)?;
    }
    host(&guest, "g0", POD, 10, (50, CLIENT))?;
    let runs = Arc::new(AtomicBool::new(true));
    carry(at_b.tap_fd()?, tap.try_clone()?, &runs);
    carry(tap, at_b.tap_fd()?, &runs);

    tunnel_to(&lab.a, &at_a, "10.78.0.2")??;
    // The end marker may be on its way: only what comes after it goes that way.
    let socket = client
        .spawn(|| UdpSocket::bind("10.77.0.50:0"))
        .join()
        .expect("the thread")?;
    let until = Instant::now() + DEADLINE;
    while lab.a.ledger(&at_a)?.reasons.forwarded_tunnel == 0 {
        ensure!(Instant::now() < until, "no datagram took the tunnel");
        socket.send_to(b"x", "10.77.0.10:9")?;
    }
    let before = lab.a.ledger(&at_a)?;

    let listener = guest
        .spawn(|| TcpListener::bind("10.77.0.10:5001"))
        .join()
        .expect("the thread")?;
    let sending = client.spawn(|| -> std::io::Result<()> {
        let mut stream = TcpStream::connect("10.77.0.10:5001")?;
        let bytes: Vec<u8> = (0..BYTES).map(pattern).collect();
        stream.write_all(&bytes)
    });
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(DEADLINE))?;
    let mut received = Vec::with_capacity(BYTES);
    stream.read_to_end(&mut received)?;
    sending.join().expect("the thread")?;
    ensure!(received.len() == BYTES, "{} bytes came", received.len());
    let wrong = received
        .iter()
        .enumerate()
        .position(|(at, byte)| *byte != pattern(at));
    ensure!(wrong.is_none(), "the first wrong byte is at {wrong:?}");

    let after = lab.a.ledger(&at_a)?;
    let frames = after.reasons.forwarded_tunnel - before.reasons.forwarded_tunnel;
    let relayed = after.reasons.parked - before.reasons.parked;
    ensure!(relayed < 100, "{relayed} frames were relayed");
    let segments = (BYTES / SEGMENT) as u64;
    ensure!(
        frames > segments / 64 && frames < segments / 2,
        "{frames} frames for {segments} segments: they were cut before the tunnel"
    );
    ensure!(after.balances() && after.lost == 0, "{after:?}");
    runs.store(false, Ordering::Release);
    let port = at_a.clone();
    let ledger = lab.a.call(async move { port.release().await })?;
    ensure!(ledger.context("the books")?.lost == 0);
    Ok(())
}
