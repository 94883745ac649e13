//! The course of a soak test: the pod, its load, the moves, and the checks after each.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::blocks::nth;
use super::client::{Connection, Stats, Workload};
use super::summary::{Fault, Move, Summary, by_mode, defects};
use super::{Mode, Options};
use crate::lab::{Lab, Node};
use crate::migrate::migrate_with;
use crate::probe::Probe;
use crate::process::{self, poll_until};
use crate::{cmd, demo_image, silence};

/// The pod, its addresses, and its UDP echo.
const POD: &str = "soak";
const POD_IPV4: &str = "10.77.0.20";
const POD_IPV6: &str = "fd77::20";
const ECHO_PORT: u16 = 7000;

/// A guest boots in 5 s under emulation, on an idle machine, and fills its memory.
const BOOTS_WITHIN: Duration = Duration::from_secs(180);
/// What traffic may take to come through after a move, and a source to go away.
const SETTLES_WITHIN: Duration = Duration::from_secs(20);
/// Messages that each connection must carry after a move, and packets that the probe must.
const MESSAGES: u64 = 4;
/// The pod stays on a node for up to this long, so that moves meet the earlier one's forwarding, and also its end.
const STAY_MS: u64 = 700;

/// A pod under load.
struct Soak<'a> {
    lab: &'a Lab,
    options: &'a Options,
    workload: Workload,
    connections: Vec<Connection>,
    probe: Probe,
    at: Node,
    /// What the workload said last.
    last: Stats,
    full_checks: u32,
}

/// Runs the soak test in a lab that is up, with nothing but the demo's image on node a. Each line of its course goes
/// to `tell`.
///
/// # Errors
/// The pod does not come up. Whatever goes wrong afterwards is a fault in the summary.
pub fn soak(lab: &Lab, options: &Options, tell: &mut dyn FnMut(&str)) -> Result<Summary> {
    ensure!(!options.modes.is_empty(), "no mode is given");
    let mut soak = Soak::begin(lab, options)?;
    tell(&format!(
        "soak: {} blocks in {} MiB, {} connections, {} packets/s",
        soak.last.blocks,
        soak.last.bytes >> 20,
        options.connections,
        options.packets
    ));
    let began = Instant::now();
    let (mut moves, mut faults) = (Vec::new(), Vec::new());
    for number in 1..=options.moves {
        if options
            .limit()
            .is_some_and(|limit| began.elapsed() >= limit)
        {
            tell("soak: the time is up");
            break;
        }
        let mode = options.mode(number);
        let mut course = Vec::new();
        let found = soak.one(number, mode, &mut moves, &mut course);
        let line = moves.last().filter(|m| m.number == number).map(Move::line);
        let line =
            line.unwrap_or_else(|| format!("move {number:>4} {:<8} did not end", mode.name()));
        tell(&line);
        if !found.is_empty() {
            for line in course.iter().rev().take(20).rev() {
                tell(&format!("    {line}"));
            }
        }
        faults.extend(found.into_iter().map(|what| Fault {
            number,
            mode: Some(mode),
            what,
        }));
        if !faults.is_empty() {
            break;
        }
    }
    Ok(soak.end(began.elapsed(), moves, faults))
}

impl<'a> Soak<'a> {
    fn begin(lab: &'a Lab, options: &'a Options) -> Result<Self> {
        let yaml = lab.dir().join("soak-pod.yaml");
        std::fs::write(&yaml, pod_yaml(options))
            .with_context(|| format!("cannot write {}", yaml.display()))?;
        cmd::output(lab.on(Node::A).arg("run").arg(&yaml))?;
        let workload = Workload {
            netns: lab.client(),
            pod: POD_IPV4.parse()?,
        };
        let mut stats = workload.stats();
        poll_until(BOOTS_WITHIN, || {
            stats = workload.stats();
            stats.is_ok()
        });
        let last = stats.with_context(|| {
            let logs = cmd::output(lab.on(Node::A).args(["logs", POD]));
            format!(
                "the pod does not come up; its output:\n{}",
                logs.unwrap_or_else(|error| format!("{error:#}"))
            )
        })?;
        let echo = SocketAddr::new(workload.pod, ECHO_PORT);
        ensure!(
            crate::probe::answers(&workload.netns, echo, BOOTS_WITHIN)?,
            "the pod does not answer at {echo}"
        );
        let connections = (0..options.connections)
            .map(|number| workload.open(last.run ^ u64::from(number)))
            .collect::<Result<_>>()?;
        let soak = Soak {
            lab,
            options,
            probe: Probe::start(&workload.netns, echo, options.packets)?,
            workload,
            connections,
            at: Node::A,
            last,
            full_checks: 0,
        };
        soak.traffic_flows()?;
        Ok(soak)
    }

