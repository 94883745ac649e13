//! What a switchover soak has found. Pure.

use serde::Serialize;

use super::abort::Way;
use super::kind::Kind;
use super::peers::{Event, Sent, Tally};
use crate::silence::{self, Spread};

/// Where senders are, by their numbers.
pub(super) const SENDERS: [&str; 3] = ["outside", "pod on a", "pod on b"];

/// One migration.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Move {
    /// From 1.
    pub number: u32,
    /// How it was ended, and how long after its beginning; none if it was let be.
    pub ended: Option<(Way, f64)>,
    /// Source node.
    pub from: String,
    /// Where the pod runs afterwards.
    pub at: String,
    /// As the report has it.
    pub outcome: String,
    /// When it was asked for, in microseconds of Unix time.
    pub began_at_unix_us: u64,
    /// When it was over.
    pub ended_at_unix_us: u64,
    /// When the guest was frozen; 0 if it was not.
    pub frozen_at_unix_us: u64,
    /// From the request to the end.
    pub total_ms: f64,
    /// From the source's stop to the destination's resume.
    pub downtime_ms: f64,
    /// Longest silence that the probe saw around the freeze; known at the end.
    pub blackout_ms: f64,
}

impl Move {
    /// For people, on one line.
    pub fn line(&self) -> String {
        let ended = match self.ended {
            Some((way, after_ms)) => format!(", {} after {after_ms:.0} ms", way.name()),
            None => String::new(),
        };
        format!(
            "move {:>4} from {}: total {:>5.0} ms, downtime {:>5.1} ms{ended}: {}, runs on {}",
            self.number, self.from, self.total_ms, self.downtime_ms, self.outcome, self.at
        )
    }
}

/// A flow, both ways.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Flow {
    /// Where it is sent from.
    pub sender: String,
    /// Its kind.
    pub kind: String,
    /// Packets that were sent to the pod.
    pub sent: u64,
    /// Of these, how many arrived there.
    pub arrived: u64,
    /// And how many were answered.
    pub answered: u64,
    /// Lost, on the way there and on the way back.
    pub lost: (u64, u64),
    /// Doubled.
    pub doubled: (u64, u64),
    /// Out of order.
    pub reordered: (u64, u64),
    /// Not as they were sent.
    pub changed: (u64, u64),
}

impl Flow {
    pub(super) fn new(sender: usize, kind: Kind, sent: &Sent, there: &Tally) -> Self {
        let back = &sent.answers;
        Self {
            sender: SENDERS.get(sender).copied().unwrap_or("?").to_owned(),
            kind: kind.name().to_owned(),
            sent: sent.sent,
            arrived: there.received,
            answered: back.received,
            lost: (there.lost(sent.sent), back.lost(there.next)),
            doubled: (there.doubled, back.doubled),
            reordered: (there.reordered, back.reordered),
            changed: (there.changed, back.changed),
        }
    }

    /// Whether each packet arrived and was answered, once and in order.
    pub fn is_whole(&self) -> bool {
        self.sent > 0
            && [self.lost, self.doubled, self.reordered, self.changed] == [(0, 0); 4]
            && self.answered == self.sent
    }
}

/// The move that an event is nearest to, in words.
pub(super) fn near(at_us: u64, moves: &[Move]) -> String {
    let distance = |one: &Move| {
        let (from, to) = (
            one.began_at_unix_us,
            one.ended_at_unix_us.max(one.began_at_unix_us),
        );
        from.saturating_sub(at_us).max(at_us.saturating_sub(to))
    };
    let Some(one) = moves.iter().min_by_key(|one| distance(one)) else {
        return "before the first move".to_owned();
    };
    let since = |then: u64| (at_us as f64 - then as f64) / 1e3;
    let frozen = match one.frozen_at_unix_us {
        0 => "not frozen".to_owned(),
        frozen => format!("{:+.1} ms from its freeze", since(frozen)),
    };
    format!(
        "{:+.1} ms from the beginning of move {}, {frozen}, downtime {:.1} ms",
        since(one.began_at_unix_us),
        one.number,
        one.downtime_ms
    )
}

/// An event, in words.
pub(super) fn tell(event: &Event, moves: &[Move]) -> String {
    format!(
        "{} of {} from number {} on, {}",
        event.what,
        event.count,
        event.number,
        near(event.at_us, moves)
    )
}

/// The whole run.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// From the first move to the last, in seconds.
    pub seconds: f64,
    /// What random choices follow from.
    pub seed: u64,
    /// Packets a second, of each sender over all kinds.
    pub rate: u32,
    /// Moves that completed, and those that were ended.
    pub switchovers: usize,
    /// Migrations that something was done to.
    pub aborts: usize,
    /// Of these, how many left the pod where it was.
    pub stayed: usize,
    /// By sender and kind.
    pub flows: Vec<Flow>,
    /// TCP connections, messages sent, and answered.
    pub streams: (u64, u64, u64),
    /// What the pods' kernels dropped themselves, and sent again, by place.
    pub counters: Vec<(String, u64)>,
    /// The UDP probe that the blackout is measured with.
    pub probe: silence::Summary,
    /// Of the moves that were let be.
    pub downtime_ms: Option<Spread>,
    /// Of the moves that were let be.
    pub blackout_ms: Option<Spread>,
    /// Of the moves that were let be.
    pub total_ms: Option<Spread>,
    /// What went wrong; empty if nothing did.
    pub faults: Vec<String>,
    /// Every migration.
    pub moves: Vec<Move>,
}

impl Summary {
    /// The closing lines; the last of them says whether all was well.
    pub fn text(&self) -> String {
        let mut text = format!(
            "{:<9} {:<11} {:>8} {:>8} {:>8}  lost  doubled  reordered (there/back)\n",
            "from", "kind", "sent", "arrived", "answered"
        );
        for flow in &self.flows {
            text += &format!(
                "{:<9} {:<11} {:>8} {:>8} {:>8}  {}/{}  {}/{}  {}/{}\n",
                flow.sender,
                flow.kind,
                flow.sent,
                flow.arrived,
                flow.answered,
                flow.lost.0,
                flow.lost.1,
                flow.doubled.0,
                flow.doubled.1,
                flow.reordered.0,
                flow.reordered.1
            );
        }
        let (connections, sent, answered) = self.streams;
        text += &format!(
            "TCP       {connections} connections, {sent} messages, {answered} answered\n\
             probe     {} packets, {} lost, {} doubled, {} out of order\n",
            self.probe.sent, self.probe.lost, self.probe.duplicated, self.probe.reordered
        );
        for (name, count) in &self.counters {
            text += &format!("counter   {name}: {count}\n");
        }
        for (name, spread) in [
            ("downtime", self.downtime_ms),
            ("blackout", self.blackout_ms),
            ("total", self.total_ms),
        ] {
            if let Some(s) = spread {
                text += &format!(
                    "{name:<9} min {:.1}, median {:.1}, p95 {:.1}, max {:.1} ms\n",
                    s.min, s.median, s.p95, s.max
                );
            }
        }
        for fault in &self.faults {
            text += &format!("FAULT     {fault}\n");
        }
        text += &format!(
            "{}: {} switchovers, {} aborts of which {} left the pod where it was, in {:.0} s, seed {}, {} faults\n",
            if self.faults.is_empty() {
                "OK"
            } else {
                "FAILED"
            },
            self.switchovers,
            self.aborts,
            self.stayed,
            self.seconds,
            self.seed,
            self.faults.len()
        );
        text
    }
}
