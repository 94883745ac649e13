//! The start of a pod: from a template, against a boot of the same pod on the same node.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use vm_runtime::vm::VmRecord;

use super::Bench;
use crate::bench::figures::{Aim, Metric, Run, Samples, records};
use crate::bench::plan::told;
use crate::lab::{Lab, Node, Owner};
use crate::process::poll_until;
use crate::{cmd, demo_image};

/// Guest RAM in MiB.
const SIZES: [u32; 2] = [256, 1024];

/// A boot under emulation, on a busy machine.
const STARTS_WITHIN: Duration = Duration::from_secs(120);
/// When memory is looked at: the guest has told what it has freed by then.
const RESTS: Duration = Duration::from_secs(5);

const POD: &str = "bench";

const START: &str = "request to first output";
const RESIDENT: &str = "resident memory of the VMM";

const METRICS: [Metric; 2] = [
    Metric {
        name: START,
        unit: "ms",
        aims: &[Aim::RatioAtMost(0.15)],
    },
    Metric {
        name: RESIDENT,
        unit: "MiB",
        aims: &[],
    },
];

pub(super) fn cases(quick: bool) -> Vec<String> {
    let sizes = if quick { &SIZES[..1] } else { &SIZES };
    sizes.iter().map(|mib| case(*mib)).collect()
}

fn case(mib: u32) -> String {
    format!("template-{mib}")
}

pub(super) fn run(bench: &mut Bench<'_>, wanted: &[String]) -> Result<()> {
    let lab = Lab::new(bench.project)?;
    let users = lab.state()?.owner == Some(Owner::User);
    if users && Node::ALL.iter().any(|node| lab.is_running(*node)) {
        bail!(
            "a lab is up: the benchmark would replace it, so take it down first with `cargo xtask lab down`"
        );
    }
    let image = demo_image::ensure(bench.project)?;
    lab.up(Owner::Demo)?;
    let measured = cmd::output(lab.on(Node::A).args(["image", "import"]).arg(&image))
        .map(drop)
        .and_then(|()| {
            let sizes = SIZES.iter().filter(|mib| wanted.contains(&case(**mib)));
            for mib in sizes {
                measure(bench, &lab, *mib)?;
            }
            Ok(())
        });
    lab.down()?;
    measured
}

/// One start of each side in turn, one pod at a time.
fn measure(bench: &mut Bench<'_>, lab: &Lab, mib: u32) -> Result<()> {
    let file = write(lab, mib, true)?;
    let built = cmd::output(lab.on(Node::A).args(["template", "build"]).arg(&file))?;
    println!("bench:   template {}", built.trim());
    let mut ours = Samples::default();
    let mut peer = Samples::default();
    for _ in 0..bench.plan.runs {
        ours.add(told("from the template", start(lab, mib, true)));
        peer.add(told("booted", start(lab, mib, false)));
    }
    let records = records(&case(mib), "a boot of the same pod", &METRICS, &ours, &peer);
    bench.records.extend(records);
    Ok(())
}

/// Starts the pod, takes its figures, and stops it.
fn start(lab: &Lab, mib: u32, template: bool) -> Result<Run> {
    let file = write(lab, mib, template)?;
    let before = uses(lab)?;
    let began = unix_ms(SystemTime::now())?;
    cmd::bounded(lab.on(Node::A).arg("run").arg(&file), STARTS_WITHIN).and_then(|said| {
        ensure!(said.code == Some(0), "`migrator run`: {}", said.err.trim());
        Ok(())
    })?;
    let figures = figures(lab, began);
    cmd::output(lab.on(Node::A).args(["stop", POD, "--grace", "0"]))?;
    ensure!(
        uses(lab)? - before == u64::from(template),
        "the pod did not start as it was meant to"
    );
    figures
}

fn figures(lab: &Lab, began: f64) -> Result<Run> {
    let mut first = None;
    poll_until(STARTS_WITHIN, || {
        first = first_output(lab, POD).ok().flatten();
        first.is_some()
    });
    let first = first.context("the pod prints nothing")?;
    std::thread::sleep(RESTS);
    let dir = lab.node_dir(Node::A).join("state/pods").join(POD);
    let resident = resident_mib(VmRecord::load(&dir)?.pid)?;
    Ok(vec![(START, first - began), (RESIDENT, resident)])
}

/// When node a stored the first thing that the pod printed, in milliseconds of Unix time.
pub(super) fn first_output(lab: &Lab, pod: &str) -> Result<Option<f64>> {
    #[derive(Deserialize)]
    struct Line {
        unix_ms: u64,
    }
    let text = cmd::output(lab.on(Node::A).args(["--output", "json", "logs", pod]))?;
    let line = text.lines().next().map(serde_json::from_str::<Line>);
    Ok(line.transpose()?.map(|line| line.unix_ms as f64))
}

/// `VmRSS` of proc_pid_status(5): guest RAM counts as shared memory.
fn resident_mib(pid: i32) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    let kib: f64 = kib.context("no VmRSS")?.parse()?;
    Ok(kib / 1024.0)
}

/// Pods of node a that were started from templates.
pub(super) fn uses(lab: &Lab) -> Result<u64> {
    #[derive(Deserialize)]
    struct List {
        templates: Vec<Template>,
    }
    #[derive(Deserialize)]
    struct Template {
        starts: u64,
    }
    let text = cmd::output(lab.on(Node::A).args(["--output", "json", "template", "ls"]))?;
    let list: List = serde_json::from_str(&text)?;
    Ok(list.templates.iter().map(|template| template.starts).sum())
}

fn write(lab: &Lab, mib: u32, template: bool) -> Result<PathBuf> {
    let file = lab.dir().join("bench-pod.yaml");
    std::fs::write(&file, yaml(mib, template))
        .with_context(|| format!("cannot write {}", file.display()))?;
    Ok(file)
}

fn yaml(mib: u32, template: bool) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata:
  name: {POD}
  annotations:
    migrator/ipv4: 10.77.0.10/24
    migrator/vm-memory: {mib}Mi
    migrator/template: \"{template}\"
spec:
  containers:
    - name: main
      image: {image}
      command: [/bin/sh, -c, 'echo here; while :; do sleep 60; done']
",
        image = demo_image::REFERENCE
    )
}

/// Milliseconds of Unix time.
pub(super) fn unix_ms(time: SystemTime) -> Result<f64> {
    Ok(time.duration_since(UNIX_EPOCH)?.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn both_sides_run_the_same_pod_but_for_the_annotation() {
        let lines = |template| -> BTreeSet<String> {
            yaml(256, template).lines().map(str::to_owned).collect()
        };
        let differ: Vec<String> = lines(true).difference(&lines(false)).cloned().collect();
        assert_eq!(differ, ["    migrator/template: \"true\""]);
    }
}
