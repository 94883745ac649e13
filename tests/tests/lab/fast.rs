//! The fast way from the uplink to the guest, while the pod moves there and back.
//!
//! A veth with an XDP program keeps 256 frames at most (`VETH_RING_SIZE` in Linux's drivers/net/veth.c), and the pages of a move cross the
//! lab's cables as well: what a cable itself drops, and counts, is not ours.

use anyhow::{Context, Result, ensure};
use migrator::api::net_types::PodNet;
use migrator_tests::lab::{POD, SOON, TestLab};
use xtask::cmd;
use xtask::lab::Node;
use xtask::process::poll_until;

/// Frames that have taken the fast way to the pod at a node.
fn fast(test: &TestLab, node: Node) -> Result<u64> {
    let net: PodNet = test.get(node, &format!("/v1/net/{POD}"))?;
    let counter = net.port.counters.iter().find(|c| c.name == "fast");
    Ok(counter.map_or(0, |counter| counter.frames))
}

/// Waits until the probe's packets take it.
fn takes_it(test: &TestLab, node: Node) -> Result<()> {
    let before = fast(test, node)?;
    let mut now = before;
    let more = poll_until(SOON, || {
        now = fast(test, node).unwrap_or(before);
        now > before + 1_000
    });
    ensure!(more, "on {}: {before}, then {now}", node.name());
    Ok(())
}

/// Frames that the cable to a node had no room for.
fn dropped(test: &TestLab, node: Node) -> Result<u64> {
    let (switch, port) = (test.lab().netns("switch"), format!("p-{}", node.name()));
    let words = ["-n", &switch, "-s", "-j", "link", "show", &port];
    let shown = cmd::output(&mut cmd::command("ip", words))?;
    let shown: serde_json::Value = serde_json::from_str(&shown)?;
    shown[0]["stats64"]["tx"]["dropped"]
        .as_u64()
        .with_context(|| format!("`ip` does not say what {port} has dropped"))
}

#[test]
fn packets_on_the_fast_way_follow_the_pod_and_none_is_lost_or_overtaken() -> Result<()> {
    let mut test = TestLab::up_with_xdp()?;
    test.run_pod()?;
    takes_it(&test, Node::A)?;
    let shown = test.succeeds(Node::A, &["net", "trace", POD, "--count", "20"])?;
    ensure!(shown.contains("in  fast "), "{shown}");
    for from in [Node::A, Node::B, Node::A, Node::B] {
        let report = test.moves(from)?;
        ensure!(
            report.packets.lost == 0 && report.packets.unaccounted == 0,
            "{:?}",
            report.packets
        );
        takes_it(&test, from.other())?;
    }
    let record = test.stop_probe()?;
    let summary = record.summary();
    let dropped = dropped(&test, Node::A)? + dropped(&test, Node::B)?;
    ensure!(
        (summary.duplicated, summary.reordered) == (0, 0) && summary.received > 0,
        "{summary:?}"
    );
    ensure!(
        summary.lost <= dropped,
        "{summary:?}, and the cables dropped {dropped}: {:?}",
        record.unanswered()
    );
    test.end()
}
