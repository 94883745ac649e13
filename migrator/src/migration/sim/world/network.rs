//! The links between the nodes: in order, and lost only as a whole.

use super::*;

/// A connection, of its two ends at the source and at the destination.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link {
    pub(super) lives: (u32, u32),
    pub(super) up: bool,
    /// When the last message each way arrives: nothing overtakes.
    arrives: (u64, u64),
}

impl World {
    pub(super) fn connect(&mut self) -> usize {
        self.links.push(Link {
            lives: (self.s.life, self.d.life),
            up: true,
            arrives: (0, 0),
        });
        self.s.link = Some(self.links.len() - 1);
        self.links.len() - 1
    }

    pub(super) fn send(&mut self, from: Side, link: Option<usize>, message: Control) {
        let Some(link) = link.filter(|link| self.links[*link].up) else {
            return;
        };
        let time = self.now + self.delay(2_000);
        let arrives = &mut self.links[link].arrives;
        let (slot, to) = match from {
            Side::Source => (&mut arrives.0, Side::Destination),
            Side::Destination => (&mut arrives.1, Side::Source),
        };
        *slot = time.max(*slot + 1);
        let time = *slot;
        self.at(time, Event::Deliver { link, to, message });
    }

    pub(super) fn cut(&mut self, link: usize, lose: bool) {
        if !std::mem::replace(&mut self.links[link].up, false) {
            return;
        }
        if lose {
            self.events
                .retain(|_, e| !matches!(e, Event::Deliver { link: l, .. } if *l == link));
        }
        if self.setting.late && !lose {
            self.stall(link);
        }
        let arrives = self.links[link].arrives;
        for (side, last) in [(Side::Source, arrives.1), (Side::Destination, arrives.0)] {
            let mut time = self.now + self.delay(3_000_000);
            if !self.setting.late {
                time = time.max(last + 1);
            }
            self.at(time, Event::Lost { link, side });
        }
    }

    /// What is under way on a link takes its time, and may come long after its ends have given the link up.
    fn stall(&mut self, link: usize) {
        let shift = self.delay(5_000_000);
        let (stalled, events) = std::mem::take(&mut self.events)
            .into_iter()
            .partition(|(_, e)| matches!(e, Event::Deliver { link: l, .. } if *l == link));
        self.events = events;
        for ((time, serial), event) in stalled {
            self.events.insert((time + shift, serial), event);
        }
    }

    /// Whether the end of the link is in the service's present life.
    pub(super) fn lives(&self, link: usize, side: Side) -> bool {
        let lives = self.links[link].lives;
        match side {
            Side::Source => self.s.up && lives.0 == self.s.life,
            Side::Destination => self.d.up && lives.1 == self.d.life,
        }
    }
}
