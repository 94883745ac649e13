//! From the request to a container's first line of output, on a node that does not have the image: a lazy pull and `migrator run`, against
//! podman, which pulls all of it first. Both from the same registry, over the same link.

mod ground;
mod layout;
mod podman;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use self::ground::{Ground, NODE};
use super::Bench;
use crate::bench::figures::{Aim, Metric, Run, Samples, records};
use crate::bench::plan::{Plan, told};
use crate::cmd;
use crate::process::poll_until;

/// A pull of a GiB at 100 Mbit/s takes 90 s.
const STARTS_WITHIN: Duration = Duration::from_secs(400);

const TIME: Metric = Metric {
    name: "first output",
    unit: "s",
    aims: &[Aim::RatioAtMost(0.2)],
};
const FETCHED: Metric = Metric {
    name: "fetched until then",
    unit: "MiB",
    aims: &[],
};

/// What the registry's link is limited to, as `tc` writes it; none is what the machine does between two namespaces.
const LINKS: [(&str, Option<&str>); 3] = [
    ("1gbit", Some("1gbit")),
    ("100mbit", Some("100mbit")),
    ("unlimited", None),
];

/// Sizes of the image in MiB.
const FULL: u32 = 1024;
const SMALL: u32 = 128;

pub(super) fn cases(plan: &Plan) -> Vec<String> {
    if plan.quick {
        return vec![case(SMALL, LINKS[0].0)];
    }
    LINKS.map(|(link, _)| case(FULL, link)).to_vec()
}

fn case(mib: u32, link: &str) -> String {
    format!("start-{mib}-{link}")
}

pub(super) fn run(bench: &mut Bench<'_>, wanted: &[String]) -> Result<()> {
    let mib = match bench.plan.quick {
        true => SMALL,
        false => FULL,
    };
    let ground = Ground::up(bench.project, mib)?;
    for (link, rate) in LINKS {
        let case = case(mib, link);
        if !wanted.contains(&case) {
            continue;
        }
        ground.limit(rate)?;
        let (mut ours, mut peer) = (Samples::default(), Samples::default());
        for _ in 0..bench.plan.runs {
            ours.add(told("ours", measure(&ground, ours_once)));
            ground.forget()?;
            peer.add(told("podman", measure(&ground, podman::once)));
            podman::forget(&ground)?;
        }
        let against = podman::version()?;
        let records = records(&case, &against, &[TIME, FETCHED], &ours, &peer);
        bench.records.extend(records);
    }
    Ok(())
}

/// One start, with what crossed the registry's link meanwhile.
fn measure(ground: &Ground, start: fn(&Ground) -> Result<Duration>) -> Result<Run> {
    let before = ground.sent_bytes()?;
    let took = start(ground)?;
    let bytes = ground.sent_bytes()?.saturating_sub(before);
    Ok(vec![
        (TIME.name, took.as_secs_f64()),
        (FETCHED.name, bytes as f64 / f64::from(1 << 20)),
    ])
}

fn ours_once(ground: &Ground) -> Result<Duration> {
    let begun = Instant::now();
    let pull = ["image", "pull", "--lazy", "--plain-http", "--lease", "0"];
    cmd::output(ground.lab().on(NODE).args(pull).arg(ground.image()))?;
    let run = ["run", "--timeout", "300"];
    cmd::output(ground.lab().on(NODE).args(run).arg(ground.pod_file()))?;
    let mut failed = None;
    let came = poll_until(STARTS_WITHIN, || {
        match cmd::output(ground.lab().on(NODE).args(["logs", layout::POD])) {
            Ok(lines) => lines.contains(layout::LINE),
            Err(error) => {
                failed = Some(error);
                true
            }
        }
    });
    let took = begun.elapsed();
    match failed {
        Some(error) => Err(error).context("the pod has no output"),
        None => {
            ensure!(came, "the container has printed nothing");
            Ok(took)
        }
    }
}
