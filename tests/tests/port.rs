//! A pod's port on real devices: nodes and a client in namespaces of their own, joined by a switch.
//! The guest is a thread at the other end of the TAP. Every frame carries its flow and its number, so
//! that a lost, doubled or overtaken one is seen.

mod port_lab;

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, ensure};
use futures::FutureExt;
use migrator::network::{
    ExistingDevices, Ledger, LogKind, Port, Role, Stage, VNET_HEADER, XdpChoice,
};
use migrator_tests::netns::{set_vnet_header, take_segments_whole};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use port_lab::{
    CLIENT_MAC, Guest, Inbox, Lab, Node, POD_MAC, Sender, Setup, check_ledger, connect,
    finish_ipv4, pod, say_hello,
};
use tokio::sync::mpsc;
use vm_runtime::units::MacAddress;

/// One migration, as the conductor runs it.
fn migrate(
    (from, source, guest): (&Node, &Port, Guest),
    (to, slot): (&Node, u16),
    inbox: &Inbox,
) -> anyhow::Result<(Port, Guest)> {
    let destination = to.attach(&pod("pod", POD_MAC, 10), slot, Role::Incoming, None)?;
    let (sink, log) = mpsc::unbounded_channel();
    connect(log, source.clone(), destination.clone(), to)?;
    let port = source.clone();
    from.call(async move {
        port.reset_ledger().await?;
        port.hold(sink).await?;
        port.drain_tap(Duration::from_millis(5)).await;
        Ok::<_, migrator::network::PortError>(())
    })??;
    guest.stop();
    let port = source.clone();
    from.call(async move { port.residue().await })??;
    let port = destination.clone();
    to.call(async move { port.open().await })??;
    let guest = Guest::start(destination.tap_fd()?, inbox);
    let port = source.clone();
    from.call(async move { port.forward().await })??;
    let port = destination.clone();
    to.call(async move { port.settle().await })??;
    Ok((destination, guest))
}

/// A pod at a, whose guest has been heard of.
fn with_guest() -> anyhow::Result<(Lab, Inbox, Port, Guest)> {
    let lab = Lab::new()?;
    let inbox = Inbox::default();
    let at_a = lab
        .a
        .attach(&pod("pod", POD_MAC, 10), 1, Role::Local, None)?;
    let guest = Guest::start(at_a.tap_fd()?, &inbox);
    say_hello(&at_a)?;
    Ok((lab, inbox, at_a, guest))
}

#[test]
fn a_pod_moves_there_and_back_under_load_and_no_frame_is_lost() -> anyhow::Result<()> {
    let (lab, inbox, at_a, guest) = with_guest()?;
    let sender = lab.sender(50_000)?;

    sender.wait_for(10_000)?;
    let (at_b, guest) = migrate((&lab.a, &at_a, guest), (&lab.b, 7), &inbox)?;
    sender.wait_for(20_000)?;
    let port = at_a.clone();
    let ledger = lab.a.call(async move { port.release().await })??;
    check_ledger(&ledger)?;
    ensure!(ledger.forwarded > 0, "{ledger:?}");
    ensure!(
        ledger.reasons.refused_echo > 0,
        "the end marker: {ledger:?}"
    );
    let arrived = lab.b.ledger(&at_b)?;
    ensure!(arrived.reasons.end_timeouts == 0, "{arrived:?}");
    ensure!(
        arrived.reasons.log_received == ledger.forwarded,
        "{arrived:?} {ledger:?}"
    );

    sender.wait_for(30_000)?;
    let (at_a, guest) = migrate((&lab.b, &at_b, guest), (&lab.a, 2), &inbox)?;
    sender.wait_for(40_000)?;
    let port = at_b.clone();
    check_ledger(&lab.b.call(async move { port.release().await })??)?;

    let sent = sender.finish();
    inbox.check(&sent)?;
    let ledger = lab.a.settled_ledger(&at_a)?;
    check_ledger(&ledger)?;
    ensure!(at_a.stage() == Stage::Local);
    guest.stop();
    let port = at_a.clone();
    lab.a.call(async move { port.discard().await })??;
    ensure!(lab.a.netns.ip("link show mt2").is_err(), "the TAP is gone");
    Ok(())
}

