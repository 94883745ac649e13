//! What arrived of one flow: numbers that are missing, doubled, or out of order. Pure, and only `std`.

use std::collections::BTreeSet;

/// Events that are kept; the counts go on.
const KEPT: usize = 48;
/// A number that is further ahead than this cannot have been sent.
const FAR: u64 = 1 << 20;

/// What an event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Numbers were passed over. They are lost, or late.
    Gap,
    /// A number came after a higher one.
    Late,
    /// A number came again.
    Doubled,
    /// A packet was not as it was sent.
    Changed,
}

impl What {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gap => "gap",
            Self::Late => "late",
            Self::Doubled => "doubled",
            Self::Changed => "changed",
        }
    }
}

/// Something that must not be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// What.
    pub what: What,
    /// The number, or the first of them.
    pub number: u64,
    /// How many.
    pub count: u64,
    /// When, in microseconds of Unix time.
    pub at_us: u64,
}

/// One flow at the end that it arrives at.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Numbers that came, each counted once.
    pub received: u64,
    /// Above the highest number that came.
    pub next: u64,
    /// Numbers below `next` that have not come.
    pub missing: BTreeSet<u64>,
    /// Packets whose number had come already.
    pub doubled: u64,
    /// Packets that came after one with a higher number.
    pub reordered: u64,
    /// Packets that were not as they were sent.
    pub changed: u64,
    /// The first that must not be.
    pub events: Vec<Event>,
}

impl Tally {
    /// Counts a packet.
    pub fn add(&mut self, number: u64, right: bool, at_us: u64) {
        if !right || number > self.next + FAR {
            self.changed += 1;
            self.note(What::Changed, number, 1, at_us);
            return;
        }
        if number >= self.next {
            if number > self.next {
                self.note(What::Gap, self.next, number - self.next, at_us);
                self.missing.extend(self.next..number);
            }
            self.next = number + 1;
            self.received += 1;
        } else if self.missing.remove(&number) {
            self.reordered += 1;
            self.received += 1;
            self.note(What::Late, number, 1, at_us);
        } else {
            self.doubled += 1;
            self.note(What::Doubled, number, 1, at_us);
        }
    }

    fn note(&mut self, what: What, number: u64, count: u64, at_us: u64) {
        if self.events.len() < KEPT {
            self.events.push(Event {
                what,
                number,
                count,
                at_us,
            });
        }
    }

    /// As JSON.
    pub fn json(&self) -> String {
        let first: Vec<String> = self
            .missing
            .iter()
            .take(16)
            .map(ToString::to_string)
            .collect();
        let events: Vec<String> = self
            .events
            .iter()
            .map(|event| {
                format!(
                    r#"{{"what":"{}","number":{},"count":{},"at_us":{}}}"#,
                    event.what.name(),
                    event.number,
                    event.count,
                    event.at_us
                )
            })
            .collect();
        format!(
            r#"{{"received":{},"next":{},"missing":{},"first_missing":[{}],"doubled":{},"reordered":{},"changed":{},"events":[{}]}}"#,
            self.received,
            self.next,
            self.missing.len(),
            first.join(","),
            self.doubled,
            self.reordered,
            self.changed,
            events.join(",")
        )
    }
}
