//! Late frames of a departed pod, through the kernel's tunnel. The switch never learns where the pod has gone, so every frame of the
//! client keeps coming to the node that the pod has left.

use std::net::IpAddr;
use std::time::Instant;

use anyhow::{Context, ensure};
use migrator::network::{
    ExistingDevices, NoTunnel, Port, Reasons, Role, Stage, TUNNEL_DEVICE, TunnelConfig, TunnelInfo,
    tap_name,
};

use super::{
    DEADLINE, Guest, Inbox, Lab, Node, POD_MAC, Sender, Setup, Underlay, check_ledger, pod,
    say_hello, wait_for_port,
};
use crate::migrate;

/// Frames are of 1500 bytes at most, and the network between the nodes takes them with IPv4 or IPv6, UDP and VXLAN around them.
const UNDERLAY: Underlay = Underlay { mtu: 1600 };
const TUNNEL: TunnelConfig = TunnelConfig {
    vni: 77,
    port: 4789,
    mtu: Some(1500),
};

pub(super) fn wide() -> Setup {
    Setup {
        underlay: Some(UNDERLAY),
        tunnel: Some(TUNNEL),
        ..Setup::default()
    }
}

pub(super) const NODE_B: [&str; 2] = ["10.78.0.2", "fd78::2"];
pub(super) const SLOT_A: u16 = 1;

pub(super) fn tunnel_to(
    node: &Node,
    port: &Port,
    remote: &str,
) -> anyhow::Result<Result<(), NoTunnel>> {
    let (port, remote): (_, IpAddr) = (port.clone(), remote.parse()?);
    node.call(async move { port.tunnel_to(remote).await })
}

pub(super) fn info(node: &Node) -> anyhow::Result<TunnelInfo> {
    let network = node.network.clone();
    node.call(async move { network.tunnel_info().await })
}

/// Waits until a port's books say so.
pub(super) fn wait_until(
    node: &Node,
    port: &Port,
    so: impl Fn(&Reasons) -> bool,
) -> anyhow::Result<()> {
    let until = Instant::now() + DEADLINE;
    loop {
        let ledger = node.ledger(port)?;
        if so(&ledger.reasons) {
            return Ok(());
        }
        ensure!(Instant::now() < until, "{ledger:?}");
        std::thread::yield_now();
    }
}

/// Waits until at least so many frames have gone through the tunnel.
fn tunnelled(node: &Node, port: &Port, least: u64) -> anyhow::Result<()> {
    wait_until(node, port, |reasons| reasons.forwarded_tunnel >= least)
}

/// Waits until every flow has changed over: hundreds of frames have gone through the tunnel, and none has been relayed meanwhile.
fn relays_no_more(node: &Node, port: &Port) -> anyhow::Result<()> {
    let until = Instant::now() + DEADLINE;
    let books = || -> anyhow::Result<(u64, u64)> {
        let ledger = node.ledger(port)?;
        let tunnelled = ledger.reasons.forwarded_tunnel;
        Ok((ledger.forwarded - tunnelled + ledger.held, tunnelled))
    };
    let (mut relayed, mut since) = books()?;
    loop {
        let (now, tunnelled) = books()?;
        if now != relayed {
            (relayed, since) = (now, tunnelled);
        } else if tunnelled - since > 500 {
            return Ok(());
        }
        ensure!(Instant::now() < until, "{now} are relayed, and more come");
        std::thread::yield_now();
    }
}

/// A pod that has moved from a to b, under a load of `count` frames that all go to a.
pub(super) struct Departed {
    pub(super) lab: Lab,
    pub(super) inbox: Inbox,
    pub(super) sender: Sender,
    pub(super) at_a: Port,
    pub(super) at_b: Port,
    pub(super) guest: Guest,
}

fn departed(count: u64) -> anyhow::Result<Departed> {
    departed_in(Lab::with(wide())?, count)
}

