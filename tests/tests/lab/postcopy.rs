//! Memory that crosses after the guest's resume.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use migrator::migration::status::Phase;
use migrator_tests::lab::TestLab;
use migrator_tests::moments;
use xtask::cmd;
use xtask::lab::Node;
use xtask::process::poll_until;

#[test]
fn a_guest_that_moves_before_its_memory_loses_nothing() -> Result<()> {
    let mut test = TestLab::with_pod()?;
    for mode in ["postcopy", "hybrid"] {
        for from in Node::ALL {
            let report = test.moves_with(from, &["--mode", mode, "--max-downtime", "1"])?;
            ensure!(report.mode == "postcopy", "{report:?}");
            let faults = report
                .memory
                .faults
                .clone()
                .context("no figures of the waits")?;
            ensure!(faults.missing > 0 && faults.mismatched == 0, "{faults:?}");
            println!("{mode}: downtime {:.1} ms, {faults:?}", report.downtime_ms);
            test.probe_is_perfect()?;
            test.exec_works(from.other())?;
            test.nothing_is_left_on(from)?;
            test.start_probe()?;
        }
    }
    test.end()
}

/// How the link or a service breaks while pages cross.
#[derive(Clone, Copy, Debug)]
enum Break {
    Source,
    Destination,
    Both,
    Link,
}

/// Slowly, so that there is time to break something.
const PUSHED: [&str; 6] = [
    "--mode",
    "postcopy",
    "--bandwidth",
    "30",
    "--compress",
    "none",
];
/// Milliseconds after the guest's resume.
const MOMENTS: [u64; 4] = [0, 50, 400, 1_500];

#[test]
fn whatever_breaks_while_pages_cross_is_made_good() -> Result<()> {
    let mut test = TestLab::with_pod()?;
    let mut from = Node::A;
    for (broken, first) in [
        (Break::Link, 0),
        (Break::Destination, 1),
        (Break::Source, 0),
        (Break::Both, 1),
    ] {
        for ms in moments::some(&MOMENTS, first) {
            let id = test.begins(from, &PUSHED)?;
            test.comes_to(from, &id, "post-copy", |status| {
                status.phase == Phase::Postcopy
            })?;
            let delay = Duration::from_millis(ms);
            let since = Instant::now();
            poll_until(delay, || since.elapsed() >= delay);
            println!("{broken:?} breaks {ms} ms after the resume");
            breaks(&test, from, broken)?;
            settles(&mut test, from)?;
            from = from.other();
        }
    }
    test.end()
}

fn breaks(test: &TestLab, from: Node, broken: Break) -> Result<()> {
    let nodes = match broken {
        Break::Source => vec![from],
        Break::Destination => vec![from.other()],
        Break::Both => Node::ALL.to_vec(),
        Break::Link => {
            let address = |verb: &str| {
                let (namespace, address) =
                    (test.lab().netns("b"), format!("{}/24", Node::B.address()));
                let words = ["-n", &namespace, "addr", verb, &address, "dev", "br0"];
                cmd::output(&mut cmd::command("ip", words))
            };
            address("del")?;
            // Longer than a peer may be silent.
            let outage = Duration::from_secs(5);
            let since = Instant::now();
            poll_until(outage, || since.elapsed() >= outage);
            return address("add").map(drop);
        }
    };
    for node in &nodes {
        test.lab().kill_node(*node)?;
    }
    for node in &nodes {
        test.lab().start_node(*node)?;
    }
    Ok(())
}

/// The pod runs at the destination, lacks nothing, and the source has let go of it.
fn settles(test: &mut TestLab, from: Node) -> Result<()> {
    test.runs_on(from.other())?;
    test.nothing_is_left_on(from)?;
    test.exec_works(from.other())?;
    test.log_is_whole(from.other())?;
    test.probe_is_perfect()?;
    test.start_probe()
}
