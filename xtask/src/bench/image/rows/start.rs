//! From the request to a container's first line of output, on a node that does not have the image: a lazy pull and `migrator run`, against
//! podman, which pulls all of it first. Both from the same registry, over the same link.
//!
//! Our node has a template of the pod's shape, as a node has that ran such a pod before. A start without it is measured, too.

mod ground;
mod layout;
mod podman;

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};

use self::ground::{Ground, NODE};
use super::Bench;
use super::template::{first_output, unix_ms, uses};
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
/// Against the same starts of the peer.
const BOOTED: Metric = Metric {
    name: "first output, booted",
    unit: "s",
    aims: &[],
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
            ours.add(told("ours, booted", booted(&ground)));
            ground.forget()?;
            let run = told("podman", measure(&ground, podman::once));
            podman::forget(&ground)?;
            peer.add(run.map(|mut run| {
                run.push((BOOTED.name, run[0].1));
                run
            }));
        }
        let against = podman::version()?;
        let metrics = [TIME, FETCHED, BOOTED];
        bench
            .records
            .extend(records(&case, &against, &metrics, &ours, &peer));
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
    pull_and_run(ground, true)
}

fn booted(ground: &Ground) -> Result<Run> {
    Ok(vec![(
        BOOTED.name,
        pull_and_run(ground, false)?.as_secs_f64(),
    )])
}

/// Until the node has the container's line.
fn pull_and_run(ground: &Ground, template: bool) -> Result<Duration> {
    let lab = ground.lab();
    let before = uses(lab)?;
    let pod = ground.write_pod(template)?;
    let begun = unix_ms(SystemTime::now())?;
    ground.pull()?;
    let run = ["run", "--timeout", "300"];
    cmd::output(lab.on(NODE).args(run).arg(pod))?;
    let mut came = None;
    let mut failed = None;
    poll_until(STARTS_WITHIN, || {
        match first_output(lab, layout::POD) {
            Ok(line) => came = line,
            Err(error) => failed = Some(error),
        }
        came.is_some() || failed.is_some()
    });
    if let Some(error) = failed {
        return Err(error).context("the pod has no output");
    }
    let came = came.context("the container has printed nothing")?;
    ensure!(
        uses(lab)? - before == u64::from(template),
        "the pod did not start as it was meant to"
    );
    Ok(Duration::from_secs_f64((came - begun) / 1e3))
}
