//! Connections whose addresses one node translates: they go on through it wherever the pod is. The guest is a namespace with a TCP stack of its own.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use migrator_tests::inbox::Guest;
use migrator_tests::netns::{Netns, open_tap};

use crate::DEADLINE;
use crate::cluster::{Body, Lab, POD_MAC, Pod, release};

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
/// Longest silence of a socket on a busy machine.
const PATIENCE: Duration = Duration::from_secs(15);
/// More than any queue on the way holds.
const MUCH: usize = 300_000;

/// The guest: a namespace behind a TAP.
struct Stack {
    netns: Netns,
    tap: OwnedFd,
}

impl Stack {
    fn new() -> anyhow::Result<Self> {
        let netns = Netns::new()?;
        let tap = netns.spawn(|| open_tap("eth0")).join().expect("a thread")?;
        netns.ip(&format!("link set eth0 address {POD_MAC} mtu 1450 up"))?;
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
        Ok(Self { netns, tap })
    }
}

impl Body for Stack {
    fn start(&self, tap: OwnedFd) -> anyhow::Result<Guest> {
        Ok(Guest::wired(tap, self.tap.try_clone()?))
    }
}

/// Both ends of a connection.
struct Connection(TcpStream, TcpStream);

impl Connection {
    /// From one namespace to another, whose end listens at `at`, and is asked for at `to`.
    fn open(from: &Netns, to: &str, there: &Netns, at: &str) -> anyhow::Result<Self> {
        let (to, at): (SocketAddr, SocketAddr) = (to.parse()?, at.parse()?);
        let listener = there.spawn(move || TcpListener::bind(at)).join();
        let listener = listener.expect("a thread")?;
        let asks = from.spawn(move || TcpStream::connect_timeout(&to, PATIENCE));
        let asks = asks
            .join()
            .expect("a thread")
            .with_context(|| format!("to {to}"))?;
        let (answers, _) = listener.accept()?;
        for end in [&asks, &answers] {
            end.set_read_timeout(Some(PATIENCE))?;
            end.set_write_timeout(Some(PATIENCE))?;
        }
        Ok(Self(asks, answers))
    }

    /// Much goes from each end to the other.
    fn lives_on(&self) -> anyhow::Result<()> {
        for (from, to) in [(&self.0, &self.1), (&self.1, &self.0)] {
            let mut from = from.try_clone()?;
            let sends = std::thread::spawn(move || from.write_all(&[7; MUCH]));
            let mut came = vec![0; MUCH];
            let mut to = to;
            to.read_exact(&mut came)?;
            ensure!(came.iter().all(|byte| *byte == 7));
            sends.join().expect("a thread")?;
        }
        Ok(())
    }

    fn peer(&self) -> anyhow::Result<SocketAddr> {
        Ok(self.1.peer_addr()?)
    }
}

/// What is around the nodes' network, and has no way to pods.
fn world(lab: &Lab) -> anyhow::Result<Netns> {
    let world = Netns::new()?;
    world.ip("link add eth0 type veth peer name p9")?;
    world.ip(&format!(
        "link set p9 netns {}",
        lab.switch.path().display()
    ))?;
    lab.switch.ip("link set p9 master sw0 up")?;
    world.ip("link set eth0 up")?;
    world.ip("addr add 10.78.0.9/24 dev eth0")?;
    world.ip("addr add fd78::9/64 dev eth0 nodad")?;
    Ok(world)
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
    let (world, stack) = (world(&lab)?, Stack::new()?);
    let a = &lab.nodes[0].netns;
    for rule in RULES.lines().filter(|line| !line.is_empty()) {
        a.run("nft", rule)?;
    }
    for state in ["time_wait", "close", "last_ack"] {
        a.run(
            "sysctl",
            &format!("-qw net.netfilter.nf_conntrack_tcp_timeout_{state}=1"),
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
    let mut end = &open.out.0;
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