#[test]
fn an_aborted_move_gives_every_frame_back_in_order() -> anyhow::Result<()> {
    let (lab, inbox, at_a, guest) = with_guest()?;
    let sender = lab.sender(30_000)?;

    sender.wait_for(5_000)?;
    let at_b = lab
        .b
        .attach(&pod("pod", POD_MAC, 10), 1, Role::Incoming, None)?;
    let (sink, log) = mpsc::unbounded_channel();
    connect(log, at_a.clone(), at_b.clone(), &lab.b)?;
    guest.stop();
    let port = at_a.clone();
    lab.a.call(async move {
        port.hold(sink).await?;
        port.residue().await
    })??;
    sender.wait_for(15_000)?;
    let port = at_b.clone();
    lab.b.call(async move { port.discard().await })??;
    let port = at_a.clone();
    lab.a.call(async move { port.rollback().await })??;
    let guest = Guest::start(at_a.tap_fd()?, &inbox);

    let sent = sender.finish();
    inbox.check(&sent)?;
    let port = at_a.clone();
    lab.a
        .call(async move { port.reached(Stage::Local).await })??;
    let ledger = lab.a.settled_ledger(&at_a)?;
    check_ledger(&ledger)?;
    ensure!(ledger.reasons.residue > 0, "{ledger:?}");
    guest.stop();
    Ok(())
}

#[test]
fn a_hold_that_nobody_waits_for_is_known_and_can_be_rolled_back() -> anyhow::Result<()> {
    let (lab, inbox, at_a, guest) = with_guest()?;
    let sender = lab.sender(10_000)?;
    sender.wait_for(1_000)?;
    for _ in 0..20 {
        let port = at_a.clone();
        let stage = lab.a.call(async move {
            let hold = port.hold(mpsc::unbounded_channel().0);
            // It asks, and gives up: usually before the port's thread has woken.
            drop(hold.now_or_never());
            let stage = port.stage_by_now().await?;
            port.rollback().await?;
            port.reached(Stage::Local).await?;
            Ok::<_, migrator::network::PortError>(stage)
        })??;
        ensure!(stage == Stage::Holding, "{stage}");
    }
    let sent = sender.finish();
    inbox.check(&sent)?;
    check_ledger(&lab.a.settled_ledger(&at_a)?)?;
    guest.stop();
    Ok(())
}

#[test]
fn a_pod_gets_its_frames_while_no_service_runs_and_the_next_one_takes_over() -> anyhow::Result<()> {
    let mut lab = Lab::new()?;
    let inbox = Inbox::default();
    let at_a = lab
        .a
        .attach(&pod("pod", POD_MAC, 10), 1, Role::Local, None)?;
    // What the VMM holds.
    let (tap, park) = (at_a.tap_fd()?, at_a.park_fd()?);
    let guest = Guest::start(tap.try_clone()?, &inbox);
    say_hello(&at_a)?;
    let sender = lab.sender(30_000)?;

    sender.wait_for(3_000)?;
    // Something was parked before, and something is when the service ends.
    let port = at_a.clone();
    lab.a
        .call(async move { port.hold(mpsc::unbounded_channel().0).await })??;
    sender.wait_for(4_000)?;
    let port = at_a.clone();
    lab.a.call(async move {
        port.rollback().await?;
        port.reached(Stage::Local).await
    })??;
    sender.wait_for(5_000)?;
    drop(at_a);
    sender.wait_for(10_000)?;
    lab.a.restart()?;
    ensure!(lab.a.network.slots() == [1]);
    let existing = ExistingDevices { tap, park };
    let at_a = lab
        .a
        .attach(&pod("pod", POD_MAC, 10), 1, Role::Local, Some(existing))?;
    ensure!(at_a.stage() == Stage::Local);
    sender.wait_for(15_000)?;
    ensure!(lab.a.ledger(&at_a)?.reasons.parked > 0);
    let (at_b, guest) = migrate((&lab.a, &at_a, guest), (&lab.b, 1), &inbox)?;
    let sent = sender.finish();
    inbox.check(&sent)?;
    guest.stop();
    let port = at_a.clone();
    check_ledger(&lab.a.call(async move { port.release().await })??)?;
    check_ledger(&lab.b.settled_ledger(&at_b)?)
}

