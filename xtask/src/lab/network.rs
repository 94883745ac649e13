//! Namespaces, links and addresses.

use anyhow::{Context, Result};

use super::state::State;
use super::{Lab, Node, Topology};
use crate::{cmd, netns};

/// The namespaces, without their prefix.
pub(super) const PLACES: [&str; 5] = ["switch", "client", "a", "b", "c"];

/// Those of a topology.
pub(super) fn places(topology: Topology) -> &'static [&'static str] {
    match topology {
        Topology::Bridge => &["switch", "client", "a", "b"],
        Topology::Routed => &PLACES,
    }
}

/// Frames that may wait for a CPU behind a veth. The kernel's 1000 are fewer than a burst of iperf3 while both CPUs
/// emulate guests, and a frame dropped there would look like a loss of the migration.
const BACKLOG: u64 = 65536;
/// Between the nodes on the flat network, whose tunnel adds 50 bytes to the 1500 of pods and client.
const NODE_MTU: u32 = 1600;

/// The longest packet of routed pods: what 1500 bytes between nodes leave of the tunnel.
pub(super) const ROUTED_MTU: u32 = 1450;

/// The networks of pods.
pub(super) const POD_NETWORKS: [&str; 2] = ["10.77.0.0/24", "fd77::/64"];
const BACKLOG_SYSCTL: &str = "/proc/sys/net/core/netdev_max_backlog";

/// Set in each namespace before it has devices. Duplicate address detection would keep an IPv6 address unusable for a second.
const SYSCTLS: &[(&str, &str)] = &[
    ("net/ipv6/conf/all/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/default/dad_transmits", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/default/rp_filter", "0"),
];

pub(super) fn up(lab: &Lab, state: &mut State) -> Result<()> {
    raise_backlog(lab, state)?;
    for place in places(lab.topology()) {
        let place = *place;
        let name = lab.netns(place);
        ip(&format!("netns add {name}"))?;
        netns::within(&name, || {
            for (key, value) in SYSCTLS {
                let path = format!("/proc/sys/{key}");
                std::fs::write(&path, value).with_context(|| format!("cannot write {path}"))?;
            }
            if place == "switch" {
                // It only switches: no address, no router solicitations of its own.
                std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1")
                    .context("cannot turn IPv6 off in the switch")?;
                netns::keep_order()?;
            }
            Ok(())
        })?;
        ip(&format!("-n {name} link set lo up"))?;
    }
    bridge(&lab.netns("switch"), "sw0")?;
    connect(lab, "client", "02:4d:00:00:01:00")?;
    let [v4, v6] = lab.topology().client();
    give(&lab.client(), "eth0", v4, v6)?;
    match lab.topology() {
        Topology::Bridge => flat(lab),
        Topology::Routed => routed(lab),
    }
}

fn number(node: Node) -> &'static str {
    match node {
        Node::A => "0a",
        Node::B => "0b",
        Node::C => "0c",
    }
}

/// The addresses of a place's one device.
fn give(netns: &str, device: &str, v4: &str, v6: &str) -> Result<()> {
    ip(&format!("-n {netns} addr add {v4}/24 dev {device}"))?;
    ip(&format!("-n {netns} addr add {v6}/64 dev {device} nodad"))
}

/// Pods are routes of their nodes, which set up all that is theirs.
fn routed(lab: &Lab) -> Result<()> {
    for node in Node::EVERY {
        let mac = format!("02:4d:00:00:{}:00", number(node));
        connect(lab, node.name(), &mac)?;
        let (name, v6) = (lab.netns(node.name()), node.address6());
        give(&name, "eth0", node.address(), v6)?;
    }
    lead_client_to(lab, Node::C, None)
}

