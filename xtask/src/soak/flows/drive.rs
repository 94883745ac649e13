//! The course of a switchover soak.

use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::Options;
use super::abort::{self, Way};
use super::look::Look;
use super::peers::Peer;
use super::pods::{self, Outside, POD};
use super::summary::{Move, SENDERS, Summary};
use crate::cmd;
use crate::lab::{Lab, Node};
use crate::migrate::migrate_with;
use crate::probe::Probe;
use crate::process::poll_until;
use crate::project::Project;
use crate::report::{MigrationReport, Outcome};
use crate::silence::spread;
use crate::soak::blocks::nth;
use crate::soak::summary::defects;

/// The echo that the blackout is measured with.
const ECHO_PORT: u16 = 7000;
/// A guest boots in 5 s under emulation, on an idle machine.
const BOOTS_WITHIN: Duration = Duration::from_secs(180);
/// What traffic may take to come through after a move.
const SETTLES_WITHIN: Duration = Duration::from_secs(20);
/// What a migration that was ended may take until it is clear where the pod is: a restarted service asks once a second.
const CLEAR_WITHIN: Duration = Duration::from_secs(60);
/// From the request to the freeze, before it is known.
const LEAD: Duration = Duration::from_millis(400);
/// The pod stays on a node for up to this long, so that moves meet the earlier one's forwarding, and also its end.
const STAY_MS: u64 = 300;

fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_micros() as u64)
}

/// Pods under load.
struct Soak<'a> {
    lab: &'a Lab,
    options: &'a Options,
    seed: u64,
    receiver: Peer,
    senders: Vec<Peer>,
    _outside: Outside,
    probe: Probe,
    at: Node,
    moves: Vec<Move>,
    faults: Vec<String>,
}

/// Runs the soak test in a lab that is up, with nothing but the demo's image on both nodes. Each line of its course
/// goes to `say`; `probe_rate` is in packets a second.
///
/// # Errors
/// The pods do not come up. Whatever goes wrong afterwards is a fault in the summary.
pub fn run(
    project: &Project,
    lab: &Lab,
    options: &Options,
    probe_rate: u32,
    say: &mut dyn FnMut(&str),
) -> Result<Summary> {
    let mut soak = Soak::begin(project, lab, options, probe_rate)?;
    say(&format!(
        "soak: seed {}; {} packets/s from each of {SENDERS:?}, and a probe of {probe_rate} from outside",
        soak.seed, options.rate
    ));
    let began = Instant::now();
    for number in 1..=options.switchovers + options.aborts {
        let mut course = Vec::new();
        if number <= options.switchovers {
            soak.switchover(number, &mut course);
        } else {
            soak.abort(number, &mut course);
        }
        if let Some(one) = soak.moves.last().filter(|one| one.number == number) {
            say(&one.line());
        }
        let last = number == options.switchovers + options.aborts;
        if last || number.is_multiple_of(options.check_every.max(1)) {
            soak.look(false);
        }
        if !soak.faults.is_empty() {
            for line in course.iter().rev().take(20).rev() {
                say(&format!("    {line}"));
            }
            break;
        }
    }
    soak.end(began.elapsed())
}

impl<'a> Soak<'a> {
    fn begin(
        project: &Project,
        lab: &'a Lab,
        options: &'a Options,
        probe_rate: u32,
    ) -> Result<Self> {
        let seed = options.seed.unwrap_or_else(now_us);
        pods::start(lab, options.rate)?;
        let outside = Outside::start(project, lab, options.rate)?;
        let (receiver, senders) = (pods::receiver(lab)?, pods::senders(lab)?);
        for peer in senders.iter().chain([&receiver]) {
            let ready = poll_until(BOOTS_WITHIN, || peer.tell("stats").is_ok());
            ensure!(
                ready,
                "no program takes orders at {}: see `migrator logs`",
                peer.address
            );
        }
        let echo: SocketAddr = format!("{}:{ECHO_PORT}", pods::mover_ipv4()).parse()?;
        ensure!(
            crate::probe::answers(&lab.client(), echo, BOOTS_WITHIN)?,
            "the pod does not answer at {echo}"
        );
        for peer in [&receiver].into_iter().chain(&senders) {
            peer.tell(&format!("start {}", seed | 1))?;
        }
        let mut soak = Soak {
            lab,
            options,
            seed,
            receiver,
            senders,
            _outside: outside,
            probe: Probe::start(&lab.client(), echo, probe_rate)?,
            at: Node::A,
            moves: Vec::new(),
            faults: Vec::new(),
        };
        soak.look(false);
        Ok(soak)
    }

