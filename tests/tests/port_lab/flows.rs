//! Entries of connection tracking, carried from one node's namespace to the other's. They are made and read by `conntrack`, which knows
//! nothing of this project.

use std::collections::BTreeSet;

use anyhow::ensure;
use migrator::network::conntrack::{Flow, Flows, Known, State};
use migrator::network::{PodNetId, Port, Role};
use migrator_tests::netns::Netns;

use super::{Lab, Node, POD_MAC, pod};

/// One of each kind that the kernel tells apart: translated senders and receivers, a port alone, zones, marks, IPv6, protocols with states,
/// and flows that nobody has answered.
const ENTRIES: [&str; 12] = [
    "-p tcp -s 10.77.0.10 -d 192.0.2.1 --sport 5000 --dport 443 --state ESTABLISHED -t 300 -u ASSURED,SEEN_REPLY --src-nat 10.77.0.99:61000 -m 42",
    "-p tcp -s 10.77.0.1 -d 10.96.0.1 --sport 40000 --dport 30080 --state ESTABLISHED -t 300 -u ASSURED,SEEN_REPLY --dst-nat 10.77.0.10:80",
    "-p tcp -s 10.77.0.1 -d 10.77.0.10 --sport 40001 --dport 80 --state ESTABLISHED -t 300 -u ASSURED,SEEN_REPLY --dst-nat 10.77.0.10:8080",
    "-p tcp -s 10.77.0.1 -d 10.77.0.10 --sport 40002 --dport 80 --state SYN_SENT -t 200",
    "-p tcp -s 10.77.0.1 -d 10.77.0.10 --sport 40003 --dport 80 --state FIN_WAIT -t 200 -u ASSURED,SEEN_REPLY",
    "-p udp -s 10.77.0.1 -d 10.77.0.10 --sport 40000 --dport 53 -t 200 -w 5 -m 7",
    "-p udp -s 10.77.0.1 -d 10.77.0.10 --sport 40000 --dport 53 -t 200 -u ASSURED,SEEN_REPLY",
    "-p icmp -s 10.77.0.1 -d 10.77.0.10 --icmp-type 8 --icmp-code 0 --icmp-id 77 -t 200",
    "-p sctp -s 10.77.0.1 -d 10.77.0.10 --sport 4 --dport 5 --state ESTABLISHED -t 200 --orig-vtag 7 --reply-vtag 9",
    "-p gre -s 10.77.0.10 -d 10.77.0.1 --srckey 1 --dstkey 2 -t 200",
    "-p tcp -s fd77::1 -d fd77::10 --sport 40000 --dport 80 --state ESTABLISHED -t 300 -u ASSURED,SEEN_REPLY -m 9",
    "-p icmpv6 -s fd77::10 -d fd77::1 --icmpv6-type 128 --icmpv6-code 0 --icmpv6-id 78 -t 200",
];

/// Of somebody else: they stay where they are.
const OTHERS: [&str; 2] = [
    "-p tcp -s 10.77.0.1 -d 10.77.0.11 --sport 40000 --dport 80 --state ESTABLISHED -t 300 -u ASSURED,SEEN_REPLY",
    "-p tcp -s fd77::1 -d fd77::11 --sport 40000 --dport 80 --state ESTABLISHED -t 300 -u ASSURED,SEEN_REPLY",
];

fn dual_stack() -> PodNetId {
    PodNetId {
        v6: "fd77::10".parse().ok(),
        ..pod("pod", POD_MAC, 10)
    }
}

fn insert(netns: &Netns, entries: &[&str]) -> anyhow::Result<()> {
    for entry in entries {
        netns.run("conntrack", &format!("-I {entry}"))?;
    }
    Ok(())
}

/// Every entry as `conntrack` shows it, but for the seconds that are left, and who looks at it just now.
fn entries(netns: &Netns) -> anyhow::Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for family in ["ipv4", "ipv6"] {
        let listed = netns.run("conntrack", &format!("-L -f {family} -o extended"))?;
        found.extend(
            listed
                .lines()
                .filter(|line| line.starts_with(family))
                .map(|line| {
                    let words = line.split_whitespace().enumerate();
                    let kept =
                        words.filter(|(index, word)| *index != 4 && !word.starts_with("use="));
                    kept.map(|(_, word)| word).collect::<Vec<_>>().join(" ")
                }),
        );
    }
    Ok(found)
}

fn flows(node: &Node, port: &Port) -> anyhow::Result<Flows> {
    let port = port.clone();
    Ok(node.call(async move { port.flows().await })??)
}

/// Takes what crossed the wire.
fn take(node: &Node, port: &Port, bytes: &[u8]) -> anyhow::Result<()> {
    let (port, flows) = (port.clone(), port.read_flows(bytes)?);
    Ok(node.call(async move { port.take_flows(flows, Known::Update).await })??)
}

