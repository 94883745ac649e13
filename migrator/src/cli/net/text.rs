//! The network for people.

use std::fmt::Write as _;

use vm_runtime::units::Bytes;

use super::super::output::age;
use crate::api::net_types::{NodeNet, PodNet, TraceFrame};
use crate::network::{ClusterFacts, HookFacts, LinkFacts, QueueFacts};

/// A line of the left column's label and what belongs to it.
fn row(out: &mut String, label: &str, text: &str) {
    // Writing to a string has no way to fail.
    let _ = writeln!(out, "{label:<10}{text}");
}

fn link(link: &LinkFacts) -> String {
    let state = if link.up { "up" } else { "DOWN" };
    format!(
        "{} (index {}, MTU {}, {state})",
        link.name, link.index, link.mtu
    )
}

fn queue(queue: &QueueFacts) -> String {
    format!(
        "{}, takes {} frames, {}, {} found it full",
        link(&queue.link),
        queue.length,
        if queue.waits { "some wait" } else { "empty" },
        queue.dropped
    )
}

fn hook(hook: &HookFacts) -> String {
    let HookFacts {
        device,
        hook,
        program,
        running,
        pinned,
        link_id,
        others,
    } = hook;
    let mut text = match running {
        Some(running) => {
            format!(
                "{program} on {device} {hook}: program {} (tag {})",
                running.id, running.tag
            )
        }
        None => format!("{program} on {device} {hook}: NOT ATTACHED"),
    };
    match (pinned, link_id) {
        (true, Some(id)) => text.push_str(&format!(", link {id} pinned")),
        (true, None) => text.push_str(", link pinned"),
        (false, _) => text.push_str(", link NOT PINNED"),
    }
    for other in others {
        text.push_str(&format!("; also {} {}", other.name, other.id));
    }
    text
}

/// One pod.
pub(super) fn pod(net: &PodNet) -> String {
    let PodNet { node, port, peer } = net;
    let mut out = String::new();
    let addresses: Vec<String> = [
        Some(port.mac.to_string()),
        port.ipv4.map(|a| a.to_string()),
        port.ipv6.map(|a| a.to_string()),
    ]
    .into_iter()
    .flatten()
    .collect();
    row(
        &mut out,
        "pod",
        &format!(
            "{} on {node}, slot {}, {}",
            port.pod,
            port.slot,
            addresses.join(", ")
        ),
    );
    row(&mut out, "stage", &port.stage);
    let gate = &port.gate;
    let may_send = if gate.may_send {
        "may send"
    } else {
        "may not send"
    };
    let flipped = match gate.flipped_unix_ms {
        Some(at) => format!("flipped {} ago", age(at)),
        None => "not flipped since the service began".to_owned(),
    };
    row(
        &mut out,
        "gate",
        &format!(
            "{}, guest {may_send}, epoch {}, {flipped}",
            gate.mode, gate.epoch
        ),
    );
    if let Some(peer) = peer {
        let phase = serde_json::to_value(peer.phase).unwrap_or_default();
        let phase = phase.as_str().unwrap_or_default();
        row(
            &mut out,
            "peer",
            &format!("{} ({phase}, migration {})", peer.node, peer.migration),
        );
    }
    if port.traced {
        row(&mut out, "trace", "on");
    }
    let waits = port.waits;
    let log = waits.backlog;
    row(
        &mut out,
        "waits",
        &format!(
            "{} in the park, {} in the log ({}), {} for the TAP ({}), {} before their turn; flows wait for {}",
            waits.park_frames,
            log.log_frames,
            Bytes(log.log_bytes),
            log.pending_frames,
            Bytes(log.pending_bytes),
            log.early_frames,
            waits.flow_frames
        ),
    );
    if let Some(flows) = port.conntrack {
        let text = format!(
            "{} entries of connection tracking, {} of them bound to this node; {} led to other nodes",
            flows.entries, flows.bound, flows.elsewhere
        );
        row(&mut out, "flows", &text);
    }
    row(&mut out, "tap", &queue(&port.tap));
    row(&mut out, "park", &queue(&port.park));
    for (i, facts) in port.hooks.iter().enumerate() {
        row(&mut out, if i == 0 { "hooks" } else { "" }, &hook(facts));
    }
    let books = &port.ledger;
    row(
        &mut out,
        "books",
        &format!(
            "{} seen = {} delivered + {} held + {} forwarded + {} refused + {} lost{}",
            books.seen,
            books.delivered,
            books.held,
            books.forwarded,
            books.refused,
            books.lost,
            if port.balances {
                ""
            } else {
                ": DOES NOT BALANCE"
            }
        ),
    );
    for (i, counter) in port.counters.iter().enumerate() {
        let text = format!(
            "{:>12}  {:<16}{}",
            counter.frames, counter.name, counter.meaning
        );
        row(&mut out, if i == 0 { "counters" } else { "" }, &text);
    }
    out
}