    fn stay(&self, number: u32) {
        let stay = Duration::from_millis(nth(self.seed, u64::from(number) * 2) % STAY_MS);
        let until = Instant::now() + stay;
        poll_until(stay, || Instant::now() >= until);
    }

    /// Moves the pod.
    fn switchover(&mut self, number: u32, course: &mut Vec<String>) {
        self.stay(number);
        let (from, began) = (self.at, now_us());
        let report = migrate_with(self.lab, POD, from, &[], &mut |line| {
            course.push(line.to_owned());
        });
        match report {
            Ok(report) => {
                if report.outcome == Outcome::Completed {
                    self.at = from.other();
                }
                let found = defects(&report);
                if !found.is_empty() {
                    course.push(format!("{report:?}"));
                }
                let found = found
                    .into_iter()
                    .map(|text| format!("move {number}: {text}"));
                self.faults.extend(found);
                self.note(number, from, began, None, &Ok(report));
            }
            Err(error) => self.faults.push(format!("move {number}: {error:#}")),
        }
    }

    /// Begins to move the pod, and ends that.
    fn abort(&mut self, number: u32, course: &mut Vec<String>) {
        self.stay(number);
        let way = Way::ALL[number as usize % Way::ALL.len()];
        let delay = abort::delay(self.seed, number, self.lead());
        let (from, began) = (self.at, now_us());
        let report = match abort::abort(self.lab, POD, from, way, delay, course) {
            Ok(report) => report,
            Err(error) => return self.faults.push(format!("move {number}: {error:#}")),
        };
        match self.clear() {
            Ok(node) => self.at = node,
            Err(error) => self.faults.push(format!("move {number}: {error:#}")),
        }
        if let Ok(report) = &report {
            let completed = report.outcome == Outcome::Completed;
            let packets = &report.packets;
            // The first defect of a migration that was ended is that it did not complete.
            if packets.lost + packets.held > 0 && completed {
                self.faults
                    .push(format!("move {number}: the report has {packets:?}"));
            }
            if completed != (self.at != from) {
                self.faults.push(format!(
                    "move {number}: the report says {:?}, and the pod runs on {}",
                    report.outcome,
                    self.at.name()
                ));
            }
            course.push(format!("{report:?}"));
        }
        let ended = Some((way, delay.as_secs_f64() * 1e3));
        self.note(number, from, began, ended, &report);
    }

    /// What usually passes from the request to the freeze.
    fn lead(&self) -> Duration {
        let mut leads: Vec<u64> = self
            .moves
            .iter()
            .filter(|one| one.frozen_at_unix_us > one.began_at_unix_us)
            .map(|one| one.frozen_at_unix_us - one.began_at_unix_us)
            .collect();
        leads.sort_unstable();
        let middle = leads.get(leads.len() / 2);
        middle.map_or(LEAD, |us| Duration::from_micros(*us))
    }

    fn note(
        &mut self,
        number: u32,
        from: Node,
        began: u64,
        ended: Option<(Way, f64)>,
        report: &Result<MigrationReport>,
    ) {
        let mut one = Move {
            number,
            ended,
            from: from.name().to_owned(),
            at: self.at.name().to_owned(),
            began_at_unix_us: began,
            ended_at_unix_us: now_us(),
            ..Move::default()
        };
        match report {
            Ok(report) => {
                one.outcome = match &report.outcome {
                    Outcome::Completed => "completed".to_owned(),
                    Outcome::Refused(reason) => format!("refused: {reason}"),
                    Outcome::Failed(reason) => format!("failed: {reason}"),
                };
                one.frozen_at_unix_us = report.frozen_at_unix_us;
                one.total_ms = report.total_ms;
                one.downtime_ms = report.downtime_ms;
            }
            Err(error) => one.outcome = format!("{error:#}"),
        }
        self.moves.push(one);
    }

