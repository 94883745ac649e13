//! Connections whose addresses one node translates: they go on through it wherever the pod is. The guest is a namespace with a TCP stack of its own.

use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use migrator_tests::inbox::Guest;
use migrator_tests::netns::Netns;
use migrator_tests::stack::{Connection, Stack, world};

use crate::DEADLINE;
use crate::cluster::{Lab, POD_MAC};
use crate::pod::{Body, Pod, release};

/// Node a translates: what pods send to the world, and a port of its own to the pod. Whoever answers sees node a; the pod sees who asks.
const RULES: &str = "
add table inet nat
add chain inet nat from { type nat hook postrouting priority 100 ; }
add rule inet nat from oifname eth0 ip saddr 10.77.0.0/24 masquerade
add rule inet nat from oifname eth0 ip6 saddr fd77::/64 masquerade
add chain inet nat to { type nat hook prerouting priority -100 ; }
add rule inet nat to ip daddr 10.78.0.1 tcp dport 30080 dnat ip to 10.77.0.10:80
";
/// What has an answer at all has one within this: milliseconds, but on a busy machine.
const ANSWER: Duration = Duration::from_secs(2);

/// The guest's addresses, as a routed pod has them.
fn guest() -> anyhow::Result<Stack> {
    let stack = Stack::new(&POD_MAC.to_string(), 1450)?;
    let netns = &stack.netns;
    netns.ip("addr add 10.77.0.10/32 dev eth0")?;
    netns.ip("addr add fd77::10/128 dev eth0 nodad")?;
    for (family, gateway) in [("-4", "169.254.1.1"), ("-6", "fe80::1")] {
        netns.ip(&format!(
            "neigh add {gateway} lladdr ee:ee:ee:ee:ee:ee dev eth0 nud permanent"
        ))?;
        netns.ip(&format!(
            "{family} route add default via {gateway} dev eth0 onlink"
        ))?;
    }
    Ok(stack)
}

impl Body for Stack {
    fn start(&self, tap: OwnedFd) -> anyhow::Result<Guest> {
        Ok(Guest::wired(tap, self.tap.try_clone()?))
    }
}

fn homes(lab: &Lab, node: usize) -> u64 {
    lab.nodes[node].network.homes().values().sum()
}

/// Until node a translates so many flows of pods that have left.
fn has_homes(lab: &Lab, count: u64) -> anyhow::Result<()> {
    let until = Instant::now() + DEADLINE;
    while homes(lab, 0) != count {
        ensure!(Instant::now() < until, "{} flows", homes(lab, 0));
        std::thread::yield_now();
    }
    Ok(())
}

struct Open {
    out: Connection,
    out6: Connection,
    published: Connection,
}

fn open(stack: &Netns, world: &Netns) -> anyhow::Result<Open> {
    let open = Open {
        out: Connection::open(stack, "10.78.0.9:9000", world, "0.0.0.0:9000")?,
        out6: Connection::open(stack, "[fd78::9]:9001", world, "[::]:9001")?,
        published: Connection::open(world, "10.78.0.1:30080", stack, "0.0.0.0:80")?,
    };
    ensure!(open.out.peer()?.ip() == std::net::IpAddr::from([10, 78, 0, 1]));
    ensure!(open.published.peer()?.ip() == std::net::IpAddr::from([10, 78, 0, 9]));
    Ok(open)
}

impl Open {
    fn live_on(&self) -> anyhow::Result<()> {
        self.out.lives_on().context("masqueraded")?;
        self.out6.lives_on().context("masqueraded, IPv6")?;
        self.published.lives_on().context("published")
    }
}

/// A pod with connections, on node a, which translates them.
fn translated() -> anyhow::Result<(Lab, Netns, Stack, Pod, Open)> {
    let lab = Lab::new()?;
    // The world has no way to pods.
    let (world, stack) = (world(&lab.switch)?, guest()?);
    let a = &lab.nodes[0].netns;
    for rule in RULES.lines().filter(|line| !line.is_empty()) {
        a.run("nft", rule)?;
    }
    for state in ["time_wait", "close", "last_ack"] {
        a.sysctl(
            &format!("net/netfilter/nf_conntrack_tcp_timeout_{state}"),
            "1",
        )?;
    }
    let pod = Pod::start(&lab, &stack)?;
    let open = open(&stack.netns, &world)?;
    open.live_on()?;
    Ok((lab, world, stack, pod, open))
}

#[test]
fn translated_connections_follow_a_pod_from_node_to_node_and_back() -> anyhow::Result<()> {
    let (mut lab, world, stack, mut pod, open) = translated()?;
    for to in [1, 2, 0, 1] {
        let (from, left);
        from = pod.at;
        (pod, left) = pod.migrate(&lab, to, &stack)?;
        ensure!(
            (pod.led.served, pod.led.unserved) == (3, 0),
            "{:?}",
            pod.led
        );
        open.live_on()
            .with_context(|| format!("from {from} to {to}"))?;
        release(&lab.nodes[from], left)?;
        open.live_on()
            .with_context(|| format!("released at {from}"))?;
        let ledger = lab.nodes[to].ledger(&pod.port)?;
        ensure!(
            (ledger.reasons.guest_sent_bound > 100) == (to != 0),
            "{ledger:?}"
        );
        // Once as many as at first: whatever else the pod sends in them would be told twice.
        ensure!(homes(&lab, 0) == 3 && homes(&lab, 1) == 0 && homes(&lab, 2) == 0);
    }
    // Nobody but the kernel is needed at the node that translates; and the next service knows what it has to do.
    lab.nodes[0].restart()?;
    open.live_on().context("a new service")?;
    ensure!(homes(&lab, 0) == 3);
    // They end, and with them what goes on for them.
    drop(open);
    has_homes(&lab, 0)?;
    // A new one is the pod's new node's own affair: nobody translates there, so it has no answer. Through node a it would have one.
    let _listens = world
        .spawn(|| TcpListener::bind("0.0.0.0:9002"))
        .join()
        .expect("a thread")?;
    let again = stack.netns.spawn(|| {
        let to = SocketAddr::from(([10, 78, 0, 9], 9002));
        TcpStream::connect_timeout(&to, ANSWER)
    });
    ensure!(again.join().expect("a thread").is_err(), "it is translated");
    pod.stop(&lab)
}

#[test]
fn a_flow_that_its_node_has_forgotten_goes_out_where_the_pod_is() -> anyhow::Result<()> {
    let (lab, _world, stack, pod, open) = translated()?;
    let (pod, left) = pod.migrate(&lab, 1, &stack)?;
    release(&lab.nodes[0], left)?;
    open.live_on()?;
    ensure!(pod.port.flows_elsewhere().len() == 3);
    let sent = lab.nodes[1].ledger(&pod.port)?.reasons.guest_sent;
    lab.nodes[0].netns.run("conntrack", "-D -f ipv4 -p tcp")?;
    has_homes(&lab, 1)?;
    // Each end sends, and neither gets an answer: node b has no part in it.
    let mut end = open.out.asker();
    end.write_all(b"lost")?;
    let until = Instant::now() + DEADLINE;
    while pod.port.flows_elsewhere().len() != 2 {
        ensure!(Instant::now() < until, "{:?}", pod.port.flows_elsewhere());
        std::thread::yield_now();
    }
    let now = lab.nodes[1].ledger(&pod.port)?.reasons.guest_sent;
    ensure!(now > sent, "it was let out: {sent}, {now}");
    open.out6.lives_on()?;
    pod.stop(&lab)
}
