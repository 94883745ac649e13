//! A pod that has hardly come, and is to move again.

use anyhow::Result;
use migrator_tests::lab::TestLab;
use xtask::lab::Node;

#[test]
fn a_pod_moves_on_when_its_old_node_has_let_go_of_it() -> Result<()> {
    let test = TestLab::with_pod()?;
    test.begins(Node::A, &[])?;
    // Node a still forwards what comes late, for 600 ms at the least, and refuses a pod that it has not let go of.
    test.runs_on(Node::B)?;
    test.moves(Node::B)?;
    test.moves(Node::A)?;
    test.end()
}
