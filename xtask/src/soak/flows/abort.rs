//! Migrations that are ended at a random step.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;

use crate::lab::{Lab, Node, Topology, http_get};
use crate::migrate::migrate_with;
use crate::process::poll_until;
use crate::report::MigrationReport;
use crate::soak::blocks::nth;
use crate::{cmd, netns};

/// A peer that is silent for 3 s counts as lost: a cut of this length ends a migration that can still be ended.
const CUT: Duration = Duration::from_secs(4);
/// For one request to a service.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);

/// How a migration is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// `migrator cancel`.
    Cancel,
    /// The destination's service is killed, and started again.
    KillDestination,
    /// The nodes do not reach each other for 4 s; the pods' own traffic does not go that way.
    CutLink,
}

impl Way {
    /// All of them.
    pub const ALL: [Way; 3] = [Way::Cancel, Way::KillDestination, Way::CutLink];

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::KillDestination => "kill destination",
            Self::CutLink => "cut link",
        }
    }
}

/// When it is ended: of each two, one at any time, and one around the switchover, which is short. `lead` is what usually
/// passes from the request to the freeze; to end it takes some time itself.
pub(super) fn delay(seed: u64, number: u32, lead: Duration) -> Duration {
    let random = nth(seed, u64::from(number) * 2 + 1);
    let lead_us = lead.as_micros() as u64;
    let after_us = match number.is_multiple_of(2) {
        true => random % lead_us.max(1),
        false => lead_us.saturating_sub(120_000) + random % 160_000,
    };
    Duration::from_micros(after_us)
}

/// Begins to move the pod away from `from`, and ends that after `delay`. The report, or why there is none.
pub(super) fn abort(
    lab: &Lab,
    pod: &str,
    from: Node,
    way: Way,
    delay: Duration,
    course: &mut Vec<String>,
) -> Result<Result<MigrationReport>> {
    let began = Instant::now();
    std::thread::scope(|scope| {
        let moving = scope.spawn(|| {
            migrate_with(lab, pod, from, &[], &mut |line| {
                course.push(line.to_owned());
            })
        });
        poll_until(delay.saturating_sub(began.elapsed()), || {
            moving.is_finished()
        });
        let acted = match way {
            Way::Cancel => cancel(lab, pod, from),
            Way::KillDestination => lab
                .kill_node(from.other())
                .and_then(|()| lab.start_node(from.other())),
            Way::CutLink => cut(lab, || moving.is_finished()),
        };
        let report = moving
            .join()
            .map_err(|_| anyhow::anyhow!("the thread that moved the pod panicked"));
        acted.with_context(|| format!("could not {}", way.name()))?;
        report
    })
}

fn cancel(lab: &Lab, pod: &str, from: Node) -> Result<()> {
    let list = http_get(&lab.api_socket(from), "/v1/migrations", ANSWERS_WITHIN)?;
    let list: Value = serde_json::from_str(&list)?;
    let under_way = list["migrations"]
        .as_array()
        .into_iter()
        .flatten()
        .rfind(|one| one["pod"] == pod && one["from"] == from.name() && one["phase"] != "done");
    let Some(id) = under_way.and_then(|one| one["id"].as_str()) else {
        // It has not begun, or has ended.
        return Ok(());
    };
    // Refused after the grant, and of no effect after the end: what came of it shows in the migration's report.
    cmd::bounded(lab.on(from).args(["cancel", id]), Duration::from_secs(60)).map(drop)
}

/// Neither node's service reaches the other's for a while; frames of pods pass.
fn cut(lab: &Lab, over: impl Fn() -> bool) -> Result<()> {
    let result = Node::ALL
        .into_iter()
        .try_for_each(|node| block(lab, node, true));
    let until = Instant::now() + CUT;
    // Whole, also if the migration ends before: its other side is to notice.
    poll_until(CUT, || over() && Instant::now() >= until);
    let mended: Vec<Result<()>> = Node::ALL
        .into_iter()
        .map(|node| block(lab, node, false))
        .collect();
    mended.into_iter().fold(result, Result::and)
}

/// What a node's service sends to the other one goes nowhere, or does so again.
fn block(lab: &Lab, node: Node, on: bool) -> Result<()> {
    let name = lab.netns(node.name());
    debug_assert!(netns::exists(&name));
    let to = format!("{}/32", node.other().address());
    let ip = |words: &str| {
        let words = ["-n", &name].into_iter().chain(words.split(' '));
        cmd::output(&mut cmd::command("ip", words)).map(drop)
    };
    match lab.topology() {
        // Frames of pods are not routed.
        Topology::Bridge => {
            let verb = if on { "replace" } else { "del" };
            ip(&format!("route {verb} blackhole {to}"))
        }
        // They are, in the tunnel to the same address.
        Topology::Routed => {
            let verb = if on { "add" } else { "del" };
            let rule = |end| {
                ip(&format!(
                    "rule {verb} to {to} ipproto tcp {end} 7077 blackhole"
                ))
            };
            rule("dport").and(rule("sport"))
        }
    }
}
