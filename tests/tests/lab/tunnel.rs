//! A sender on the very node that the pod leaves: its frames never meet the switch, so nothing tells it where the pod has gone. They go
//! through the tunnel until the forwarding ends.

use anyhow::{Result, ensure};
use migrator_tests::lab::{ECHO, RATE, TestLab};
use xtask::cmd;
use xtask::lab::Node;
use xtask::probe::Probe;

#[test]
fn a_sender_on_the_node_that_the_pod_has_left_reaches_it_through_the_tunnel() -> Result<()> {
    let test = TestLab::with_pod()?;
    let node = test.lab().netns(Node::A.name());
    let words = format!("-n {node} addr add 10.77.0.200/24 dev br0");
    cmd::output(&mut cmd::command("ip", words.split(' ')))?;
    let probe = Probe::start(&node, ECHO.parse()?, RATE)?;
    let report = test.moves(Node::A)?;
    ensure!(
        report.packets.tunnelled > 500,
        "the tunnel was not used: {:?}",
        report.packets
    );
    ensure!(report.packets.lost == 0, "{:?}", report.packets);
    let record = probe.stop()?;
    let summary = record.summary();
    ensure!(
        (summary.lost, summary.duplicated, summary.reordered) == (0, 0, 0),
        "{summary:?}; first without an answer: {:?}",
        record.unanswered()
    );
    test.end()
}