/// The client is a router's neighbour: it sends to pods by one node. Unless it is told how much fits that way, it finds out by a packet that is
/// refused (ICMP), as anybody does.
pub(super) fn lead_client_to(lab: &Lab, node: Node, mtu: Option<u32>) -> Result<()> {
    let client = lab.client();
    let ways = [node.address(), node.address6()];
    for (network, via) in POD_NETWORKS.into_iter().zip(ways) {
        let mtu = mtu.map(|mtu| format!(" mtu {mtu}")).unwrap_or_default();
        ip(&format!(
            "-n {client} route replace {network} via {via}{mtu}"
        ))?;
    }
    Ok(())
}

/// Nodes and client are on one layer 2, and pods as well.
fn flat(lab: &Lab) -> Result<()> {
    for node in Node::ALL {
        let (name, number) = (lab.netns(node.name()), number(node));
        connect(lab, node.name(), &format!("02:4d:00:00:{number}:00"))?;
        let (switch, place) = (lab.netns("switch"), node.name());
        ip(&format!("-n {switch} link set p-{place} mtu {NODE_MTU}"))?;
        ip(&format!("-n {name} link set eth0 mtu {NODE_MTU}"))?;
        bridge(&name, "br0")?;
        // Without an address of its own a bridge takes its lowest port's, and changes it when a pod's TAP comes.
        ip(&format!(
            "-n {name} link set br0 address 02:4d:00:00:{number}:01"
        ))?;
        ip(&format!("-n {name} link set eth0 master br0"))?;
        ip(&format!("-n {name} link set br0 mtu {NODE_MTU}"))?;
        ip(&format!("-n {name} addr add {}/24 dev br0", node.address()))?;
    }
    Ok(())
}

fn bridge(netns: &str, name: &str) -> Result<()> {
    // No spanning tree, so a port forwards at once; no snooping, so neighbour discovery is flooded like any multicast.
    ip(&format!(
        "-n {netns} link add {name} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"
    ))?;
    ip(&format!("-n {netns} link set {name} up"))
}

/// A cable from eth0 in `place` to the switch.
fn connect(lab: &Lab, place: &str, mac: &str) -> Result<()> {
    let (switch, end) = (lab.netns("switch"), lab.netns(place));
    ip(&format!(
        "link add eth0 netns {end} address {mac} type veth peer name p-{place} netns {switch}"
    ))?;
    ip(&format!("-n {switch} link set p-{place} master sw0"))?;
    ip(&format!("-n {switch} link set p-{place} up"))?;
    ip(&format!("-n {end} link set eth0 up"))
}

fn raise_backlog(lab: &Lab, state: &mut State) -> Result<()> {
    let before: u64 = match std::fs::read_to_string(BACKLOG_SYSCTL) {
        Ok(text) => text
            .trim()
            .parse()
            .with_context(|| format!("{BACKLOG_SYSCTL} is not a number"))?,
        Err(_) => return Ok(()),
    };
    if before >= BACKLOG {
        return Ok(());
    }
    state.backlog_before = Some(before);
    state.save(&lab.dir)?;
    if let Err(error) = std::fs::write(BACKLOG_SYSCTL, BACKLOG.to_string()) {
        println!(
            "lab: cannot raise {BACKLOG_SYSCTL} ({error}): the kernel may drop frames under load"
        );
    }
    Ok(())
}

/// Puts the machine-wide setting back.
pub(super) fn restore_backlog(state: &State) -> Result<()> {
    match state.backlog_before {
        Some(before) => std::fs::write(BACKLOG_SYSCTL, before.to_string())
            .with_context(|| format!("cannot write {BACKLOG_SYSCTL}")),
        None => Ok(()),
    }
}

/// Removes the namespaces, and with them every device inside.
pub(super) fn down(lab: &Lab) -> Result<()> {
    for place in PLACES {
        let name = lab.netns(place);
        if netns::exists(&name) {
            ip(&format!("netns del {name}"))?;
        }
    }
    Ok(())
}

fn ip(words: &str) -> Result<()> {
    cmd::output(&mut cmd::command("ip", words.split(' '))).map(drop)
}
