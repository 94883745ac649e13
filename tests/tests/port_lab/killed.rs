//! A source's service that is killed with frames in its hands. To the port it is all the same as a service that ends: the
//! thread stops where it is.

use anyhow::ensure;
use migrator::network::{
    ExistingDevices, FIRST_FRAME_SEQ, LogItem, LogKind, Port, Role, Stage, VNET_HEADER,
};
use tokio::sync::mpsc;

use super::{Guest, Inbox, Lab, POD_MAC, Sender, check_ledger, connect, pod, probe, say_hello};

/// The service is gone without a release; the next one finds the devices.
fn restart(lab: &mut Lab, port: Port) -> anyhow::Result<Port> {
    restart_with(lab, port, None)
}

/// A packet in the hands of a service that was killed.
struct Landed {
    /// 0: it is out of the park. 1: out of the TAP.
    source: u64,
    number: u64,
    frame: Vec<u8>,
}

impl Landed {
    /// The file that it is in: migrator/src/network/landing.rs has the format.
    fn file(&self) -> Vec<u8> {
        let mut file = b"mland01\n".to_vec();
        for word in [self.source, VNET_HEADER as u64, self.number] {
            file.extend(word.to_le_bytes());
        }
        file.resize(64, 0);
        file.extend(&self.frame);
        file.resize(64 + (64 << 10) + 128 + 64, 0xa5);
        file
    }
}

/// The same, and the service had something in its hands.
fn restart_with(lab: &mut Lab, port: Port, landed: Option<Landed>) -> anyhow::Result<Port> {
    let (tap, park) = (port.tap_fd()?, port.park_fd()?);
    drop(port);
    if let Some(landed) = landed {
        let folder = lab.a.spool.path().join("spool");
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join("1.landing"), landed.file())?;
    }
    lab.a.restart()?;
    let existing = ExistingDevices { tap, park };
    lab.a
        .attach(&pod("pod", POD_MAC, 10), 1, Role::Local, Some(existing))
}

/// A pod at node a, killed service and all, with 5,000 frames and more parked: some left in the TAP when its guest stopped.
fn killed_while_it_holds(
    lab: &mut Lab,
    inbox: &Inbox,
    sink: mpsc::UnboundedSender<LogItem>,
) -> anyhow::Result<(Port, Sender)> {
    let at_a = lab
        .a
        .attach(&pod("pod", POD_MAC, 10), 1, Role::Local, None)?;
    let guest = Guest::start(at_a.tap_fd()?, inbox);
    say_hello(&at_a)?;
    let sender = lab.sender(30_000)?;
    sender.wait_for(5_000)?;
    guest.stop();
    let port = at_a.clone();
    lab.a.call(async move {
        port.hold(sink).await?;
        port.residue().await
    })??;
    sender.wait_for(10_000)?;
    let at_a = restart(lab, at_a)?;
    ensure!(at_a.stage() == Stage::Holding);
    Ok((at_a, sender))
}

#[test]
fn a_service_killed_while_it_holds_leaves_every_frame_to_the_next_one() -> anyhow::Result<()> {
    let mut lab = Lab::new()?;
    let inbox = Inbox::default();
    let sink = mpsc::unbounded_channel().0;
    let (at_a, sender) = killed_while_it_holds(&mut lab, &inbox, sink)?;
    let ledger = lab.a.ledger(&at_a)?;
    ensure!(ledger.held > 0 && ledger.lost == 0, "{ledger:?}");
    // Nobody reads, and the TAP is soon full: this one is killed in the middle of its rollback.
    lab.a.netns.ip("link set mt1 txqueuelen 500")?;
    let port = at_a.clone();
    lab.a.call(async move { port.rollback().await })??;
    sender.wait_for(15_000)?;
    ensure!(at_a.stage() == Stage::RollingBack);
    let at_a = restart(&mut lab, at_a)?;
    sender.wait_for(20_000)?;
    let port = at_a.clone();
    lab.a.call(async move { port.rollback().await })??;
    let guest = Guest::start(at_a.tap_fd()?, &inbox);
    let sent = sender.finish();
    inbox.check(&sent)?;
    let port = at_a.clone();
    lab.a
        .call(async move { port.reached(Stage::Local).await })??;
    check_ledger(&lab.a.settled_ledger(&at_a)?)?;
    guest.stop();
    let kept = std::fs::read_dir(lab.a.spool.path().join("spool"))?;
    ensure!(kept.count() == 0, "the spool is left");
    Ok(())
}

