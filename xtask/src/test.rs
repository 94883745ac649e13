//! `cargo xtask test`: everything that a change must pass. The last line of its output sums the tests up.

mod failures;
mod times;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::{Subcommand, ValueEnum};

use crate::lab::{self, Lab};
use crate::project::Project;
use crate::{apps, check, cmd, demo_image, qemu10, setup, soak};
use failures::Failures;
use times::Times;

/// Arguments of the verb.
#[derive(Clone, Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    long: Option<Long>,
    /// Only this part
    #[arg(value_enum)]
    part: Option<Part>,
    /// Only tests whose name contains this
    #[arg(last = true)]
    filter: Vec<String>,
}

/// Tests that run by themselves, for as long as they are told to.
#[derive(Clone, Debug, Subcommand)]
enum Long {
    /// A pod that checks its own memory moves to and fro, many times
    Soak(soak::Args),
    /// Pods whose volumes are on a real Ceph cluster of one node: installs it, runs it in the lab, and ends it
    Ceph,
    /// Debian's servers under load move to and fro
    Apps(apps::Args),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Formatting, lints, licences, documentation
    Check,
    /// Tests that need nothing
    Unit,
    /// Tests that need root: kernel features, and the lab
    Root,
}

/// What runs of tests told.
#[derive(Debug)]
struct Told {
    tally: Tally,
    times: Times,
    failures: Failures,
}

/// Sums of test runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: u64,
    ignored: u64,
}

/// The verb.
///
/// # Errors
/// Something that the tests need is missing and cannot be installed.
pub fn main(project: &Project, args: &Args) -> Result<ExitCode> {
    match &args.long {
        Some(Long::Soak(args)) => return soak::main(project, args),
        Some(Long::Ceph) => return ceph(project),
        Some(Long::Apps(args)) => return apps::main(project, args),
        None => {}
    }
    let wants = |part| args.part.is_none_or(|only| only == part);
    setup::ensure(
        project,
        &setup::Args {
            tests: wants(Part::Root),
            ..setup::Args::default()
        },
    )?;
    let clean = !wants(Part::Check) || check::all(project);
    let mut told = Told::new();
    if wants(Part::Unit) {
        let mut test = cmd::cargo(project, ["test", "--quiet", "--no-fail-fast"]);
        // Compiled for these tests alone, and run for seconds.
        test.args(["--config", "profile.dev.package.migrator.opt-level=1"]);
        let unit = tests(test.arg("--").args(&args.filter))?;
        told.tally.add(unit.tally);
        told.failures.add(unit.failures);
    }
    if wants(Part::Root) {
        let root = root(project, &args.filter)?;
        told.tally.add(root.tally);
        told.times.add(root.times);
        told.failures.add(root.failures);
    }
    let Told {
        tally,
        times,
        failures,
    } = told;
    let slowest = times.slowest();
    if !slowest.is_empty() {
        print!("the slowest tests that need root:\n{slowest}");
    }
    print!("{}", failures.text());
    if !clean {
        println!("check: FAILED, see above");
    }
    if tally.ignored > 0 {
        println!("{} ignored", tally.ignored);
    }
    println!("{} passed, {} failed", tally.passed, tally.failed);
    Ok(if clean && tally.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The test of volumes on Ceph, which no other verb runs: its packages take as long to install as it takes.
fn ceph(project: &Project) -> Result<ExitCode> {
    let all = setup::Args {
        tests: true,
        ceph: true,
        ..setup::Args::default()
    };
    setup::ensure(project, &all)?;
    let mut test = of_root(project, "--test")?;
    let told = tests(test.arg("ceph").args(["--", "--test-threads=1"]))?;
    print!("{}", told.failures.text());
    let tally = told.tally;
    println!("{} passed, {} failed", tally.passed, tally.failed);
    Ok(match tally.failed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

/// The `tests` crate: one test at a time, because they share the machine's two CPUs and the lab's names. Tests that kill services look into windows of
/// microseconds, which are wider where something else runs.
fn root(project: &Project, filter: &[String]) -> Result<Told> {
    // Compiled first, so that no time of a test has some of that.
    cmd::run(&mut of_root(project, "--no-run")?)?;
    let mut test = of_root(project, "--no-fail-fast")?;
    tests(test.arg("--").arg("--test-threads=1").args(filter))
}

/// Cargo with what the tests of that crate need, and an option.
fn of_root(project: &Project, option: &str) -> Result<Command> {
    setup::require_root("for the tests of the `tests` crate; `cargo xtask test unit` needs none")?;
    bridge_filters()?;
    let image = demo_image::ensure(project)?;
    lab::build(project)?;
    let lab = Lab::new(project)?;
    let mut test = cmd::cargo(project, ["test", "-p", "migrator-tests", option]);
    test.env("MIGRATOR_GUEST_DIR", project.guest_dir())
        .env("MIGRATOR_BIN", project.migrator())
        .env("MIGRATOR_DEMO_IMAGE", image)
        .env("MIGRATOR_QEMU10_DIR", qemu10::root(project))
        .env("MIGRATOR_LAB_DIR", lab.dir());
    Ok(test)
}

/// Tests of connection tracking look at what bridges pass on.
fn bridge_filters() -> Result<()> {
    if Path::new("/proc/sys/net/bridge").exists() {
        return Ok(());
    }
    println!("test: modprobe br_netfilter: tests have rules that see what bridges pass on");
    cmd::run(Command::new("modprobe").arg("br_netfilter"))
}

/// Runs cargo's tests with their output shown as it comes, and counted. What each took is right where they run one at a time, and are named.
fn tests(command: &mut Command) -> Result<Told> {
    println!("test: {}", cmd::show(command));
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start cargo")?;
    let output = child.stdout.take().context("no output to read")?;
    let mut told = Told::new();
    for line in BufReader::new(output).split(b'\n') {
        let line = line.context("cannot read cargo's output")?;
        let text = String::from_utf8_lossy(&line);
        told.tally.add(Tally::of_line(&text));
        told.failures.line(&text);
        match told.times.line(&text, Instant::now()) {
            Some(took) => println!("{text} ({:.1} s)", took.as_secs_f64()),
            None => println!("{text}"),
        }
        let _ = std::io::stdout().flush();
    }
    let status = child.wait()?;
    if !status.success() && told.tally.failed == 0 {
        println!(
            "test: `{}` failed before its tests could ({status})",
            cmd::show(command)
        );
        told.tally.failed = 1;
    }
    Ok(told)
}

impl Told {
    fn new() -> Self {
        Self {
            tally: Tally::default(),
            times: Times::new(Instant::now()),
            failures: Failures::default(),
        }
    }
}

impl Tally {
    fn add(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }

    /// The counts of one `test result:` line; zeros of any other.
    fn of_line(line: &str) -> Tally {
        let mut tally = Tally::default();
        // With --quiet the dots of the tests may stand before it on the same line.
        let Some((_, counts)) = line.split_once("test result: ") else {
            return tally;
        };
        for part in counts.split(['.', ';']) {
            match part.trim().split_once(' ') {
                Some((count, "passed")) => tally.passed = count.parse().unwrap_or(0),
                Some((count, "failed")) => tally.failed = count.parse().unwrap_or(0),
                Some((count, "ignored")) => tally.ignored = count.parse().unwrap_or(0),
                Some(_) | None => {}
            }
        }
        tally
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_line_is_counted_and_others_are_not() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.10s";
        assert_eq!(
            Tally::of_line(line),
            Tally {
                passed: 12,
                failed: 3,
                ignored: 1
            }
        );
        assert_eq!(Tally::of_line("running 12 tests"), Tally::default());
    }
}
