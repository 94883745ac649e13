//! Late frames of a departed pod, sent on by the uplink's program. As in [`tunnel`](super::tunnel), but the other end of a's cable takes what XDP
//! redirects to it.

use std::time::Instant;

use anyhow::{Context, ensure};
use migrator::network::{Port, Stage};

use super::tunnel::{
    Departed, NODE_B, departed_in, info, next_service, tunnel_to, wait_until, wide,
};
use super::{DEADLINE, Lab, Node, check_ledger};

fn departed(count: u64) -> anyhow::Result<Departed> {
    let lab = Lab::with(wide())?;
    lab.switch.collect("p1")?;
    departed_in(lab, count)
}

fn wait_for_xdp(node: &Node, port: &Port, least: u64) -> anyhow::Result<()> {
    wait_until(node, port, |reasons| reasons.forwarded_xdp >= least)
}

#[test]
fn flows_change_from_the_relay_to_xdp_in_order() -> anyhow::Result<()> {
    for remote in NODE_B {
        let departed = departed(50_000)?;
        departed.sender.wait_for(10_000)?;
        tunnel_to(&departed.lab.a, &departed.at_a, remote)??;
        let info = info(&departed.lab.a)?;
        ensure!(info.xdp_problem.is_none(), "{info:?}");
        departed
            .finish(|reasons| reasons.forwarded_xdp > 5_000 && reasons.parked > 0)
            .with_context(|| format!("over {remote}"))?;
    }
    Ok(())
}

#[test]
fn xdp_goes_on_while_no_service_runs_and_the_next_one_looks_after_it() -> anyhow::Result<()> {
    let mut departed = departed(60_000)?;
    tunnel_to(&departed.lab.a, &departed.at_a, NODE_B[0])??;
    wait_for_xdp(&departed.lab.a, &departed.at_a, 1_000)?;
    let before = departed.lab.a.ledger(&departed.at_a)?.reasons;
    departed.at_a = next_service(&mut departed.lab, departed.at_a, |_| {
        departed
            .inbox
            .wait_for_count(departed.inbox.count() + 10_000)
    })?;
    ensure!(departed.at_a.stage() == Stage::Forwarding);
    tunnel_to(&departed.lab.a, &departed.at_a, NODE_B[0])??;
    let sent = departed.sender.finish();
    departed.inbox.check(&sent)?;
    let left = departed.lab.a.settled_ledger(&departed.at_a)?;
    check_ledger(&left)?;
    ensure!(
        left.reasons.forwarded_xdp > before.forwarded_xdp + 5_000,
        "{before:?} {left:?}"
    );
    another_address(&departed.lab, &departed.at_b)?;
    let port = departed.at_a.clone();
    departed.lab.a.call(async move { port.release().await })??;
    departed.guest.stop();
    Ok(())
}

/// The other node's address is at another MAC address from now on: what is sent on goes there as soon as the service has looked.
fn another_address(lab: &Lab, at_b: &Port) -> anyhow::Result<()> {
    const MAC: &str = "02:00:00:00:00:b2";
    let (a, b) = (&lab.a, &lab.b);
    b.netns.ip(&format!("link set br0 address {MAC}"))?;
    a.netns.ip(&format!(
        "neigh replace {} lladdr {MAC} dev br0 nud permanent",
        NODE_B[0]
    ))?;
    a.netns.run(
        "bridge",
        &format!("fdb replace {MAC} dev eth0 master static"),
    )?;
    let landed = || -> anyhow::Result<u64> { Ok(b.ledger(at_b)?.reasons.landed) };
    let before = landed()?;
    let until = Instant::now() + DEADLINE;
    while landed()? == before {
        ensure!(Instant::now() < until, "they go to where nobody is");
        lab.sender(40)?.finish();
    }
    Ok(())
}