    /// Moves the pod once and checks everything; what is wrong. `moves` gets the move, if it came to an end.
    fn one(
        &mut self,
        number: u32,
        mode: Mode,
        moves: &mut Vec<Move>,
        course: &mut Vec<String>,
    ) -> Vec<String> {
        let stay = Duration::from_millis(nth(self.last.run, u64::from(number)) % STAY_MS);
        poll_until(stay, || {
            self.connections.iter().any(|c| c.fault().is_some())
        });
        let words = self.options.words(mode);
        let report = migrate_with(self.lab, POD, self.at, &words, &mut |line| {
            course.push(line.to_owned());
        });
        let report = match report {
            Ok(report) => report,
            Err(error) => return vec![format!("{error:#}")],
        };
        moves.push(Move::new(number, mode, &report));
        let mut found = defects(&report);
        if report.outcome == crate::report::Outcome::Completed {
            self.at = self.at.other();
        }
        // All of them, also after one has failed: together they tell where it went wrong.
        let full = number.is_multiple_of(self.options.full_every) || number == self.options.moves;
        let checks = [
            self.one_vmm(),
            self.traffic_flows(),
            self.workload_is_well(),
            if full { self.full() } else { Ok(()) },
        ];
        found.extend(
            checks
                .into_iter()
                .filter_map(Result::err)
                .map(|e| format!("{e:#}")),
        );
        if !found.is_empty() {
            course.push(format!("{report:?}"));
        }
        found
    }

    /// The pod's VMM is where it was moved to, and there is no other.
    fn one_vmm(&self) -> Result<()> {
        let mut found = [Vec::new(), Vec::new()];
        let single = poll_until(SETTLES_WITHIN, || {
            found = Node::ALL.map(|node| vmms(&self.lab.netns(node.name())));
            let [a, b] = &found;
            match self.at {
                Node::A => (a.len(), b.len()) == (1, 0),
                Node::B | Node::C => (a.len(), b.len()) == (0, 1),
            }
        });
        let [a, b] = &found;
        ensure!(
            single,
            "the pod was moved to {}, and there are VMMs {a:?} on a and {b:?} on b",
            self.at.name()
        );
        let mut command = self.lab.on(self.at);
        let list = cmd::output(command.args(["--output", "json", "ps"]))?;
        let list: Value = serde_json::from_str(&list)?;
        let pods = list["pods"].as_array().map_or(&[][..], Vec::as_slice);
        let state = pods
            .iter()
            .find(|pod| pod["name"] == POD)
            .map(|pod| &pod["state"]);
        ensure!(
            state == Some(&Value::from("running")),
            "node {} says of the pod: {state:?}",
            self.at.name()
        );
        Ok(())
    }

    /// Every connection goes on, and every packet so far was answered, once and in order.
    fn traffic_flows(&self) -> Result<()> {
        for connection in &self.connections {
            let enough = connection.answered() + MESSAGES;
            poll_until(SETTLES_WITHIN, || {
                connection.answered() >= enough || connection.fault().is_some()
            });
            if let Some(fault) = connection.fault() {
                bail!("{fault}");
            }
            ensure!(connection.answered() >= enough, "a connection is stuck");
        }
        let sent = self.probe.sent();
        poll_until(SETTLES_WITHIN, || self.probe.tally().whole >= sent.max(1));
        let tally = self.probe.tally();
        ensure!(
            tally.whole >= sent.max(1) && tally.duplicated == 0 && tally.reordered == 0,
            "of {sent} packets the first without an answer is {}, {} answers are doubled, {} out of order",
            tally.whole,
            tally.duplicated,
            tally.reordered
        );
        Ok(())
    }

