//! The guest under migrator: a pod of the lab, moved and upgraded by the command line that users have.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::load::Load;
use super::pod::Guest;
use super::{BOOTS_WITHIN, MOVES_WITHIN, Moved};
use crate::cmd::{self, Said};
use crate::lab::{Lab, Node};
use crate::process::poll_until;

/// A verb that only asks or tells something.
const VERB_WITHIN: Duration = Duration::from_secs(30);

/// The pod, running.
pub(in crate::bench) struct Ours {
    lab: Lab,
    guest: Guest,
    at: Node,
    /// Its load.
    pub(in crate::bench) load: Load,
}

/// The part of a migration's report that is used; the service says more.
#[derive(Debug, Deserialize)]
struct Report {
    outcome: Outcome,
    total_ms: f64,
    downtime_ms: f64,
    frozen_at_unix_us: u64,
    memory: Memory,
}

#[derive(Debug, Deserialize)]
struct Outcome {
    result: String,
    reason: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Memory {
    faults: Option<Faults>,
}

/// The report's figures of post-copy faults.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(in crate::bench) struct Faults {
    pub(in crate::bench) count: u64,
    pub(in crate::bench) p50_us: f64,
    pub(in crate::bench) p99_us: f64,
    pub(in crate::bench) p999_us: f64,
}

#[derive(Deserialize)]
struct Started {
    id: String,
}

#[derive(Deserialize)]
struct Pods {
    pods: Vec<Pod>,
}

#[derive(Deserialize)]
struct Pod {
    name: String,
    state: String,
}

impl Ours {
    /// Runs the pod on node a, and waits until its load answers.
    ///
    /// # Errors
    /// It does not start.
    pub(in crate::bench) fn start(lab: &Lab, guest: Guest) -> Result<Ours> {
        let file = lab.dir().join("bench-pod.yaml");
        std::fs::write(&file, guest.yaml())
            .with_context(|| format!("cannot write {}", file.display()))?;
        let ours = Ours {
            lab: lab.clone(),
            guest,
            at: Node::A,
            load: Load::new(&lab.client(), guest.load())?,
        };
        let path = file.to_str().context("a path that is not UTF-8")?;
        succeeds(lab, Node::A, &["run", path], BOOTS_WITHIN)?;
        ours.load.await_ready(BOOTS_WITHIN)?;
        Ok(ours)
    }

    /// The pod, if it runs and its load answers.
    pub(in crate::bench) fn well(mut self) -> Option<Ours> {
        (self.locate().is_ok() && self.load.report().is_ok()).then_some(self)
    }

    /// The guest.
    pub(in crate::bench) fn guest(&self) -> Guest {
        self.guest
    }

    /// Moves it to the other node.
    ///
    /// # Errors
    /// It is not moved, or does not answer there.
    pub(in crate::bench) fn migrate(
        &mut self,
        options: &[&str],
    ) -> Result<(Moved, Option<Faults>)> {
        let words = [
            &["migrate", self.guest.name, "--to", self.at.other().name()],
            options,
        ]
        .concat();
        let moved = self.json(&words, MOVES_WITHIN);
        // Wherever it is now: also a migration that failed leaves it somewhere.
        let located = self.locate();
        let report: Report = moved?;
        located?;
        if report.outcome.result != "completed" {
            let reason = report.outcome.reason.unwrap_or_default();
            bail!("{}: {reason}", report.outcome.result);
        }
        let moved = Moved {
            total_ms: report.total_ms,
            start_ms: 0.0,
            downtime_ms: report.downtime_ms,
            stopped_at_unix_us: report.frozen_at_unix_us,
        };
        Ok((moved, report.memory.faults))
    }

    /// Begins to move it at `bytes_per_s`, runs `during` while pages are copied, and cancels: it stays where it is.
    ///
    /// # Errors
    /// The migration does not begin to copy, is over before `during`, or `during` fails.
    pub(in crate::bench) fn while_copied<T>(
        &mut self,
        bytes_per_s: u64,
        during: impl FnOnce(&Load) -> Result<T>,
    ) -> Result<T> {
        let megabytes = (bytes_per_s / 1_000_000).to_string();
        let to = self.at.other().name();
        let mut words = vec!["migrate", self.guest.name, "--to", to, "--detach"];
        words.extend(["--bandwidth", &megabytes, "--compress", "none"]);
        words.extend(precopy_only(&self.lab));
        let Started { id } = self.json(&words, VERB_WITHIN)?;
        let result = self.copies(&id).and_then(|()| {
            let result = during(&self.load)?;
            ensure!(
                !self.is_over(&id)?,
                "the migration was over before the measurement"
            );
            Ok(result)
        });
        let cancelled = succeeds(&self.lab, self.at, &["cancel", &id], VERB_WITHIN);
        let ended = poll_until(VERB_WITHIN, || self.is_over(&id).unwrap_or(false));
        self.locate()?;
        let result = result?;
        cancelled?;
        ensure!(ended, "the cancelled migration does not end");
        Ok(result)
    }

    /// Replaces its VMM on this node; the downtime in milliseconds.
    ///
    /// # Errors
    /// It is not replaced.
    pub(in crate::bench) fn upgrade(&mut self) -> Result<f64> {
        let report: Value = self.json(&["upgrade", self.guest.name], MOVES_WITHIN)?;
        self.load.report()?;
        let us = find_number(&report, "downtime_us")
            .with_context(|| format!("the report of `upgrade` has no downtime_us: {report}"))?;
        Ok(us / 1e3)
    }

