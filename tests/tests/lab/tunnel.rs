//! A sender on the very node that the pod leaves, in a lab whose nodes have a tunnel: its frames never meet the switch, so nothing tells it where
//! the pod has gone. The node sends them on, and once the network has changed it sends them the way that everybody's take.

use anyhow::{Result, ensure};
use migrator_tests::lab::{ECHO, RATE, TestLab};
use xtask::cmd;
use xtask::lab::Node;
use xtask::probe::Probe;

#[test]
fn a_sender_on_the_node_that_the_pod_has_left_follows_it_and_loses_nothing() -> Result<()> {
    let test = TestLab::with_pod()?;
    let node = test.lab().netns(Node::A.name());
    let words = format!("-n {node} addr add 10.77.0.200/24 dev br0");
    cmd::output(&mut cmd::command("ip", words.split(' ')))?;
    let probe = Probe::start(&node, ECHO.parse()?, RATE)?;
    let report = test.moves(Node::A)?;
    // Relayed, through the tunnel, or out of the uplink.
    ensure!(
        report.packets.forwarded > 500,
        "its packets took another way: {:?}",
        report.packets
    );
    ensure!(
        report.packets.lost == 0 && report.packets.unaccounted == 0,
        "{:?}",
        report.packets
    );
    let record = probe.stop()?;
    let summary = record.summary();
    ensure!(
        (summary.lost, summary.duplicated, summary.reordered) == (0, 0, 0),
        "{summary:?}; first without an answer: {:?}",
        record.unanswered()
    );
    test.end()
}
