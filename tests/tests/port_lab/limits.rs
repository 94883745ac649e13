//! More comes for a pod on its way than may be kept.

use anyhow::{Context, ensure};
use migrator::network::{LogItem, OnOverflow, Overflow, ParkLimits, Port, PortError, Role, Stage};
use tokio::sync::mpsc::{self, UnboundedReceiver};

use super::{
    DEADLINE, Guest, Inbox, Lab, POD_MAC, Sender, Setup, check_ledger, connect, pod, say_hello,
};

/// Some 700 of the probe's frames.
const SMALL: ParkLimits = ParkLimits {
    bytes: 1 << 20,
    bytes_per_pod: 1 << 16,
};

struct Held {
    lab: Lab,
    inbox: Inbox,
    at_a: Port,
    guest: Guest,
    sender: Sender,
}

/// A pod on node a, under traffic.
fn under_traffic(limits: ParkLimits, frames: u64) -> anyhow::Result<Held> {
    let lab = Lab::with(Setup {
        park: limits,
        ..Setup::default()
    })?;
    let inbox = Inbox::default();
    let id = pod("pod", POD_MAC, 10);
    let at_a = lab.a.attach(&id, 1, Role::Local, None)?;
    let guest = Guest::start(at_a.tap_fd()?, &inbox);
    say_hello(&at_a)?;
    let sender = lab.sender(frames)?;
    sender.wait_for(2_000)?;
    Ok(Held {
        lab,
        inbox,
        at_a,
        guest,
        sender,
    })
}

type Overflows = UnboundedReceiver<Result<Option<Overflow>, PortError>>;

/// Holds, by a rule; where the log comes out, and where it is told that it is full.
fn hold(stage: &Held, rule: OnOverflow) -> anyhow::Result<(UnboundedReceiver<LogItem>, Overflows)> {
    let (sink, log) = mpsc::unbounded_channel();
    let (told, overflows) = mpsc::unbounded_channel();
    let (port, watched) = (stage.at_a.clone(), stage.at_a.clone());
    stage.lab.a.call(async move {
        tokio::spawn(async move { told.send(watched.overflow().await) });
        port.reset_ledger().await?;
        port.on_overflow(rule);
        port.hold(sink).await
    })??;
    Ok((log, overflows))
}

fn wait<T: Send + 'static>(stage: &Held, mut from: UnboundedReceiver<T>) -> anyhow::Result<T> {
    let next = async move { tokio::time::timeout(DEADLINE, from.recv()).await };
    stage.lab.a.call(next)??.context("nobody tells")
}

fn roll_back(stage: &Held) -> anyhow::Result<()> {
    let port = stage.at_a.clone();
    stage.lab.a.call(async move {
        port.rollback().await?;
        port.reached(Stage::Local).await
    })??;
    Ok(())
}

#[test]
fn a_full_log_is_told_and_everything_is_delivered_when_the_move_is_aborted() -> anyhow::Result<()> {
    let stage = under_traffic(SMALL, 20_000)?;
    let (_log, overflows) = hold(&stage, OnOverflow::Abort)?;
    let overflow = wait(&stage, overflows)??;
    ensure!(overflow == Some(Overflow::Log(SMALL)), "{overflow:?}");
    // It is kept to the frame that passed the limit, and the rest waits in the park. A probe takes 100 bytes of it, and what the kernel
    // says of itself now and then (multicast groups, neighbours) somewhat more.
    stage.sender.wait_for(10_000)?;
    let port = stage.at_a.clone();
    let facts = stage.lab.a.call(async move { port.facts().await })??;
    let kept = facts.waits.backlog.log_bytes;
    ensure!(
        (SMALL.bytes_per_pod..SMALL.bytes_per_pod + 200).contains(&kept),
        "{kept}"
    );
    ensure!(facts.waits.park_frames > 0, "{facts:?}");
    ensure!(facts.gate.mode == "hold" && facts.balances, "{facts:?}");
    roll_back(&stage)?;
    let sent = stage.sender.finish();
    stage.inbox.check(&sent)?;
    check_ledger(&stage.lab.a.settled_ledger(&stage.at_a)?)?;
    stage.guest.stop();
    Ok(())
}

#[test]
fn logs_of_all_pods_are_bounded_together() -> anyhow::Result<()> {
    let limits = ParkLimits {
        bytes: 1 << 16,
        bytes_per_pod: 1 << 20,
    };
    let stage = under_traffic(limits, 15_000)?;
    let (_log, overflows) = hold(&stage, OnOverflow::Abort)?;
    let overflow = wait(&stage, overflows)??;
    ensure!(overflow == Some(Overflow::Log(limits)), "{overflow:?}");
    roll_back(&stage)?;
    let sent = stage.sender.finish();
    stage.inbox.check(&sent)?;
    stage.guest.stop();
    Ok(())
}

