//! A routed cluster: three nodes, a pod that moves between two of them, and senders everywhere. Each datagram carries its flow and its number, so that a lost,
//! doubled or overtaken one is seen.

mod bound;
mod cluster;
mod pod;
mod traffic;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use cluster::{Lab, addresses};
use migrator::network::{Claim, Ledger};
use migrator_tests::inbox::Inbox;
use pod::{Pod, release};
use traffic::Sender;
use vm_runtime::units::{Epoch, MacAddress};

pub(crate) const DEADLINE: Duration = Duration::from_secs(40);

/// Flows of each sender: IPv4, and IPv6 one above.
const FROM_A: u8 = 0;
const FROM_B: u8 = 2;
const FROM_C: u8 = 4;
const FROM_CLIENT: u8 = 6;

/// Round trips of the pod.
const ROUNDS: usize = 8;

fn senders(lab: &Lab) -> Vec<Sender> {
    let [a, b, c] = &lab.nodes;
    let start = |netns, flow| Sender::start(netns, flow, addresses());
    vec![
        start(&a.netns, FROM_A),
        start(&b.netns, FROM_B),
        start(&c.netns, FROM_C),
        start(&lab.client, FROM_CLIENT),
    ]
}

fn all_come(inbox: &Inbox) -> anyhow::Result<()> {
    for flow in FROM_A..FROM_CLIENT + 2 {
        inbox.wait_for(flow, inbox.count_of(flow) + 50)?;
    }
    Ok(())
}

fn check_ledger(ledger: &Ledger) -> anyhow::Result<()> {
    ensure!(
        ledger.balances() && ledger.lost == 0 && ledger.held == 0,
        "{ledger:?}"
    );
    Ok(())
}

#[test]
fn a_pod_moves_to_and_fro_and_every_sender_of_every_node_keeps_its_order() -> anyhow::Result<()> {
    let lab = Lab::new()?;
    let inbox = Inbox::default();
    let mut pod = Pod::start(&lab, &inbox)?;
    let senders = senders(&lab);
    for round in 0..2 * ROUNDS {
        all_come(&inbox)?;
        let (from, to) = (pod.at, 1 - pod.at);
        let left;
        (pod, left) = pod.migrate(&lab, to, &inbox)?;
        // Some of what is sent on, with the gate as it is and without it.
        if round % 2 == 0 {
            all_come(&inbox)?;
        }
        let ledger = release(&lab.nodes[from], left)?;
        check_ledger(&ledger)?;
        ensure!(ledger.reasons.mark_timeouts == 0, "{ledger:?}");
        let arrived = lab.nodes[to].ledger(&pod.port)?;
        ensure!(arrived.reasons.end_timeouts == 0, "{arrived:?}");
        for node in &lab.nodes {
            node.knows(lab.nodes[to].name, pod.epoch)?;
        }
    }
    all_come(&inbox)?;
    let sent: BTreeMap<u8, u64> = senders.into_iter().flat_map(Sender::finish).collect();
    inbox.check(&sent)?;
    pod.stop(&lab)?;
    for node in &lab.nodes {
        node.until(|facts| facts.endpoints.is_empty())?;
    }
    Ok(())
}

#[test]
fn a_node_whose_service_is_away_holds_nobody_up_for_long_and_its_packets_follow()
-> anyhow::Result<()> {
    let mut lab = Lab::new()?;
    let inbox = Inbox::default();
    let pod = Pod::start(&lab, &inbox)?;
    let senders = senders(&lab);
    all_come(&inbox)?;
    lab.nodes[2].stop_service();
    let began = Instant::now();
    let (pod, left) = pod.migrate(&lab, 1, &inbox)?;
    // It was there a moment ago, so its markers are waited for; not for ever.
    ensure!(began.elapsed() < DEADLINE, "{:?}", began.elapsed());
    let ledger = lab.nodes[0].ledger(&left)?;
    ensure!(ledger.reasons.mark_timeouts == 1, "{ledger:?}");
    let ledger = release(&lab.nodes[0], left)?;
    check_ledger(&ledger)?;
    // What c sends still goes to a, where nothing of the pod is left but its place.
    all_come(&inbox)?;
    lab.nodes[0].until(|facts| {
        let mut counters = facts.steered.iter();
        counters.any(|counter| counter.name == "relayed" && counter.frames > 100)
    })?;
    let sent: BTreeMap<u8, u64> = senders.into_iter().flat_map(Sender::finish).collect();
    inbox.check(&sent)?;
    // Back again, it is told.
    lab.nodes[2].start_service()?;
    lab.nodes[2].knows("b", pod.epoch)?;
    pod.stop(&lab)
}

#[test]
fn an_address_of_no_pod_network_is_not_believed_whoever_claims_it() -> anyhow::Result<()> {
    let lab = Lab::new()?;
    let [a, ..] = &lab.nodes;
    let endpoints = a.network.endpoints().context("the table")?;
    let claim = |number: u8, v4: &str, v6: &str| -> anyhow::Result<Claim> {
        Ok(Claim {
            mac: MacAddress([2, 0, 0, 0, 1, number]),
            v4: Some(v4.parse()?),
            v6: Some(v6.parse()?),
            epoch: Epoch(1),
        })
    };
    let believed = claim(1, "10.77.0.91", "fd77::91")?;
    // The other node's networks would be others than ours.
    let strange = [
        claim(2, "10.99.0.92", "fd77::92")?,
        claim(3, "10.77.0.93", "fd99::93")?,
    ];
    let all = [believed, strange[0], strange[1]];
    endpoints.take("b", endpoints.vni(), false, &all, &[])?;
    let rival = |of: Claim| Claim {
        mac: MacAddress([2, 0, 0, 0, 9, 9]),
        ..of
    };
    let holder = endpoints.conflict(&rival(believed));
    ensure!(holder == Some((believed.mac, "b".to_owned())), "{holder:?}");
    for claim in strange {
        let holder = endpoints.conflict(&rival(claim));
        ensure!(holder.is_none(), "{holder:?}");
    }
    Ok(())
}