/// The node.
pub(super) fn node(net: &NodeNet) -> String {
    let NodeNet { node, facts, pods } = net;
    let mut out = String::new();
    row(&mut out, "node", node);
    if let Some(bridge) = &facts.bridge {
        row(&mut out, "bridge", &link(bridge));
    }
    if let Some(pods) = &facts.routed {
        row(&mut out, "routed", &format!("pods in {pods}"));
    }
    row(&mut out, "uplink", &link(&facts.uplink));
    row(
        &mut out,
        "pins",
        &format!(
            "{} (layout {}, {} slots)",
            facts.pins.display(),
            facts.abi,
            facts.slots
        ),
    );
    for (i, program) in facts.programs.iter().enumerate() {
        let text = format!("{} {} (tag {})", program.name, program.id, program.tag);
        row(&mut out, if i == 0 { "programs" } else { "" }, &text);
    }
    let maps: Vec<String> = facts
        .maps
        .iter()
        .map(|map| format!("{} {}", map.name, map.id))
        .collect();
    row(&mut out, "maps", &maps.join(", "));
    for (i, (pod, flows)) in facts.bound_flows.iter().enumerate() {
        let text = format!("{flows} of {pod}, which has left, are translated here until they end");
        row(&mut out, if i == 0 { "flows" } else { "" }, &text);
    }
    if let Some(known) = &facts.cluster {
        cluster(&mut out, known);
    }
    for (i, PodNet { port, peer, .. }) in pods.iter().enumerate() {
        let to = peer
            .as_ref()
            .map(|peer| format!(" to {}", peer.node))
            .unwrap_or_default();
        let text = format!(
            "{} slot {}: {}{to}, gate {} epoch {}, {} delivered, {} held, {} forwarded, {} lost",
            port.pod,
            port.slot,
            port.stage,
            port.gate.mode,
            port.gate.epoch,
            port.ledger.delivered,
            port.ledger.held,
            port.ledger.forwarded,
            port.ledger.lost
        );
        row(&mut out, if i == 0 { "pods" } else { "" }, &text);
    }
    out
}

/// What the nodes of a routed cluster have told each other.
fn cluster(out: &mut String, known: &ClusterFacts) {
    for (i, peer) in known.peers.iter().enumerate() {
        let address = peer.address.map_or(String::new(), |at| format!(" ({at})"));
        let state = match (peer.up, peer.tells) {
            (true, true) => "up".to_owned(),
            (true, false) => "told, and tells nothing".to_owned(),
            (false, tells) => {
                let tells = if tells { ", tells" } else { "" };
                let problem = peer.problem.as_deref().unwrap_or("not reached yet");
                format!("DOWN{tells}: {problem}")
            }
        };
        let text = format!("{}{address} {state}", peer.name);
        row(out, if i == 0 { "nodes" } else { "" }, &text);
    }
    for (i, pod) in known.endpoints.iter().enumerate() {
        let addresses = [
            pod.ipv4.map(|address| address.to_string()),
            pod.ipv6.map(|address| address.to_string()),
        ];
        let addresses: Vec<String> = addresses.into_iter().flatten().collect();
        let known_by = match pod.known_by.is_empty() {
            true => String::new(),
            false => format!(", known by {}", pod.known_by.join(", ")),
        };
        let text = format!(
            "{} ({}) at {} epoch {}{known_by}",
            addresses.join(", "),
            pod.mac,
            pod.at,
            pod.epoch
        );
        row(out, if i == 0 { "places" } else { "" }, &text);
    }
    let steered = known.steered.iter().filter(|counter| counter.frames > 0);
    let steered: Vec<String> = steered
        .map(|counter| format!("{} {}", counter.frames, counter.name))
        .collect();
    row(out, "steered", &steered.join(", "));
}

/// One frame.
pub(super) fn frame(frame: &TraceFrame) -> String {
    const DAY_US: u64 = 86_400_000_000;
    let us = frame.unix_us % DAY_US;
    let seconds = us / 1_000_000;
    let bucket = frame
        .bucket
        .map_or("-".to_owned(), |bucket| bucket.to_string());
    let head = match &frame.head {
        Some(head) => head.to_string(),
        None => "too short to tell".to_owned(),
    };
    format!(
        "{:02}:{:02}:{:02}.{:06} {:<3} {:<14} bucket {bucket:<3} {:>5} bytes  {head}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        us % 1_000_000,
        frame.direction,
        frame.counter,
        frame.length
    )
}