#[test]
fn a_service_killed_while_it_holds_or_forwards_sends_its_log_again() -> anyhow::Result<()> {
    let mut lab = Lab::new()?;
    let inbox = Inbox::default();
    let at_b = lab
        .b
        .attach(&pod("pod", POD_MAC, 10), 1, Role::Incoming, None)?;
    // The wire takes some of it, and is cut.
    let (sink, mut log) = mpsc::unbounded_channel();
    let (at_a, sender) = killed_while_it_holds(&mut lab, &inbox, sink)?;
    for _ in 0..3_000 {
        at_b.log_input(log.try_recv()?)?;
    }
    let (sink, mut log) = mpsc::unbounded_channel();
    let port = at_a.clone();
    lab.a.call(async move { port.resend(sink).await })??;
    for _ in 0..4_000 {
        at_b.log_input(log.try_recv()?)?;
    }
    // As in a migration: nothing is forwarded before the destination is open, and has said where the pod is now.
    let port = at_b.clone();
    lab.b.call(async move { port.open().await })??;
    let port = at_a.clone();
    lab.a.call(async move { port.forward().await })??;
    // Some of it is acknowledged, and the service is killed again.
    at_a.ack(FIRST_FRAME_SEQ + 1_000);
    sender.wait_for(15_000)?;
    let at_a = restart(&mut lab, at_a)?;
    ensure!(at_a.stage() == Stage::Forwarding);
    let (sink, mut log) = mpsc::unbounded_channel();
    let port = at_a.clone();
    lab.a.call(async move { port.resend(sink).await })??;
    let first = log.try_recv()?;
    ensure!(first.kind == LogKind::ResidueEnd, "{first:?}");
    let next = log.try_recv()?;
    ensure!(next.seq == FIRST_FRAME_SEQ + 1_001, "{next:?}");
    at_b.log_input(next)?;
    // The destination waits for the log only so long once it is opened.
    while let Ok(item) = log.try_recv() {
        at_b.log_input(item)?;
    }
    connect(log, at_a.clone(), at_b.clone(), &lab.b)?;
    let guest = Guest::start(at_b.tap_fd()?, &inbox);
    let port = at_b.clone();
    lab.b.call(async move { port.settle().await })??;
    let sent = sender.finish();
    inbox.check(&sent)?;
    guest.stop();
    let port = at_a.clone();
    check_ledger(&lab.a.call(async move { port.release().await })??)?;
    check_ledger(&lab.b.settled_ledger(&at_b)?)
}

/// To a pod that has settled comes only what a sender at the source's own node still gives its old gate.
#[test]
fn a_destination_killed_after_it_settled_takes_what_is_still_relayed() -> anyhow::Result<()> {
    let mut lab = Lab::new()?;
    let inbox = Inbox::default();
    let at_b = lab
        .b
        .attach(&pod("pod", POD_MAC, 10), 1, Role::Incoming, None)?;
    let item = |seq, kind, frame: Vec<u8>| LogItem {
        seq,
        kind,
        frame: frame.into(),
    };
    let log = [
        item(1, LogKind::ResidueEnd, Vec::new()),
        item(FIRST_FRAME_SEQ, LogKind::Frame, probe(0, 0)),
        item(FIRST_FRAME_SEQ + 1, LogKind::End, Vec::new()),
        item(FIRST_FRAME_SEQ + 2, LogKind::Frame, probe(0, 1)),
    ];
    let guest = Guest::start(at_b.tap_fd()?, &inbox);
    let port = at_b.clone();
    lab.b.call(async move { port.open().await })??;
    for item in &log[..3] {
        at_b.log_input(item.clone())?;
    }
    let port = at_b.clone();
    lab.b.call(async move {
        port.settle().await?;
        port.reached(Stage::Local).await
    })??;
    let (tap, park) = (at_b.tap_fd()?, at_b.park_fd()?);
    drop(at_b);
    lab.b.restart()?;
    let existing = Some(ExistingDevices { tap, park });
    let at_b = lab
        .b
        .attach(&pod("pod", POD_MAC, 10), 1, Role::Local, existing)?;
    // The source knows only what was acknowledged.
    for item in log {
        at_b.log_input(item)?;
    }
    inbox.check(&[(0, 2)].into())?;
    let mut acked = at_b.acked();
    let told = lab.b.call(async move {
        let last = FIRST_FRAME_SEQ + 2;
        acked.wait_for(|seq| *seq == last).await.is_ok()
    })?;
    ensure!(told, "the source is not told");
    guest.stop();
    check_ledger(&lab.b.settled_ledger(&at_b)?)
}

#[test]
fn what_a_killed_service_had_in_its_hands_is_dealt_with_once() -> anyhow::Result<()> {
    let mut lab = Lab::new()?;
    let inbox = Inbox::default();
    let mut at_a = lab
        .a
        .attach(&pod("pod", POD_MAC, 10), 1, Role::Local, None)?;
    let port = at_a.clone();
    lab.a
        .call(async move { port.hold(mpsc::unbounded_channel().0).await })??;
    let landed = |source, number, frame| Landed {
        source,
        number,
        frame,
    };
    // Each was in its hands, and then the next service has logged it when it is killed, but not said that its hands are free. What else the network
    // sends has numbers too, so one that nobody has given out is far off.
    for (source, numbers) in [(0, [FIRST_FRAME_SEQ << 1, FIRST_FRAME_SEQ]), (1, [1, 1])] {
        for number in numbers {
            let in_hands = landed(source, number, probe(source as u8, 0));
            at_a = restart_with(&mut lab, at_a, Some(in_hands))?;
            ensure!(at_a.stage() == Stage::Holding);
            // Between two answers its thread has looked at the park.
            lab.a.ledger(&at_a)?;
            ensure!(lab.a.ledger(&at_a)?.held > source, "it is not held");
        }
    }
    let guest = Guest::start(at_a.tap_fd()?, &inbox);
    let port = at_a.clone();
    lab.a.call(async move {
        port.rollback().await?;
        port.reached(Stage::Local).await
    })??;
    inbox.check(&[(0, 1), (1, 1)].into())?;
    // One that goes to the guest without a number.
    let at_a = restart_with(&mut lab, at_a, Some(landed(0, 0, probe(2, 0))))?;
    ensure!(at_a.stage() == Stage::Local);
    inbox.check(&[(0, 1), (1, 1), (2, 1)].into())?;
    let at_a = restart(&mut lab, at_a)?;
    inbox.check(&[(0, 1), (1, 1), (2, 1)].into())?;
    guest.stop();
    let kept = std::fs::read_dir(lab.a.spool.path().join("spool"))?;
    ensure!(kept.count() == 0, "something is left of {:?}", at_a.slot());
    Ok(())
}