/// A TCP segment of 40 KB that is to be cut at 1448 bytes, its checksum unfinished.
fn segment(number: u8) -> Vec<u8> {
    // struct virtio_net_hdr: NEEDS_CSUM, TCPV4, header length, segment size, checksum start and offset.
    let mut frame = vec![1, 1];
    for field in [54u16, 1448, 34, 16] {
        frame.extend(field.to_le_bytes());
    }
    let total: u16 = 20 + 20 + 40_000;
    frame.extend(POD_MAC.0);
    frame.extend(CLIENT_MAC.0);
    frame.extend([0x08, 0x00, 0x45, 0]);
    frame.extend(total.to_be_bytes());
    frame.extend([0, number, 0x40, 0, 64, 6, 0, 0]);
    frame.extend([10, 77, 1, 1, 10, 77, 0, 10]);
    frame.extend([0x14, 0x51, 0x14, 0x51, 0, 0, 0, number, 0, 0, 0, 0]);
    frame.extend([0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    frame.resize(VNET_HEADER + 14 + usize::from(total), number);
    finish_ipv4(&mut frame);
    frame
}

/// What must survive: everything but the header length, a hint that the kernel sets as it likes.
fn essence(frame: &[u8]) -> (&[u8], &[u8]) {
    (&frame[..2], &frame[4..])
}

fn read_frame(tap: &OwnedFd, header: usize) -> anyhow::Result<Vec<u8>> {
    let mut buffer = vec![0; 70_000];
    loop {
        let mut fds = [PollFd::new(tap.as_fd(), PollFlags::POLLIN)];
        ensure!(poll(&mut fds, PollTimeout::from(5_000u16))? > 0, "no frame");
        let len = nix::unistd::read(tap.as_fd(), &mut buffer)?;
        // Multicast of the bridges may come between.
        if buffer.get(header + 6..header + 12) == Some(&CLIENT_MAC.0) {
            return Ok([&buffer[..VNET_HEADER], &buffer[header..len]].concat());
        }
    }
}

#[test]
fn a_segment_crosses_park_residue_and_log_whole() -> anyhow::Result<()> {
    let lab = Lab::with(Setup {
        xdp: XdpChoice::Off,
        ..Setup::default()
    })?;
    take_segments_whole(lab.client_tap.as_fd())?;
    let at_a = lab
        .a
        .attach(&pod("pod", POD_MAC, 10), 1, Role::Local, None)?;
    let at_b = lab
        .b
        .attach(&pod("pod", POD_MAC, 10), 1, Role::Incoming, None)?;
    for port in [&at_a, &at_b] {
        set_vnet_header(port.tap_fd()?.as_fd(), 12)?;
    }
    take_segments_whole(at_a.tap_fd()?.as_fd())?;
    say_hello_12(&at_a)?;
    let frames: Vec<_> = (1..=3).map(segment).collect();

    // The first is left in the TAP, the second parked.
    nix::unistd::write(lab.client_tap.as_fd(), &frames[0])?;
    let (sink, mut log) = mpsc::unbounded_channel();
    let port = at_a.clone();
    lab.a.call(async move { port.hold(sink).await })??;
    nix::unistd::write(lab.client_tap.as_fd(), &frames[1])?;
    let port = at_a.clone();
    lab.a.call(async move { port.residue().await })??;
    let mut seen = Vec::new();
    while seen.len() < 2 {
        let item = log.blocking_recv().context("the log")?;
        if item.frame.get(VNET_HEADER + 6..VNET_HEADER + 12) == Some(&CLIENT_MAC.0) {
            seen.push(item.kind);
            let sent = match item.kind {
                LogKind::Residue => &frames[0],
                LogKind::Frame => &frames[1],
                LogKind::ResidueEnd | LogKind::End => anyhow::bail!("{item:?}"),
            };
            ensure!(essence(&item.frame) == essence(sent), "{:?}", item.kind);
        }
        at_b.log_input(item)?;
    }
    while let Ok(item) = log.try_recv() {
        at_b.log_input(item)?;
    }
    let port = at_b.clone();
    lab.b.call(async move { port.open().await })??;
    let tap = at_b.tap_fd()?;
    // Only now has the VMM loaded a guest that takes segments whole; until then they wait.
    take_segments_whole(tap.as_fd())?;
    for sent in &frames[..2] {
        let frame = read_frame(&tap, 12)?;
        ensure!(essence(&frame) == essence(sent));
    }
    let port = at_b.clone();
    lab.b.call(async move { port.settle().await })??;
    nix::unistd::write(lab.client_tap.as_fd(), &frames[2])?;
    let frame = read_frame(&tap, 12)?;
    ensure!(
        essence(&frame) == essence(&frames[2]),
        "{} bytes, {:02x?}",
        frame.len(),
        &frame[..80.min(frame.len())]
    );
    check_ledger(&lab.b.settled_ledger(&at_b)?)
}

/// As [`say_hello`], from a TAP with a header of 12 bytes.
fn say_hello_12(port: &Port) -> anyhow::Result<()> {
    let mut frame = vec![0; 12];
    frame.extend([0xff; 6]);
    frame.extend(POD_MAC.0);
    frame.extend([0x08, 0x06]);
    frame.resize(12 + 60, 0);
    nix::unistd::write(port.tap_fd()?.as_fd(), &frame)?;
    Ok(())
}

#[test]
fn a_sender_on_the_nodes_own_bridge_keeps_its_order_and_needs_no_relay_for_long()
-> anyhow::Result<()> {
    let lab = Lab::new()?;
    let inbox = Inbox::default();
    // On the source of the first move, which is the destination of the second one.
    let near = MacAddress([0x52, 0x54, 0, 0, 0, 0x22]);
    let near = lab.a.attach(&pod("near", near, 2), 3, Role::Local, None)?;
    let at_a = lab
        .a
        .attach(&pod("pod", POD_MAC, 10), 1, Role::Local, None)?;
    let guest = Guest::start(at_a.tap_fd()?, &inbox);
    say_hello(&at_a)?;
    let sender = Sender::start(near.tap_fd()?, 60_000);

    sender.wait_for(10_000)?;
    let (at_b, guest) = migrate((&lab.a, &at_a, guest), (&lab.b, 7), &inbox)?;
    let port = at_b.clone();
    lab.b
        .call(async move { port.reached(Stage::Local).await })??;
    sender.wait_for(20_000)?;
    let early = lab.a.ledger(&at_a)?;
    sender.wait_for(30_000)?;
    let late = lab.a.ledger(&at_a)?;
    let relayed = |ledger: &Ledger| ledger.forwarded - ledger.reasons.sent_out;
    ensure!(
        relayed(&early) > 0 && relayed(&early) == relayed(&late),
        "still relayed: {early:?}, then {late:?}"
    );
    ensure!(
        late.reasons.sent_out > early.reasons.sent_out,
        "not sent out: {early:?}, then {late:?}"
    );
    let port = at_a.clone();
    check_ledger(&lab.a.call(async move { port.release().await })??)?;

    sender.wait_for(40_000)?;
    let (at_a, guest) = migrate((&lab.b, &at_b, guest), (&lab.a, 1), &inbox)?;
    sender.wait_for(50_000)?;
    let port = at_b.clone();
    check_ledger(&lab.b.call(async move { port.release().await })??)?;
    inbox.check(&sender.finish())?;
    guest.stop();
    check_ledger(&lab.a.settled_ledger(&at_a)?)
}
