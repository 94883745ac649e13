//! A guest is slowed, and then as fast as before, whatever becomes of who slowed it.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use vm_runtime::qmp::Qmp;
use vm_runtime::vm::throttle::{Means, Percent, Throttle, ThrottleError};
use vm_runtime::vm::{QMP_SOCKET, RunState, Vm};
use xtask::process::poll_until;

use crate::guest::Program;
use crate::lab::{Lab, count, counts_past};

/// Long enough for many periods of either means.
const WATCHED: Duration = Duration::from_secs(2);
/// On a busy machine the guest gets its share late.
const SOON: Duration = Duration::from_secs(60);

/// A guest that keeps one virtual CPU busy.
async fn busy(lab: &Lab) -> Result<Vm> {
    let vm = Vm::boot(&lab.spec(), lab.resources("vm", &lab.qemu)?).await?;
    counts_past(vm.dir(), 20).await?;
    Ok(vm)
}

/// The threads that run the guest: QEMU names them `CPU 0/TCG`.
fn threads(pid: i32) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = entry?.path();
        if std::fs::read_to_string(path.join("comm"))?.starts_with("CPU ") {
            found.push(path);
        }
    }
    ensure!(found.len() == 2, "{found:?}");
    Ok(found)
}

/// Processor time that the guest has used so far.
fn used(pid: i32) -> Result<Duration> {
    let mut nanoseconds = 0;
    for thread in threads(pid)? {
        let text = std::fs::read_to_string(thread.join("schedstat"))?;
        let first = text.split(' ').next().context("schedstat is empty")?;
        nanoseconds += first.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(nanoseconds))
}

/// How many processors the guest uses, and how far it counts in a second.
async fn speed(vm: &Vm) -> Result<(f64, f64)> {
    let (began, before, from) = (Instant::now(), used(vm.pid())?, count(vm.dir()));
    tokio::task::spawn_blocking(|| poll_until(WATCHED, || false)).await?;
    let (used, took) = (used(vm.pid())? - before, began.elapsed().as_secs_f64());
    let counted = count(vm.dir()).unwrap_or(0) - from.unwrap_or(0);
    Ok((used.as_secs_f64() / took, counted as f64 / took))
}

/// Waits until the guest uses more of a processor than any throttle in these tests leaves it.
async fn is_fast(vm: &Vm) -> Result<()> {
    let deadline = Instant::now() + SOON;
    loop {
        let (share, rate) = speed(vm).await?;
        eprintln!("    {share:.2} processors, {rate:.1} counts/s");
        if share > 0.4 {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the guest stays slow: {share}");
    }
}

/// Control groups of throttles of this process, wherever they are.
fn groups(pid: i32) -> Vec<PathBuf> {
    let prefix = format!("migrator-throttle-{pid}-");
    let (mut found, mut folders) = (Vec::new(), vec![PathBuf::from("/sys/fs/cgroup")]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push(entry.path());
                if entry.file_name().to_string_lossy().starts_with(&prefix) {
                    found.push(entry.path());
                }
            }
        }
    }
    found
}

/// No group and no record is left, and QEMU's threads are where the others are.
fn put_back(vm: &Vm) -> Result<()> {
    let left = groups(vm.pid());
    ensure!(left.is_empty(), "left behind: {left:?}");
    ensure!(!vm.dir().join("throttle.json").exists(), "its record");
    let own = std::fs::read_to_string(format!("/proc/{}/cgroup", vm.pid()))?;
    for thread in threads(vm.pid())? {
        ensure!(std::fs::read_to_string(thread.join("cgroup"))? == own);
    }
    Ok(())
}

/// Whether groups can be had here; where not, it is for this reason and no other.
async fn has_groups(vm: &Vm) -> Result<bool> {
    match Throttle::by(vm, Means::Groups).await {
        Ok(throttle) => {
            throttle.end().await?;
            Ok(true)
        }
        Err(ThrottleError::NoController { why }) => {
            eprintln!("skipped: {why}");
            Ok(false)
        }
        Err(error) => Err(error.into()),
    }
}

