//! Pods that are routes of their nodes: what each node sets up for them, and who reaches them how.

use std::net::{SocketAddr, UdpSocket};

use anyhow::{Result, ensure};
use migrator_tests::lab::{ECHO, POD, POD_IPV4, POD_IPV6, RATE, SOON, TestLab, pod_yaml};
use nix::sys::socket::setsockopt;
use nix::{setsockopt_impl, sockopt_impl};
use xtask::lab::{Node, Topology};
use xtask::probe::{self, Probe};
use xtask::process::poll_until;
use xtask::{cmd, netns};

use super::connection::Connection;
use super::conntrack;

sockopt_impl!(
    /// ip(7).
    Discovers4,
    SetOnly,
    libc::IPPROTO_IP,
    libc::IP_MTU_DISCOVER,
    libc::c_int
);
sockopt_impl!(
    /// ipv6(7).
    Discovers6,
    SetOnly,
    libc::IPPROTO_IPV6,
    libc::IPV6_MTU_DISCOVER,
    libc::c_int
);

/// Where the echo listens in IPv6.
const ECHO6: &str = "[fd77::10]:7000";
/// The longest packet of the lab's pods: what its nodes' 1500 bytes leave of the tunnel.
const POD_MTU: u32 = 1450;

/// A port of the node that leads to the pod.
const PUBLISHED: &str = "
table ip published {
    chain to {
        type nat hook prerouting priority -100;
        ip daddr 10.78.0.1 tcp dport 30900 dnat to 10.77.0.10:9000
    }
}
";

fn ip(namespace: &str, words: &str) -> Result<String> {
    let words = ["-n", namespace].into_iter().chain(words.split(' '));
    cmd::output(&mut cmd::command("ip", words))
}

/// The pod runs on node a, and the client sends to it by that node.
fn with_pod_on_a() -> Result<TestLab> {
    let mut test = TestLab::up_as(Topology::Routed)?;
    test.lab().lead_client_to(Node::A)?;
    test.run_pod()?;
    Ok(test)
}

fn answers(namespace: &str, echo: &str) -> Result<()> {
    let echo: SocketAddr = echo.parse()?;
    let heard = probe::answers(namespace, echo, SOON)?;
    ensure!(heard, "{echo} does not answer in {namespace}");
    Ok(())
}

#[test]
fn a_routed_pod_has_an_address_of_its_own_and_is_reached_by_routes() -> Result<()> {
    let test = with_pod_on_a()?;
    let (a, client) = (test.lab().netns("a"), test.lab().client());
    for echo in [ECHO, ECHO6] {
        answers(&client, echo)?;
        answers(&a, echo)?;
    }
    let in_guest = "ip addr; ip route; ip -6 route; ip neigh";
    let guest = test.succeeds(Node::A, &["exec", POD, "--", "/bin/sh", "-c", in_guest])?;
    for wanted in [
        "inet 10.77.0.10/32",
        "inet6 fd77::10/128",
        "default via 169.254.1.1",
        "default via fe80::1",
        "169.254.1.1 dev eth0 lladdr ee:ee:ee:ee:ee:ee",
        "fe80::1 dev eth0 lladdr ee:ee:ee:ee:ee:ee",
        "mtu 1450",
    ] {
        ensure!(guest.contains(wanted), "{wanted} is missing in\n{guest}");
    }
    let tap = ip(&a, &format!("-o route get {POD_IPV4}"))?;
    ensure!(tap.contains(" dev mt"), "the route is {tap}");
    let neighbours = ip(&a, "neigh show nud permanent")?;
    for address in [POD_IPV4, POD_IPV6] {
        let is_there = |line: &str| line.starts_with(&format!("{address} dev mt"));
        ensure!(neighbours.lines().any(is_there), "{address}: {neighbours}");
    }
    // The other nodes know whose these addresses are.
    test.import_demo(Node::B)?;
    let file = test.lab().dir().join("same-address.yaml");
    std::fs::write(&file, pod_yaml("other", POD_IPV4, "fd77::99"))?;
    let said = test.says(Node::B, &["run", &file.display().to_string()])?;
    ensure!(
        said.code != Some(0)
            && said.err.contains("taken by the pod")
            && said.err.contains("node a"),
        "{}",
        said.err
    );
    // Not one frame of ARP or neighbour discovery was needed, in either direction.
    for learned in ["REACHABLE", "STALE", "DELAY", "PROBE"] {
        ensure!(!guest.contains(learned), "{guest}");
    }
    test.end()
}

#[test]
fn a_packet_that_is_too_long_for_the_tunnel_is_answered_and_not_lost_silently() -> Result<()> {
    let test = with_pod_on_a()?;
    for (echo, head) in [(ECHO, 20 + 8), (ECHO6, 40 + 8)] {
        let to: SocketAddr = echo.parse()?;
        let socket = netns::within(&test.lab().client(), || {
            let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
            // Never in fragments, as long as the path takes it.
            match to {
                SocketAddr::V4(_) => setsockopt(&socket, Discovers4, &libc::IP_PMTUDISC_DO)?,
                SocketAddr::V6(_) => setsockopt(&socket, Discovers6, &libc::IPV6_PMTUDISC_DO)?,
            }
            socket.connect(to)?;
            Ok(socket)
        })?;
        let longest = vec![0; POD_MTU as usize - head];
        let too_long = vec![0; POD_MTU as usize - head + 1];
        let told = poll_until(SOON, || {
            // Taken until the node has said how much fits.
            let refused = socket.send(&too_long);
            refused.is_err_and(|error| error.raw_os_error() == Some(libc::EMSGSIZE))
        });
        ensure!(
            told,
            "nobody says that {} bytes are too many",
            too_long.len()
        );
        // The node's answer is told once for the packet, and once more as the socket's error.
        socket.take_error()?;
        socket.set_read_timeout(Some(SOON))?;
        ensure!(socket.send(&longest)? == longest.len());
        let mut answer = vec![0; 2000];
        let came = socket.recv(&mut answer)?;
        ensure!(came == longest.len(), "{came} bytes came back");
    }
    test.end()
}