#[test]
fn after_the_grant_frames_beyond_the_limit_wait_and_none_is_lost() -> anyhow::Result<()> {
    let stage = under_traffic(SMALL, 20_000)?;
    let lab = &stage.lab;
    let id = pod("pod", POD_MAC, 10);
    let at_b = lab.b.attach(&id, 3, Role::Incoming, None)?;
    let (log, overflows) = hold(&stage, OnOverflow::Abort)?;
    connect(log, stage.at_a.clone(), at_b.clone(), &lab.b)?;
    let overflow = wait(&stage, overflows)??;
    ensure!(overflow.is_some());
    stage.sender.wait_for(8_000)?;
    stage.guest.stop();
    let port = stage.at_a.clone();
    lab.a.call(async move { port.residue().await })??;
    let port = at_b.clone();
    lab.b.call(async move { port.open().await })??;
    let guest = Guest::start(at_b.tap_fd()?, &stage.inbox);
    let port = stage.at_a.clone();
    lab.a.call(async move { port.forward().await })??;
    let port = at_b.clone();
    lab.b.call(async move { port.settle().await })??;
    let sent = stage.sender.finish();
    stage.inbox.check(&sent)?;
    let port = stage.at_a.clone();
    check_ledger(&lab.a.call(async move { port.release().await })??)?;
    check_ledger(&lab.b.settled_ledger(&at_b)?)?;
    guest.stop();
    Ok(())
}

#[test]
fn dropped_frames_are_the_newest_and_each_is_booked() -> anyhow::Result<()> {
    let stage = under_traffic(SMALL, 20_000)?;
    let (_log, _overflows) = hold(&stage, OnOverflow::Drop)?;
    stage.sender.wait_for(10_000)?;
    let port = stage.at_a.clone();
    let facts = stage.lab.a.call(async move { port.facts().await })??;
    let dropped = facts.ledger.reasons.lost_overflow;
    ensure!(dropped > 0 && facts.ledger.lost == dropped, "{facts:?}");
    ensure!(facts.balances, "{facts:?}");
    roll_back(&stage)?;
    let sent = stage.sender.finish();
    let ledger = stage.lab.a.settled_ledger(&stage.at_a)?;
    ensure!(ledger.balances() && ledger.held == 0, "{ledger:?}");
    ensure!(
        ledger.lost == ledger.reasons.lost_overflow && ledger.lost >= dropped,
        "{ledger:?}"
    );
    // Some of the lost may be the network's own, which the guest does not count.
    let missing = sent.values().sum::<u64>() - stage.inbox.arrived_of(&sent);
    ensure!(
        missing <= ledger.lost && missing > 0,
        "{missing} {ledger:?}"
    );
    stage.inbox.check_but(&sent, missing)?;
    stage.guest.stop();
    Ok(())
}

#[test]
fn a_full_queue_of_the_park_is_a_loss_that_is_told_and_flows_go_the_direct_way_afterwards()
-> anyhow::Result<()> {
    let stage = under_traffic(SMALL, 30_000)?;
    // While it is empty: the kernel counts nothing of what it drops from a queue that it shortens.
    stage.lab.a.netns.ip("link set mp1 txqueuelen 100")?;
    let (_log, overflows) = hold(&stage, OnOverflow::Abort)?;
    // Then the log is full, so nobody reads the queue.
    ensure!(wait(&stage, overflows)??.is_some());
    stage.sender.wait_for(10_000)?;
    stage.lab.a.netns.ip("link set mp1 txqueuelen 65536")?;
    roll_back(&stage)?;
    let sent = stage.sender.finish();
    let ledger = stage.lab.a.settled_ledger(&stage.at_a)?;
    ensure!(ledger.balances() && ledger.held == 0, "{ledger:?}");
    ensure!(
        ledger.lost > 0 && ledger.lost == ledger.reasons.lost_park,
        "{ledger:?}"
    );
    let port = stage.at_a.clone();
    let facts = stage.lab.a.call(async move { port.facts().await })??;
    ensure!(facts.waits.flow_frames == 0, "{facts:?}");
    let missing = sent.values().sum::<u64>() - stage.inbox.arrived_of(&sent);
    ensure!(missing <= ledger.lost, "{missing} {ledger:?}");
    stage.inbox.check_but(&sent, missing)?;
    stage.guest.stop();
    Ok(())
}