    fn copies(&self, id: &str) -> Result<()> {
        let mut last = Ok(Value::Null);
        let copies = poll_until(VERB_WITHIN, || {
            last = self.json(&["status", id], VERB_WITHIN);
            last.as_ref().is_ok_and(|status| {
                status["phase"] == "done" || status["bytes_sent"].as_u64().unwrap_or(0) > 0
            })
        });
        let last = last?;
        ensure!(
            copies && last["phase"] != "done",
            "it does not copy: {last}"
        );
        Ok(())
    }

    fn is_over(&self, id: &str) -> Result<bool> {
        let status: Value = self.json(&["status", id], VERB_WITHIN)?;
        Ok(status["phase"] == "done")
    }

    /// Finds the node that it runs on.
    fn locate(&mut self) -> Result<()> {
        let found = poll_until(VERB_WITHIN, || {
            let runs = |node: &Node| {
                let said = succeeds(&self.lab, *node, &["--output", "json", "ps"], VERB_WITHIN);
                said.and_then(|text| Ok(serde_json::from_str::<Pods>(&text)?))
                    .is_ok_and(|list| {
                        let mut pods = list.pods.iter();
                        pods.any(|pod| pod.name == self.guest.name && pod.state == "running")
                    })
            };
            match Node::ALL.iter().find(|node| runs(node)) {
                Some(node) => {
                    self.at = *node;
                    true
                }
                None => false,
            }
        });
        ensure!(found, "pod {} runs on neither node", self.guest.name);
        Ok(())
    }

    fn json<T: DeserializeOwned>(&self, words: &[&str], limit: Duration) -> Result<T> {
        let words = [&["--output", "json"], words].concat();
        let said = says(&self.lab, self.at, &words, limit)?;
        // A migration that failed is a report, too.
        serde_json::from_str(&said.out).with_context(|| {
            format!(
                "`migrator {}` ends with {:?} and without a report: {}",
                words.join(" "),
                said.code,
                said.err.trim()
            )
        })
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        // The lab takes down what this leaves.
        let stop = ["stop", self.guest.name, "--grace", "0"];
        if let Err(error) = succeeds(&self.lab, self.at, &stop, VERB_WITHIN) {
            println!("bench: {error:#}");
        }
    }
}

/// Whether `migrator VERB` exists, and knows `option`.
pub(in crate::bench) fn knows(lab: &Lab, verb: &str, option: Option<&str>) -> bool {
    says(lab, Node::A, &[verb, "--help"], VERB_WITHIN).is_ok_and(|said| {
        said.code == Some(0) && option.is_none_or(|option| said.out.contains(option))
    })
}

/// Options that keep a migration in its pre-copy phase, where there are other modes.
fn precopy_only(lab: &Lab) -> &'static [&'static str] {
    if knows(lab, "migrate", Some("--mode")) {
        &["--mode", "precopy"]
    } else {
        &[]
    }
}

fn succeeds(lab: &Lab, node: Node, words: &[&str], limit: Duration) -> Result<String> {
    let said = says(lab, node, words, limit)?;
    ensure!(
        said.code == Some(0),
        "`migrator {}` on node {} ends with {:?}: {}",
        words.join(" "),
        node.name(),
        said.code,
        said.err.trim()
    );
    Ok(said.out)
}

fn says(lab: &Lab, node: Node, words: &[&str], limit: Duration) -> Result<Said> {
    cmd::bounded(lab.on(node).args(words), limit)
}

/// The first number of this name, at any depth.
fn find_number(value: &Value, name: &str) -> Option<f64> {
    match value {
        Value::Object(fields) => fields
            .get(name)
            .and_then(Value::as_f64)
            .or_else(|| fields.values().find_map(|field| find_number(field, name))),
        Value::Array(items) => items.iter().find_map(|item| find_number(item, name)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_with_and_without_faults() {
        let text = r#"{"id":"0","mode":"postcopy","outcome":{"result":"completed"},"total_ms":900.5,"downtime_ms":21.25,
            "frozen_at_unix_us":1000,"memory":{"bytes_ram":1,"faults":{"count":9,"p50_us":80,"p99_us":400.5,"p999_us":900,
            "max_us":901,"histogram":[[128,9]]}}}"#;
        let report: Report = serde_json::from_str(text).unwrap();
        let faults = Faults {
            count: 9,
            p50_us: 80.0,
            p99_us: 400.5,
            p999_us: 900.0,
        };
        assert_eq!(report.memory.faults, Some(faults));
        let text = r#"{"outcome":{"result":"failed","reason":"link lost"},"total_ms":1,"downtime_ms":0,
            "frozen_at_unix_us":0,"memory":{"bytes_ram":1}}"#;
        let report: Report = serde_json::from_str(text).unwrap();
        assert_eq!(report.memory.faults, None);
        assert_eq!(report.outcome.reason.as_deref(), Some("link lost"));
    }

    #[test]
    fn a_number_is_found_at_any_depth() {
        let report = serde_json::json!({ "pod": "x", "report": [{ "downtime_us": 4100 }] });
        assert_eq!(find_number(&report, "downtime_us"), Some(4100.0));
        assert_eq!(find_number(&report, "total_us"), None);
    }
}