pub(super) fn departed_in(lab: Lab, count: u64) -> anyhow::Result<Departed> {
    let inbox = Inbox::default();
    let at_a = lab
        .a
        .attach(&pod("pod", POD_MAC, 10), SLOT_A, Role::Local, None)?;
    let guest = Guest::start(at_a.tap_fd()?, &inbox);
    say_hello(&at_a)?;
    lab.switch.run(
        "bridge",
        "fdb replace 52:54:00:00:00:10 dev p1 master static sticky",
    )?;
    let sender = lab.sender(count)?;
    sender.wait_for(5_000)?;
    let (at_b, guest) = migrate((&lab.a, &at_a, guest), (&lab.b, 7), &inbox)?;
    Ok(Departed {
        lab,
        inbox,
        sender,
        at_a,
        at_b,
        guest,
    })
}

/// Node a's service ends, and the next one finds the pod; what happens `meanwhile` is up to the kernel alone.
pub(super) fn next_service(
    lab: &mut Lab,
    at_a: Port,
    meanwhile: impl FnOnce(&mut Lab) -> anyhow::Result<()>,
) -> anyhow::Result<Port> {
    let existing = ExistingDevices {
        tap: at_a.tap_fd()?,
        park: at_a.park_fd()?,
    };
    drop(at_a);
    meanwhile(lab)?;
    lab.a.restart()?;
    let pod = pod("pod", POD_MAC, 10);
    lab.a.attach(&pod, SLOT_A, Role::Local, Some(existing))
}

impl Departed {
    /// Every frame came once and in order, and both nodes' books say how.
    pub(super) fn finish(
        self,
        through_the_tunnel: impl Fn(&Reasons) -> bool,
    ) -> anyhow::Result<()> {
        let sent = self.sender.finish();
        self.inbox.check(&sent)?;
        let left = self.lab.a.settled_ledger(&self.at_a)?;
        check_ledger(&left)?;
        ensure!(through_the_tunnel(&left.reasons), "{left:?}");
        let arrived = self.lab.b.settled_ledger(&self.at_b)?;
        check_ledger(&arrived)?;
        ensure!(
            arrived.reasons.landed == left.reasons.forwarded_tunnel,
            "{left:?} {arrived:?}"
        );
        ensure!(
            arrived.reasons.log_received + arrived.reasons.landed == left.forwarded,
            "{left:?} {arrived:?}"
        );
        ensure!(arrived.reasons.end_timeouts == 0, "{arrived:?}");
        let port = self.at_a.clone();
        check_ledger(&self.lab.a.call(async move { port.release().await })??)?;
        self.guest.stop();
        Ok(())
    }
}

#[test]
fn frames_of_a_sender_that_never_learns_go_through_the_tunnel_in_order() -> anyhow::Result<()> {
    for remote in NODE_B {
        let departed = departed(50_000)?;
        // The bridge has heard the pod on its uplink, and would send no frame back to where it came from.
        let entries = departed.lab.a.netns.run("bridge", "fdb show br br0")?;
        let tap = tap_name(SLOT_A);
        ensure!(
            entries
                .lines()
                .any(|line| line.contains("52:54:00:00:00:10")
                    && line.contains(&format!("dev {tap} "))
                    && line.contains("sticky")),
            "{entries}"
        );
        departed.sender.wait_for(10_000)?;
        tunnel_to(&departed.lab.a, &departed.at_a, remote)??;
        // A veth takes nothing by XDP unless its other end is set up for it.
        let problem = info(&departed.lab.a)?.xdp_problem.context("a reason")?;
        ensure!(problem.contains("receive offload"), "{problem}");
        departed
            .finish(|reasons| reasons.forwarded_tunnel > 20_000 && reasons.forwarded_xdp == 0)
            .with_context(|| format!("over {remote}"))?;
    }
    Ok(())
}

