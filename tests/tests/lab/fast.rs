//! The fast way from the uplink to the guest, while the pod moves there and back.

use anyhow::{Result, ensure};
use migrator::api::net_types::PodNet;
use migrator_tests::lab::{POD, SOON, TestLab};
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
    // The probe's record is looked at: nothing lost, doubled or reordered.
    test.end()
}
