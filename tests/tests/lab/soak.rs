//! The soak test, short: `cargo xtask test soak` does the same for as long as one likes.

use anyhow::{Result, ensure};
use migrator_tests::lab::TestLab;
use xtask::lab::Node;
use xtask::soak::{Options, soak};

#[test]
fn a_guest_that_checks_its_memory_finds_nothing_wrong_after_many_moves() -> Result<()> {
    let test = TestLab::up()?;
    test.import_demo(Node::A)?;
    let options = Options {
        moves: 8,
        full_every: 3,
        ..Options::default()
    };
    let summary = soak(test.lab(), &options, &mut |line| println!("{line}"))?;
    ensure!(
        summary.faults.is_empty() && summary.moves.len() == 8 && summary.full_checks == 3,
        "{}",
        summary.text()
    );
    test.end()
}