async fn available(vm: &Vm) -> Result<Vec<Means>> {
    Ok(if has_groups(vm).await? {
        vec![Means::Groups, Means::Slices]
    } else {
        vec![Means::Slices]
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_throttled_guest_is_slow_by_so_much_and_then_as_fast_as_before() -> Result<()> {
    let lab = Lab::with(Program::Busy).await?;
    let vm = busy(&lab).await?;
    is_fast(&vm).await?;
    for means in available(&vm).await? {
        let throttle = Throttle::by(&vm, means).await?;
        assert_eq!(throttle.means(), means);
        for (percent, at_most) in [(60, 0.5), (90, 0.25)] {
            throttle.set(Percent::clamp(percent)).await?;
            let (share, rate) = speed(&vm).await?;
            eprintln!("{means:?} {percent} %: {share:.2} processors, {rate:.1} counts/s");
            // A slice begins and ends late on a busy machine, a limit is kept to the microsecond.
            let at_most = at_most + if means == Means::Slices { 0.15 } else { 0.0 };
            ensure!(
                share < at_most && rate > 0.0,
                "{means:?} at {percent} %: {share}"
            );
        }
        throttle.set(Percent::OFF).await?;
        is_fast(&vm).await?;
        throttle.set(Percent::MAX).await?;
        throttle.end().await?;
        assert_eq!(vm.query_status().await?, RunState::Running);
        put_back(&vm)?;
        is_fast(&vm).await?;
    }
    vm.kill().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_monitor_answers_while_the_guest_is_throttled() -> Result<()> {
    let lab = Lab::with(Program::Busy).await?;
    let vm = busy(&lab).await?;
    for means in available(&vm).await? {
        let throttle = Throttle::by(&vm, means).await?;
        throttle.set(Percent::MAX).await?;
        // Over many periods, and at any point of them.
        let mut next = tokio::time::interval(Duration::from_millis(13));
        let mut took = Vec::new();
        for _ in 0..200 {
            next.tick().await;
            let began = Instant::now();
            vm.query_status().await?;
            took.push(began.elapsed());
        }
        took.sort();
        eprintln!(
            "{means:?} 95 %: query-status {:?} at the median, {:?} at most",
            took[100], took[199]
        );
        ensure!(took[100] < Duration::from_millis(100), "{took:?}");
        ensure!(took[199] < Duration::from_secs(2), "{took:?}");
        throttle.end().await?;
    }
    vm.kill().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_throttled_guest_is_frozen_and_stays_so() -> Result<()> {
    let lab = Lab::with(Program::Busy).await?;
    let vm = busy(&lab).await?;
    for means in available(&vm).await? {
        let throttle = Throttle::by(&vm, means).await?;
        ensure!(
            tokio::time::timeout(Duration::from_millis(50), Throttle::new(&vm))
                .await
                .is_err(),
            "two throttles of one guest"
        );
        for off_first in [true, false] {
            throttle.set(Percent::MAX).await?;
            counts_past(vm.dir(), count(vm.dir()).context("it counts")?).await?;
            let began = Instant::now();
            if off_first {
                throttle.set(Percent::OFF).await?;
            }
            let off = began.elapsed();
            vm.stop().await?;
            eprintln!(
                "{means:?}: off {off:?}, then stopped {:?}",
                began.elapsed() - off
            );
            // Nothing continues it: neither a slice that was under way, nor one to come.
            let frozen = used(vm.pid())?;
            let mut next = tokio::time::interval(Duration::from_millis(20));
            for _ in 0..20 {
                next.tick().await;
                assert_eq!(vm.query_status().await?, RunState::Paused);
            }
            // What its threads took to come to rest.
            let since = used(vm.pid())? - frozen;
            ensure!(since < Duration::from_millis(5), "it has run for {since:?}");
            let refused = tokio::time::timeout(Duration::from_millis(50), Throttle::new(&vm)).await;
            ensure!(refused.is_err(), "two throttles of one guest");
            vm.cont().await?;
        }
        // Ended while the guest is frozen, it leaves it so.
        vm.stop().await?;
        throttle.end().await?;
        assert_eq!(vm.query_status().await?, RunState::Paused);
        match Throttle::new(&vm).await {
            Err(ThrottleError::NotRunning { .. }) => {}
            other => bail!("a frozen guest is throttled: {other:?}"),
        }
        vm.cont().await?;
        put_back(&vm)?;
    }
    vm.kill().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_throttle_puts_everything_back() -> Result<()> {
    let lab = Lab::with(Program::Busy).await?;
    let vm = busy(&lab).await?;
    for means in available(&vm).await? {
        let throttle = Throttle::by(&vm, means).await?;
        throttle.set(Percent::MAX).await?;
        drop(throttle);
        // Another one waits for that: what it finds is as it was before.
        let next = Throttle::by(&vm, means).await?;
        next.end().await?;
        put_back(&vm)?;
        assert_eq!(vm.query_status().await?, RunState::Running);
        is_fast(&vm).await?;
    }
    // A VM that ends under its throttle leaves nothing either.
    let throttle = Throttle::new(&vm).await?;
    throttle.set(Percent::MAX).await?;
    vm.kill().await?;
    let left = groups(vm.pid());
    ensure!(left.is_empty(), "left behind: {left:?}");
    let _ = throttle.end().await;
    Ok(())
}

/// A process that throttles the VM of this folder, up to the moment at which it says so.
fn throttler(dir: &Path, means: Means, until: &str) -> Result<Child> {
    let name = match means {
        Means::Groups => "groups",
        Means::Slices => "slices",
    };
    let mut child = Command::new(env!("CARGO_BIN_EXE_throttler"))
        .arg(dir)
        .args([name, "95"])
        .stdout(Stdio::piped())
        .spawn()?;
    let said = child.stdout.take().context("it has an output")?;
    for line in BufReader::new(said).lines() {
        if line? == until {
            return Ok(child);
        }
    }
    child.wait()?;
    bail!("it ended before it was {until}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_throttle_of_a_killed_service_is_taken_back() -> Result<()> {
    let lab = Lab::with(Program::Busy).await?;
    let mut vm = busy(&lab).await?;
    for means in available(&vm).await? {
        let (record, dir) = (vm.record(), vm.dir().to_owned());
        drop(vm);
        let (until, state) = match means {
            Means::Groups => ("throttled", "running"),
            Means::Slices => ("stopped", "paused"),
        };
        let deadline = Instant::now() + SOON;
        loop {
            let mut killed = throttler(&dir, means, until)?;
            killed.kill()?;
            killed.wait()?;
            // This is how it was left; a slice may have ended in the meantime.
            let qmp = Qmp::connect(&dir.join(QMP_SOCKET), SOON).await?;
            let answer = qmp.execute("query-status", Value::Null, SOON).await?;
            if answer["status"] == state {
                break;
            }
            ensure!(
                Instant::now() < deadline,
                "it is left {answer}, and not {state}"
            );
        }
        assert_eq!(
            groups(record.pid).len(),
            if means == Means::Groups { 2 } else { 0 }
        );

        vm = Vm::attach(&record).await?;
        put_back(&vm)?;
        assert_eq!(vm.query_status().await?, RunState::Running);
        is_fast(&vm).await?;
    }
    vm.kill().await?;
    Ok(())
}