#[test]
fn a_killed_service_leaves_the_tunnel_to_the_kernel_and_the_next_one_takes_it_over()
-> anyhow::Result<()> {
    let mut departed = departed(60_000)?;
    tunnel_to(&departed.lab.a, &departed.at_a, NODE_B[0])??;
    tunnelled(&departed.lab.a, &departed.at_a, 5_000)?;
    departed.at_a = next_service(&mut departed.lab, departed.at_a, |_| {
        departed
            .inbox
            .wait_for_count(departed.inbox.count() + 10_000)
    })?;
    let info = info(&departed.lab.a)?;
    ensure!(info.device.as_deref() == Some(TUNNEL_DEVICE), "{info:?}");
    ensure!(departed.at_a.stage() == Stage::Forwarding);
    // Asked again, as the next service does: it goes on as it is.
    tunnel_to(&departed.lab.a, &departed.at_a, NODE_B[0])??;
    let sent = departed.sender.finish();
    departed.inbox.check(&sent)?;
    let left = departed.lab.a.settled_ledger(&departed.at_a)?;
    ensure!(left.reasons.forwarded_tunnel > 20_000, "{left:?}");
    check_ledger(&left)?;
    let port = departed.at_a.clone();
    departed.lab.a.call(async move { port.release().await })??;
    departed.guest.stop();
    Ok(())
}

#[test]
fn a_service_whose_tunnel_is_turned_off_relays_what_still_comes() -> anyhow::Result<()> {
    let mut departed = departed(40_000)?;
    tunnel_to(&departed.lab.a, &departed.at_a, NODE_B[0])??;
    tunnelled(&departed.lab.a, &departed.at_a, 2_000)?;
    // No frame is on its way while it is changed over.
    let sent = departed.sender.finish();
    departed.inbox.check(&sent)?;
    departed.at_a = next_service(&mut departed.lab, departed.at_a, |lab| {
        lab.a.setup.tunnel = None;
        Ok(())
    })?;
    let gone = departed
        .lab
        .a
        .netns
        .ip(&format!("link show {TUNNEL_DEVICE}"));
    ensure!(gone.is_err(), "the device is gone");
    let refused = tunnel_to(&departed.lab.a, &departed.at_a, NODE_B[0])?;
    ensure!(matches!(refused, Err(NoTunnel::Off)), "{refused:?}");
    let before = departed.lab.a.ledger(&departed.at_a)?;
    let sender = departed.lab.sender(400)?;
    sender.finish();
    let until = Instant::now() + DEADLINE;
    loop {
        let now = departed.lab.a.ledger(&departed.at_a)?;
        // All but the broadcast ones: one in forty.
        if now.reasons.parked - before.reasons.parked >= 390 {
            ensure!(
                now.reasons.forwarded_tunnel == before.reasons.forwarded_tunnel,
                "{now:?}"
            );
            break;
        }
        ensure!(Instant::now() < until, "{now:?}");
        std::thread::yield_now();
    }
    departed.guest.stop();
    Ok(())
}