    /// Waits until the pod runs on one node, and the other has nothing of it; which one.
    fn clear(&self) -> Result<Node> {
        let mut states = [None, None];
        let mut found = None;
        poll_until(CLEAR_WITHIN, || {
            states = Node::ALL.map(|node| self.state(node));
            let running = Some(Some("running".to_owned()));
            found = match &states {
                [a, b] if *a == running && *b == Some(None) => Some(Node::A),
                [a, b] if *b == running && *a == Some(None) => Some(Node::B),
                _ => None,
            };
            found.is_some()
        });
        found.with_context(|| format!("the pod runs on no single node: {states:?}"))
    }

    /// What a node says of the pod; `None` if it does not answer.
    fn state(&self, node: Node) -> Option<Option<String>> {
        let mut command = self.lab.on(node);
        let list = cmd::output(command.args(["--output", "json", "ps"])).ok()?;
        let list: Value = serde_json::from_str(&list).ok()?;
        let pods = list["pods"].as_array()?;
        let pod = pods.iter().find(|pod| pod["name"] == POD);
        Some(pod.and_then(|pod| pod["state"].as_str().map(str::to_owned)))
    }

    fn ask(&self) -> Result<Look> {
        let senders = self.senders.iter().map(|sender| sender.order("stats"));
        Ok(Look {
            senders: senders.collect::<Result<_>>()?,
            receiver: self.receiver.order("stats")?,
        })
    }

    /// Waits until everything that was sent before has arrived and was answered; what is wrong becomes faults. At the end
    /// nothing is sent any more.
    fn look(&mut self, at_end: bool) -> Option<Look> {
        let mut marks = None;
        let mut last = Err(anyhow::anyhow!("not asked"));
        poll_until(SETTLES_WITHIN, || {
            last = self.ask();
            let Ok(look) = &last else {
                return false;
            };
            let marks = marks.get_or_insert_with(|| look.sent());
            look.is_whole(marks, at_end) || look.is_wrong()
        });
        match last {
            Ok(look) => {
                let marks = match at_end {
                    true => look.sent(),
                    false => marks.unwrap_or_default(),
                };
                self.faults.extend(look.faults(&marks, &self.moves));
                Some(look)
            }
            Err(error) => {
                self.faults.push(format!("{error:#}"));
                None
            }
        }
    }

    fn end(mut self, took: Duration) -> Result<Summary> {
        for sender in &self.senders {
            if let Err(error) = sender.tell("stop") {
                self.faults.push(format!("{error:#}"));
            }
        }
        let before = std::mem::take(&mut self.faults);
        let looked = self.look(true);
        let mut later = std::mem::replace(&mut self.faults, before);
        // What was told once is not told again.
        later.retain(|text| !self.faults.contains(text));
        self.faults.append(&mut later);
        let mut summary = Summary {
            seconds: took.as_secs_f64(),
            seed: self.seed,
            rate: self.options.rate,
            ..Summary::default()
        };
        if let Some(look) = looked {
            summary.flows = look.flows();
            for stats in &look.senders {
                summary.streams.0 += stats.streams.connections;
                summary.streams.1 += stats.streams.sent;
                summary.streams.2 += stats.streams.received;
            }
            summary.counters = look.counters();
        }
        let record = self.probe.stop()?;
        summary.probe = record.summary();
        let probe = &summary.probe;
        if (probe.lost, probe.duplicated, probe.reordered) != (0, 0, 0) {
            self.faults.push(format!(
                "the probe: {probe:?}; first without an answer: {:?}",
                record.unanswered()
            ));
        }
        for one in self
            .moves
            .iter_mut()
            .filter(|one| one.frozen_at_unix_us > 0)
        {
            one.blackout_ms = record.blackout_ms(one.frozen_at_unix_us);
        }
        let calm = |figure: fn(&Move) -> f64| {
            let moves = self.moves.iter().filter(|one| one.ended.is_none());
            spread(&moves.map(figure).collect::<Vec<f64>>())
        };
        summary.downtime_ms = calm(|one| one.downtime_ms);
        summary.blackout_ms = calm(|one| one.blackout_ms);
        summary.total_ms = calm(|one| one.total_ms);
        let ended = self.moves.iter().filter(|one| one.ended.is_some());
        summary.aborts = ended.clone().count();
        summary.stayed = ended.filter(|one| one.from == one.at).count();
        summary.switchovers = self.moves.len() - summary.aborts;
        summary.faults = self.faults;
        summary.moves = self.moves;
        Ok(summary)
    }
}