#[test]
fn a_pod_that_fits_no_network_of_the_cluster_is_refused_with_what_to_do() -> Result<()> {
    let test = TestLab::up_as(Topology::Routed)?;
    test.import_demo(Node::A)?;
    let file = test.lab().dir().join("elsewhere.yaml");
    let run = |yaml: String| -> Result<String> {
        std::fs::write(&file, yaml)?;
        let said = test.says(Node::A, &["run", &file.display().to_string()])?;
        ensure!(said.code != Some(0), "it runs");
        Ok(said.err)
    };
    let said = run(pod_yaml(POD, "10.99.0.10", POD_IPV6))?;
    for part in ["10.99.0.10", "10.77.0.0/24, fd77::/64", "topology.pods"] {
        ensure!(said.contains(part), "{part} is missing in: {said}");
    }
    let with_gateway = pod_yaml(POD, POD_IPV4, POD_IPV6).replace(
        "  annotations:\n",
        "  annotations:\n    migrator/gateway4: 10.77.0.1\n",
    );
    let said = run(with_gateway)?;
    ensure!(said.contains("remove this annotation"), "{said}");
    test.nothing_is_left_on(Node::A)?;
    test.end()
}

#[test]
fn nodes_of_different_topologies_refuse_each_others_pods() -> Result<()> {
    let test = with_pod_on_a()?;
    test.restart(Node::B, || {
        let path = test.lab().node_dir(Node::B).join("config.yaml");
        let config = std::fs::read_to_string(&path)?;
        ensure!(config.contains("10.77.0.0/24"), "{config}");
        Ok(std::fs::write(
            &path,
            config.replace("10.77.0.0/24", "10.77.0.0/16"),
        )?)
    })?;
    let said = test.says(Node::A, &["migrate", POD, "--to", "b"])?;
    ensure!(said.code != Some(0), "it moves");
    for part in [
        "10.77.0.0/24, fd77::/64 on a",
        "10.77.0.0/16, fd77::/64 on b",
        "topology.pods",
    ] {
        ensure!(
            said.err.contains(part),
            "{part} is missing in: {}",
            said.err
        );
    }
    test.runs_on(Node::A)?;
    test.end()
}

/// Who sends to the pod while it moves, and by which addresses.
fn probes(test: &TestLab) -> Result<Vec<(String, Probe)>> {
    let mut probes = Vec::new();
    for place in ["client", "a", "b", "c"] {
        for echo in [ECHO, ECHO6] {
            let (namespace, to) = (test.lab().netns(place), echo.parse()?);
            let probe = Probe::start(&namespace, to, RATE / 8)?;
            probes.push((format!("{place} to {echo}"), probe));
        }
    }
    Ok(probes)
}

#[test]
fn a_routed_pod_moves_and_whoever_sends_from_anywhere_loses_nothing() -> Result<()> {
    let mut test = TestLab::up_as(Topology::Routed)?;
    test.run_pod()?;
    let mut connection = Connection::open(&test)?;
    let probes = probes(&test)?;
    for from in [Node::A, Node::B] {
        test.moves(from)?;
        test.nothing_is_left_on(from)?;
        connection.lives_on()?;
    }
    connection.abandon()?;
    for (who, probe) in probes {
        let record = probe.stop()?;
        let summary = record.summary();
        ensure!(
            (summary.lost, summary.duplicated, summary.reordered) == (0, 0, 0)
                && summary.received > 0,
            "{who}: {summary:?}; first without an answer: {:?}",
            record.unanswered()
        );
    }
    test.end()
}

#[test]
fn a_routed_pod_moves_while_the_world_sends_by_its_source_or_by_its_destination() -> Result<()> {
    let mut test = TestLab::up_as(Topology::Routed)?;
    test.run_pod()?;
    // One connection to a port of node a, which knows the way to the pod.
    conntrack::run(&test, Node::A, "nft -f -", PUBLISHED)?;
    let published = format!("{}:30900", Node::A.address());
    let mut connection = Connection::open_by(&test, &published)?;
    for (from, via) in [(Node::A, Node::A), (Node::B, Node::A)] {
        // The probe sends by one node from its first packet on.
        test.probe_is_perfect()?;
        test.lab().lead_client_to(via)?;
        test.start_probe()?;
        let report = test.moves(from)?;
        test.nothing_is_left_on(from)?;
        let flows = report.conntrack;
        ensure!((flows.bound, flows.bound_unserved) == (1, 0), "{flows:?}");
        connection.lives_on()?;
        let shown = test.succeeds(Node::A, &["net", "show"])?;
        let told = shown.contains("1 of 10.77.0.10, which has left, are translated here");
        ensure!(told || from == Node::B, "{shown}");
    }
    connection.abandon()?;
    test.end()
}