#[test]
fn a_way_that_is_too_narrow_or_shut_is_found_out_and_the_relay_goes_on() -> anyhow::Result<()> {
    let departed = departed(200_000)?;
    let lab = &departed.lab;
    let tried = |remote: &str| tunnel_to(&lab.a, &departed.at_a, remote);

    // The route says so.
    lab.a.netns.ip("route add 10.78.0.2/32 dev br0 mtu 1549")?;
    let refused = tried(NODE_B[0])?;
    ensure!(
        matches!(
            refused,
            Err(NoTunnel::TooNarrow {
                mtu: 1500,
                overhead: 50,
                path: 1549,
                ..
            })
        ),
        "{refused:?}"
    );
    lab.a.netns.ip("route del 10.78.0.2/32 dev br0")?;
    // The way to there is fine, but somewhere in the middle a port is too narrow, and says nothing.
    lab.switch.ip("link set p2 mtu 1549")?;
    let refused = tried(NODE_B[0])?;
    ensure!(
        matches!(refused, Err(NoTunnel::NoAnswer { len: 1550, .. })),
        "{refused:?}"
    );
    let problem = info(&lab.a)?.problem.context("a reason")?;
    ensure!(problem.contains("1550 bytes"), "{problem}");
    lab.switch.ip("link set p2 mtu 1569")?;
    // Enough for IPv4, one byte too few for IPv6.
    let refused = tried(NODE_B[1])?;
    ensure!(
        matches!(refused, Err(NoTunnel::NoAnswer { len: 1570, .. })),
        "{refused:?}"
    );
    // Nobody is there.
    let refused = tried("10.78.0.99")?;
    ensure!(
        matches!(
            refused,
            Err(NoTunnel::NoAnswer { .. } | NoTunnel::Path { .. })
        ),
        "{refused:?}"
    );
    // Until here everything was relayed.
    let ledger = lab.a.ledger(&departed.at_a)?;
    ensure!(
        ledger.reasons.forwarded_tunnel == 0 && ledger.forwarded > 0,
        "{ledger:?}"
    );
    tried(NODE_B[0])??;
    departed.finish(|reasons| reasons.forwarded_tunnel > 1_000)
}

#[test]
fn a_node_whose_port_is_taken_says_so_and_relays() -> anyhow::Result<()> {
    let mut lab = Lab::with(wide())?;
    lab.a.setup.tunnel = None;
    lab.a.restart()?;
    lab.a
        .netns
        .ip("link add other type vxlan external dstport 4789")?;
    lab.a.netns.ip("link set other up")?;
    lab.a.setup.tunnel = Some(TUNNEL);
    lab.a.restart()?;
    let info = info(&lab.a)?;
    ensure!(info.device.is_none(), "{info:?}");
    let problem = info.problem.context("a reason")?;
    ensure!(problem.contains("UDP port 4789 is taken"), "{problem}");
    let at_a = lab
        .a
        .attach(&pod("pod", POD_MAC, 10), SLOT_A, Role::Local, None)?;
    let refused = tunnel_to(&lab.a, &at_a, NODE_B[0])?;
    ensure!(matches!(refused, Err(NoTunnel::Broken(_))), "{refused:?}");
    Ok(())
}

#[test]
fn frames_follow_a_pod_that_moves_on_through_both_nodes_that_it_has_left() -> anyhow::Result<()> {
    let departed = departed(400_000)?;
    let Departed {
        lab,
        inbox,
        sender,
        at_a,
        at_b,
        guest,
    } = departed;
    let c = Node::new(&lab.switch, 4, wide())?;
    wait_for_port(&lab.switch, "p4")?;
    wait_for_port(&c.netns, "eth0")?;
    tunnel_to(&lab.a, &at_a, NODE_B[0])??;
    tunnelled(&lab.a, &at_a, 3_000)?;
    relays_no_more(&lab.a, &at_a)?;
    let (at_c, guest) = migrate((&lab.b, &at_b, guest), (&c, 3), &inbox)?;
    tunnel_to(&lab.b, &at_b, "10.78.0.4")??;
    // All have changed over. On CPUs that others want, the kernel's own queues between virtual devices keep no order for long.
    tunnelled(&lab.b, &at_b, 3_000)?;
    relays_no_more(&lab.b, &at_b)?;
    sender.enough();
    let sent = sender.finish();
    inbox.check(&sent)?;
    let (by_a, by_b) = (lab.a.settled_ledger(&at_a)?, lab.b.settled_ledger(&at_b)?);
    let at_last = c.settled_ledger(&at_c)?;
    for ledger in [&by_a, &by_b, &at_last] {
        check_ledger(ledger)?;
    }
    ensure!(
        at_last.reasons.landed == by_b.reasons.forwarded_tunnel,
        "{by_b:?} {at_last:?}"
    );
    guest.stop();
    Ok(())
}
