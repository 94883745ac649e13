//! The soak tests, short: `cargo xtask test soak` does the same for as long as one likes.

use anyhow::{Result, ensure};
use migrator_tests::lab::TestLab;
use xtask::lab::Node;
use xtask::project::Project;
use xtask::soak::{Options, flows, soak};

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

#[test]
fn no_kind_of_traffic_from_anywhere_loses_doubles_or_reorders_a_packet() -> Result<()> {
    let test = TestLab::up()?;
    test.import_demo(Node::A)?;
    test.import_demo(Node::B)?;
    let options = flows::Options {
        switchovers: 6,
        aborts: 4,
        ..flows::Options::default()
    };
    let project = Project::discover()?;
    let say = &mut |line: &str| println!("{line}");
    let summary = flows::run(&project, test.lab(), &options, 500, say)?;
    ensure!(
        summary.faults.is_empty()
            && (summary.switchovers, summary.aborts) == (6, 4)
            && summary.flows.len() == 3 * flows::kind::Kind::ALL.len()
            && summary.flows.iter().all(flows::Flow::is_whole),
        "{}",
        summary.text()
    );
    test.end()
}
