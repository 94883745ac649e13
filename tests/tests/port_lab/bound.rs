//! A connection that the source translates, where pods are ports of bridges. The guest is a namespace with a TCP stack of its own.

use anyhow::ensure;
use migrator::network::conntrack::Bound;
use migrator::network::{Port, PortError, Role};
use migrator_tests::inbox::Guest;
use migrator_tests::stack::{Connection, Stack, world};
use tokio::sync::mpsc;

use super::tunnel::wide;
use super::{Lab, POD_MAC, check_ledger, connect, pod};

/// Node a is the pod's gateway to the world.
const RULES: [&str; 3] = [
    "add table inet nat",
    "add chain inet nat from { type nat hook postrouting priority 100 ; }",
    "add rule inet nat from ip saddr 10.77.0.0/24 ip daddr 10.78.0.9 masquerade",
];

fn filters(lab: &Lab, on: &str) -> anyhow::Result<()> {
    for family in ["iptables", "ip6tables"] {
        let key = format!("net/bridge/bridge-nf-call-{family}");
        lab.a.netns.sysctl(&key, on)?;
    }
    Ok(())
}

/// What the source tells of its bound flows, and why it serves none.
fn kept(lab: &Lab, at_a: &Port) -> anyhow::Result<(Vec<Bound>, u64, String)> {
    let port = at_a.clone();
    let told = lab.a.call(async move {
        let keeper = port.keeper().await?;
        let problem = keeper.problem().unwrap_or_default().to_owned();
        let kept = keeper.keep(&port.flows().await?.bound);
        Ok::<_, PortError>((kept.bound, kept.unserved, problem))
    });
    Ok(told??)
}

#[test]
fn a_connection_that_the_source_masquerades_goes_on_through_it() -> anyhow::Result<()> {
    let lab = Lab::with(wide())?;
    let world = world(&lab.switch)?;
    super::wait_for_port(&lab.switch, "p9")?;
    filters(&lab, "0")?;
    let a = &lab.a.netns;
    a.ip("addr add 10.77.0.254/24 dev br0")?;
    a.sysctl("net/ipv4/conf/br0/forwarding", "1")?;
    for rule in RULES {
        a.run("nft", rule)?;
    }
    let stack = Stack::new(&POD_MAC.to_string(), 1500)?;
    stack.netns.ip("addr add 10.77.0.10/24 dev eth0")?;
    stack.netns.ip("route add default via 10.77.0.254")?;
    let at_a = lab
        .a
        .attach(&pod("pod", POD_MAC, 10), 1, Role::Local, None)?;
    let guest = Guest::wired(at_a.tap_fd()?, stack.tap.try_clone()?);
    let connection = Connection::open(&stack.netns, "10.78.0.9:9000", &world, "0.0.0.0:9000")?;
    ensure!(connection.peer()?.ip() == std::net::IpAddr::from([10, 78, 0, 1]));
    connection.lives_on()?;

    // A bridge that translates would send the answers nowhere.
    filters(&lab, "1")?;
    let (bound, unserved, problem) = kept(&lab, &at_a)?;
    ensure!(bound.is_empty() && unserved == 1, "{bound:?} {unserved}");
    ensure!(problem.contains("bridge-nf-call-iptables"), "{problem}");
    filters(&lab, "0")?;

    let at_b = lab
        .b
        .attach(&pod("pod", POD_MAC, 10), 7, Role::Incoming, None)?;
    let (sink, log) = mpsc::unbounded_channel();
    connect(log, at_a.clone(), at_b.clone(), &lab.b)?;
    let port = at_a.clone();
    lab.a.call(async move {
        port.reset_ledger().await?;
        port.hold(sink).await
    })??;
    guest.stop();
    let port = at_a.clone();
    lab.a.call(async move { port.residue().await })??;
    let (bound, unserved, problem) = kept(&lab, &at_a)?;
    ensure!(bound.len() == 1 && unserved == 0, "{bound:?} {problem}");
    let port = at_b.clone();
    let led = lab.b.call(async move {
        port.comes_from([10, 78, 0, 1].into(), Vec::new());
        port.lead_bound(&bound).await?;
        port.open().await?;
        Ok::<_, PortError>(port.led_flows())
    })??;
    ensure!((led.served, led.unserved) == (1, 0), "{led:?}");
    let guest = Guest::wired(at_b.tap_fd()?, stack.tap.try_clone()?);
    let port = at_a.clone();
    lab.a.call(async move { port.forward().await })??;
    let port = at_b.clone();
    lab.b.call(async move { port.settle().await })??;
    connection.lives_on()?;
    let port = at_a.clone();
    check_ledger(&lab.a.call(async move { port.release().await })??)?;
    connection.lives_on()?;

    let ledger = lab.b.ledger(&at_b)?;
    ensure!(ledger.reasons.guest_sent_bound > 200, "{ledger:?}");
    // The pod's address is where it is, on node a's bridge as well.
    let entries = lab.a.netns.run("bridge", "fdb show br br0")?;
    let of_pod = |line: &&str| line.starts_with(&POD_MAC.to_string());
    ensure!(
        entries
            .lines()
            .filter(of_pod)
            .all(|line| line.contains("dev eth0 ")),
        "{entries}"
    );
    guest.stop();
    Ok(())
}
