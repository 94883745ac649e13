//! The soak test, short: `cargo xtask test soak` does the same for as long as one likes.

use anyhow::{Result, ensure};
use migrator_tests::lab::TestLab;
use xtask::lab::Node;
use xtask::soak::{Options, soak};

fn moves(moves: u32, vcpus: u32) -> Result<()> {
    let test = TestLab::up()?;
    test.import_demo(Node::A)?;
    let options = Options {
        moves,
        vcpus,
        full_every: 2,
        ..Options::default()
    };
    let summary = soak(test.lab(), &options, &mut |line| println!("{line}"))?;
    ensure!(
        summary.faults.is_empty()
            && summary.moves.len() == moves as usize
            && summary.full_checks >= moves / 2,
        "{}",
        summary.text()
    );
    test.end()
}

#[test]
fn a_guest_that_checks_its_memory_finds_nothing_wrong_after_many_moves() -> Result<()> {
    moves(8, 2)
}

#[test]
fn so_does_one_with_a_single_cpu() -> Result<()> {
    moves(4, 1)
}

#[test]
fn so_does_one_with_more_cpus_than_the_machine() -> Result<()> {
    moves(4, 4)
}
