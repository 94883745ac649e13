//! What all flows looked like at one moment, and what is wrong with that. Pure.

use super::kind::Kind;
use super::peers::{ReceiverStats, SenderStats, Tally};
use super::summary::{Flow, Move, SENDERS, tell};

/// Events of a flow that are told.
const TOLD: usize = 12;

/// What the programs tell.
#[derive(Default)]
pub(super) struct Look {
    pub(super) receiver: ReceiverStats,
    pub(super) senders: Vec<SenderStats>,
}

impl Look {
    /// Packets that were sent, by sender and kind.
    pub(super) fn sent(&self) -> Vec<Vec<u64>> {
        let of = |stats: &SenderStats| stats.flows.iter().map(|flow| flow.sent).collect();
        self.senders.iter().map(of).collect()
    }

    /// All flows, both ways.
    pub(super) fn flows(&self) -> Vec<Flow> {
        let flow = |(sender, kind)| {
            let stats: &SenderStats = &self.senders[sender];
            let [there, _] = self.tallies(sender, kind);
            Flow::new(sender, kind, &stats.flows[kind.index()], &there)
        };
        self.each().map(flow).collect()
    }

    /// Everything up to `marks` has arrived and was answered, and there was something; at the end, everything.
    pub(super) fn is_whole(&self, marks: &[Vec<u64>], at_end: bool) -> bool {
        self.each().all(|(sender, kind)| {
            let mark = marks[sender][kind.index()].max(1);
            let arrived = |tally: &Tally| tally.next >= mark && tally.missing == 0;
            self.tallies(sender, kind).iter().all(arrived)
        }) && (!at_end || self.flows().iter().all(Flow::is_whole))
    }

    /// There is something that waiting does not mend.
    pub(super) fn is_wrong(&self) -> bool {
        self.each()
            .any(|(sender, kind)| self.tallies(sender, kind).iter().any(Tally::is_wrong))
    }

    /// What is wrong, if packets up to `marks` must have arrived and been answered.
    pub(super) fn faults(&self, marks: &[Vec<u64>], moves: &[Move]) -> Vec<String> {
        let mut faults = Vec::new();
        for (sender, kind) in self.each() {
            let sent = &self.senders[sender].flows[kind.index()];
            let mark = marks[sender][kind.index()];
            let name = format!("{} {}", SENDERS[sender], kind.name());
            if sent.refused > 0 {
                faults.push(format!(
                    "{name}: {} packets could not be sent: {}",
                    sent.refused, sent.refusal
                ));
            }
            for (way, tally) in ["there", "back"].iter().zip(self.tallies(sender, kind)) {
                if tally.lost(mark) == 0 && !tally.is_wrong() && tally.next > 0 {
                    continue;
                }
                let mut text = format!(
                    "{name}, on the way {way}: of {mark} packets {} are missing (first: {:?}, left at {} us), {} doubled, {} out of order, {} changed",
                    tally.lost(mark),
                    tally.first_missing,
                    sent.first_missing_left_us,
                    tally.doubled,
                    tally.reordered,
                    tally.changed
                );
                for event in tally.events.iter().take(TOLD) {
                    text += &format!("\n            {}", tell(event, moves));
                }
                faults.push(text);
            }
        }
        let streams = self.senders.iter().map(|stats| &stats.streams);
        for (place, streams) in places().zip(streams.chain([&self.receiver.streams])) {
            let told = streams.faults.iter();
            faults.extend(told.map(|text| format!("TCP, {place}: {text}")));
        }
        faults
    }

    /// What the kernels of all places have counted, by place, without what is 0.
    pub(super) fn counters(&self) -> Vec<(String, u64)> {
        let counters = self.senders.iter().map(|stats| &stats.counters);
        places()
            .zip(counters.chain([&self.receiver.counters]))
            .flat_map(|(place, counters)| {
                let told = counters.iter().filter(|(_, count)| **count > 0);
                told.map(move |(name, count)| (format!("{place}: {name}"), *count))
            })
            .collect()
    }

    fn each(&self) -> impl Iterator<Item = (usize, Kind)> {
        let kinds = |(sender, stats): (usize, &SenderStats)| {
            // Each sends the first ones of them.
            let kinds = Kind::ALL.into_iter().take(stats.flows.len());
            kinds.map(move |kind| (sender, kind)).collect::<Vec<_>>()
        };
        self.senders.iter().enumerate().flat_map(kinds)
    }

    /// What arrived of a flow, there and back.
    fn tallies(&self, sender: usize, kind: Kind) -> [Tally; 2] {
        let mut flows = self.receiver.flows.iter();
        let there =
            flows.find(|flow| usize::from(flow.sender) == sender && flow.kind == kind.index());
        [
            there.map(|flow| flow.tally.clone()).unwrap_or_default(),
            self.senders[sender].flows[kind.index()].answers.clone(),
        ]
    }
}

/// The senders, then the receiver.
fn places() -> impl Iterator<Item = &'static str> {
    SENDERS.into_iter().chain(["the pod that moves"])
}
