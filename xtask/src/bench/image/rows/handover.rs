//! A move to a node that lacks the image: what crosses of it before the guest resumes, against the image's size.

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::Bench;
use crate::bench::figures::{Aim, Metric, Run, Samples, records};
use crate::bench::plan::told;
use crate::lab::{Lab, Node, Owner};
use crate::{cmd, data_image};

/// The pod.
const POD: &str = "bench-image";
/// MiB of data in the image: what is asked for, and what shows whether it works.
const SIZES: [u32; 2] = [1024, 64];

const METRICS: [Metric; 2] = [
    Metric {
        name: "before resume",
        unit: "MiB",
        aims: &[Aim::RatioAtMost(0.05)],
    },
    Metric {
        name: "downtime",
        unit: "ms",
        aims: &[],
    },
];

/// The part of a migration's report that is used.
#[derive(Debug, Deserialize)]
struct Report {
    outcome: Outcome,
    downtime_ms: f64,
    images: Option<Images>,
}

#[derive(Debug, Deserialize)]
struct Outcome {
    result: String,
    reason: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Images {
    bytes_size: u64,
    bytes_here: u64,
    bytes_before_resume: u64,
}

fn case(mib: u32) -> String {
    format!("handover-{mib}")
}

pub(super) fn cases(quick: bool) -> Vec<String> {
    let sizes = if quick { &SIZES[1..] } else { &SIZES[..1] };
    sizes.iter().map(|mib| case(*mib)).collect()
}

pub(super) fn run(bench: &mut Bench<'_>, wanted: &[String]) -> Result<()> {
    for mib in SIZES {
        if wanted.contains(&case(mib)) {
            let (mut ours, mut size) = (Samples::default(), Samples::default());
            for _ in 0..bench.plan.runs {
                let run = told("ours", once(bench, mib));
                let image = run.as_ref().ok().and_then(|run| run.last());
                if let Some((_, mib)) = image {
                    size.add(Ok(vec![("before resume", *mib)]));
                }
                ours.add(run);
            }
            let records = records(&case(mib), "the image's size", &METRICS, &ours, &size);
            bench.records.extend(records);
        }
    }
    Ok(())
}

/// Takes the lab down.
struct Guard(Lab);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Err(error) = self.0.down() {
            println!("bench: {error:#}");
        }
    }
}

/// One move to a node that has nothing; the image's size is the last of the figures.
fn once(bench: &Bench<'_>, mib: u32) -> Result<Run> {
    let layout = data_image::ensure(bench.project, mib)?;
    let lab = Lab::new(bench.project)?;
    if lab.state()?.owner == Some(Owner::User) {
        bail!("a lab is up: take it down first with `cargo xtask lab down`");
    }
    let lab = Guard(lab);
    lab.0.up(Owner::Demo)?;
    cmd::output(lab.0.on(Node::A).args(["image", "import"]).arg(&layout))?;
    let file = lab.0.dir().join("bench-image.yaml");
    std::fs::write(&file, yaml()).with_context(|| format!("cannot write {}", file.display()))?;
    cmd::output(lab.0.on(Node::A).arg("run").arg(&file))?;
    let words = ["--output", "json", "migrate", POD, "--to", "b"];
    let report = cmd::output(lab.0.on(Node::A).args(words))?;
    let report: Report = serde_json::from_str(&report).context("a report of another form")?;
    if report.outcome.result != "completed" {
        let reason = report.outcome.reason.unwrap_or_default();
        bail!("{}: {reason}", report.outcome.result);
    }
    let images = report.images.context("the report says nothing of images")?;
    ensure!(
        images.bytes_here == 0,
        "the destination had a part of the image"
    );
    // The pod reads all of it there.
    let sums = format!("sha256sum /{}/*", data_image::FOLDER);
    let words = ["exec", POD, "--", "/bin/sh", "-c", &sums];
    let sums = cmd::output(lab.0.on(Node::B).args(words))?;
    ensure!(
        sums.trim() == data_image::sums(mib).trim(),
        "the pod reads something else than what is in the image"
    );
    let mebibytes = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    Ok(vec![
        ("before resume", mebibytes(images.bytes_before_resume)),
        ("downtime", report.downtime_ms),
        ("size", mebibytes(images.bytes_size)),
    ])
}

fn yaml() -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata:
  name: {POD}
  annotations:
    migrator/ipv4: 10.77.0.30/24
    migrator/vm-memory: 256Mi
spec:
  containers:
    - name: main
      image: {image}
      command: [/bin/sleep, '100000']
",
        image = data_image::REFERENCE
    )
}