    /// The guest is the same one, goes on, and has found nothing wrong.
    fn workload_is_well(&mut self) -> Result<()> {
        let stats = self.workload.stats()?;
        let last = std::mem::replace(&mut self.last, stats.clone());
        let mut texts = stats.memory_texts.iter().chain(&stats.stream_texts);
        ensure!(
            stats.memory_faults == 0 && stats.stream_faults == 0,
            "the workload has found {} faults of memory and {} of connections, first: {}",
            stats.memory_faults,
            stats.stream_faults,
            texts.next().map_or("?", String::as_str)
        );
        ensure!(
            stats.boot_id == last.boot_id && stats.uptime_s > last.uptime_s,
            "the guest was booted anew: up for {} s, after {} s before",
            stats.uptime_s,
            last.uptime_s
        );
        ensure!(
            stats.run == last.run && stats.age_s > last.age_s,
            "the workload was started anew: {} s old, after {} s before",
            stats.age_s,
            last.age_s
        );
        ensure!(
            stats.verified > last.verified && stats.rewritten > last.rewritten,
            "the workload stands still: {last:?}, then {stats:?}"
        );
        ensure!(
            stats.connections == self.connections.len() as u64,
            "the workload has {} of {} connections",
            stats.connections,
            self.connections.len()
        );
        Ok(())
    }

    fn full(&mut self) -> Result<()> {
        let full = self.workload.full()?;
        self.full_checks += 1;
        ensure!(
            full.bytes == self.last.bytes && full.memory_faults == 0,
            "of {} bytes {} were compared, with {} faults",
            self.last.bytes,
            full.bytes,
            full.memory_faults
        );
        Ok(())
    }

    fn end(mut self, took: Duration, mut moves: Vec<Move>, mut faults: Vec<Fault>) -> Summary {
        let last = moves.last().map(|m| (m.number, m.mode));
        let fault = |faults: &mut Vec<Fault>, what| {
            faults.push(Fault {
                number: last.map_or(0, |(number, _)| number),
                mode: last.map(|(_, mode)| mode),
                what,
            });
        };
        // Only then: what was wrong before makes all of this wrong as well.
        if faults.is_empty()
            && let Err(error) = self.workload_is_well()
        {
            fault(&mut faults, format!("{error:#}"));
        }
        let connections = self.connections.len();
        let mut messages = 0;
        for connection in self.connections.drain(..) {
            match connection.stop() {
                Ok(count) => messages += count,
                Err(error) => fault(&mut faults, format!("{error:#}")),
            }
        }
        let mut probe = silence::Summary::default();
        match self.probe.stop() {
            Ok(record) => {
                probe = record.summary();
                if (probe.lost, probe.duplicated, probe.reordered) != (0, 0, 0) {
                    let first = record.unanswered();
                    fault(
                        &mut faults,
                        format!("the probe: {probe:?}; first without an answer: {first:?}"),
                    );
                }
                if let Some((count, reason)) = &record.refused {
                    fault(
                        &mut faults,
                        format!("the client could not send {count} packets: {reason}"),
                    );
                }
                for one in &mut moves {
                    one.blackout_ms = record.blackout_ms(one.frozen_at_unix_us);
                }
            }
            Err(error) => fault(&mut faults, format!("{error:#}")),
        }
        Summary {
            seconds: took.as_secs_f64(),
            modes: by_mode(&moves),
            verified_blocks: self.last.verified,
            rewritten_blocks: self.last.rewritten,
            full_checks: self.full_checks,
            connections,
            messages,
            probe,
            faults,
            moves,
        }
    }
}

/// The VMMs in a network namespace.
fn vmms(netns: &str) -> Vec<i32> {
    let mut pids = process::in_netns(netns);
    pids.retain(|pid| process::mentions(*pid, Path::new("qemu-system")));
    pids
}

/// The pod: the workload, and the probe's echo.
fn pod_yaml(options: &Options) -> String {
    let checked = options.checked();
    format!(
        "apiVersion: v1
kind: Pod
metadata:
  name: {POD}
  annotations:
    migrator/ipv4: {POD_IPV4}/24
    migrator/ipv6: {POD_IPV6}/64
    migrator/vm-memory: {memory}Mi
spec:
  containers:
    - name: check
      image: {image}
      command: [/usr/local/bin/memory-check]
      args: [--mib, \"{checked}\", --rewrite-mb, \"{rewrite}\", --workers, \"{vcpus}\"]
      resources:
        limits: {{ memory: {limit}Mi, cpu: {cpu}m }}
    - name: echo
      image: {image}
      command: [/usr/local/bin/udp-echo]
      resources:
        limits: {{ memory: 32Mi, cpu: 500m }}
",
        memory = options.memory,
        image = demo_image::REFERENCE,
        rewrite = options.rewrite,
        vcpus = options.vcpus,
        limit = checked + 32,
        cpu = options.vcpus * 1000 - 500,
    )
}