#[test]
fn entries_of_every_kind_come_out_at_the_other_node_as_they_were() -> anyhow::Result<()> {
    let lab = Lab::new()?;
    let at_a = lab.a.attach(&dual_stack(), 1, Role::Local, None)?;
    let at_b = lab.b.attach(&dual_stack(), 7, Role::Incoming, None)?;
    insert(&lab.a.netns, &ENTRIES)?;
    let expected = entries(&lab.a.netns)?;
    ensure!(expected.len() == ENTRIES.len(), "{expected:#?}");
    insert(&lab.a.netns, &OTHERS)?;

    let found = flows(&lab.a, &at_a)?;
    ensure!(found.bound.is_empty(), "{found:?}");
    take(&lab.b, &at_b, &Flow::encode_all(&found.free))?;
    let there = entries(&lab.b.netns)?;
    ensure!(there == expected, "{there:#?} and not {expected:#?}");
    ensure!(at_b.taken_flows().moved == ENTRIES.len() as u64);

    // The kernel's own words, too; less what stays behind on purpose.
    let mut again = flows(&lab.b, &at_b)?.free;
    let liberal = |flow: &Flow| Flow {
        timeout_s: 0,
        state: match flow.state {
            State::Tcp {
                state,
                flags,
                scale,
            } => State::Tcp {
                state,
                flags: flags.map(|flags| flags & !0x60 | 0x08),
                scale,
            },
            other => other,
        },
        ..flow.clone()
    };
    let mut before: Vec<Flow> = found.free.iter().map(liberal).collect();
    again.iter_mut().for_each(|flow| flow.timeout_s = 0);
    let by_bytes = |flow: &Flow| Flow::encode_all(std::slice::from_ref(flow));
    before.sort_by_key(by_bytes);
    again.sort_by_key(by_bytes);
    ensure!(before == again, "{before:#?} and not {again:#?}");
    Ok(())
}

#[test]
fn what_was_made_for_a_pod_that_does_not_come_is_removed_again_and_nothing_else()
-> anyhow::Result<()> {
    let lab = Lab::new()?;
    let at_a = lab.a.attach(&dual_stack(), 1, Role::Local, None)?;
    let at_b = lab.b.attach(&dual_stack(), 7, Role::Incoming, None)?;
    insert(&lab.a.netns, &ENTRIES)?;
    // One that this node knows already, in an older state, and one of somebody else.
    let known = ENTRIES[3].replace("SYN_SENT", "SYN_RECV");
    insert(&lab.b.netns, &[&known, OTHERS[0]])?;
    let own = entries(&lab.b.netns)?;

    let found = flows(&lab.a, &at_a)?;
    take(&lab.b, &at_b, &Flow::encode_all(&found.free))?;
    let taken = at_b.taken_flows();
    ensure!(
        (taken.moved, taken.failed) == (ENTRIES.len() as u64, 0),
        "{taken:?}"
    );
    let there = entries(&lab.b.netns)?;
    ensure!(there.len() == ENTRIES.len() + 1, "{there:#?}");
    // What is there is brought up to date.
    ensure!(there.is_superset(&entries(&lab.a.netns)?), "{there:#?}");

    let port = at_b.clone();
    lab.b.call(async move { port.discard().await })??;
    let left = entries(&lab.b.netns)?;
    ensure!(left.len() == own.len(), "{left:#?} and not {own:#?}");
    // One that comes late is not made.
    take(&lab.b, &at_b, &Flow::encode_all(&found.free))?;
    ensure!(entries(&lab.b.netns)? == left);
    Ok(())
}

#[test]
fn flows_that_the_nodes_own_address_is_translated_to_are_bound_to_it() -> anyhow::Result<()> {
    let lab = Lab::new()?;
    let at_a = lab.a.attach(&dual_stack(), 1, Role::Local, None)?;
    lab.a.netns.ip("addr add 10.77.0.99/24 dev br0")?;
    insert(&lab.a.netns, &ENTRIES)?;
    // Published by the node.
    insert(
        &lab.a.netns,
        &[
            "-p tcp -s 10.77.0.1 -d 10.77.0.99 --sport 40009 --dport 30080 --state ESTABLISHED -t 300 -u ASSURED,SEEN_REPLY --dst-nat 10.77.0.10:80",
        ],
    )?;
    let found = flows(&lab.a, &at_a)?;
    ensure!(found.free.len() == ENTRIES.len() - 1, "{found:?}");
    ensure!(found.bound.len() == 2, "{found:?}");

    // Without a tunnel they break, and it is said why.
    let (port, bound) = (at_a.clone(), found.bound.clone());
    let (kept, problem) = lab.a.call(async move {
        let keeper = port.keeper().await?;
        let problem = keeper.problem().unwrap_or_default().to_owned();
        Ok::<_, migrator::network::PortError>((keeper.keep(&bound), problem))
    })??;
    ensure!(kept.bound.is_empty() && kept.unserved == 2, "{kept:?}");
    ensure!(problem.contains("`tunnel` is off"), "{problem}");

    // And nobody can make a node translate packets that are its own.
    let at_b = lab.b.attach(&dual_stack(), 7, Role::Incoming, None)?;
    lab.b.netns.ip("addr add 10.77.0.99/24 dev br0")?;
    take(&lab.b, &at_b, &Flow::encode_all(&found.bound))?;
    let taken = at_b.taken_flows();
    ensure!((taken.moved, taken.failed) == (0, 2), "{taken:?}");
    ensure!(entries(&lab.b.netns)?.is_empty());
    Ok(())
}

#[test]
fn entries_fade_at_the_node_that_the_pod_has_left() -> anyhow::Result<()> {
    let lab = Lab::new()?;
    let at_a = lab.a.attach(&dual_stack(), 1, Role::Local, None)?;
    insert(&lab.a.netns, &ENTRIES)?;
    insert(&lab.a.netns, &OTHERS)?;
    let port = at_a.clone();
    lab.a.call(async move { port.release().await })??;
    let listed = lab.a.netns.run("conntrack", "-L -o extended")?;
    for line in listed.lines().filter(|line| line.starts_with("ipv4")) {
        let seconds: u32 = line.split_whitespace().nth(4).unwrap_or("").parse()?;
        let others = line.contains("10.77.0.11");
        ensure!(others == (seconds > 30), "{line}");
    }
    Ok(())
}
