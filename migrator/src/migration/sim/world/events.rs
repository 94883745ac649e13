//! The clock: events in the order of their times, and what each of them does to the machines.

use super::*;

/// What happens at a time.
#[derive(Clone, Debug)]
pub(super) enum Event {
    /// A step is done; `movers` tells steps that a rollback or a discard has cancelled.
    Step {
        movers: u32,
        input: In,
    },
    /// Anything else that a machine hears.
    Input {
        life: u32,
        input: In,
    },
    Tick {
        life: u32,
        at: u64,
        side: Side,
    },
    Outbox {
        life: u32,
        side: Side,
    },
    Deliver {
        link: usize,
        to: Side,
        message: Control,
    },
    Lost {
        link: usize,
        side: Side,
    },
    Dialed {
        life: u32,
    },
    Restart {
        side: Side,
    },
    /// All pages have crossed over this link.
    Pages {
        link: usize,
    },
}

impl World {
    /// A delay in microseconds, up to `most`.
    pub(super) fn delay(&mut self, most: u64) -> u64 {
        if self.setting.seed == 0 {
            return most / 2;
        }
        // xorshift64
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % most + 1
    }

    pub(super) fn at(&mut self, time: u64, event: Event) {
        self.serial += 1;
        self.events.insert((time, self.serial), event);
    }

    pub(super) fn input(&mut self, delay: u64, input: In) {
        let life = match input {
            In::Source(_) => self.s.life,
            In::Destination(_) => self.d.life,
        };
        self.at(self.now + delay, Event::Input { life, input });
    }

    /// Reports a step as done after a while.
    pub(super) fn done(&mut self, input: In) {
        let movers = match input {
            In::Source(_) => self.s.movers,
            In::Destination(_) => self.d.movers,
        };
        let time = self.now + self.delay(4_000);
        self.at(time, Event::Step { movers, input });
    }

    /// One event; false when there is none.
    pub(in crate::migration::sim) fn step(&mut self) -> bool {
        let Some(((time, _), event)) = self.events.pop_first() else {
            return false;
        };
        self.now = time;
        self.steps += 1;
        self.written += u64::from(self.s.vm == Vm::Running);
        match event {
            Event::Step { movers, input } => {
                let current = match input {
                    In::Source(_) => self.s.movers,
                    In::Destination(_) => self.d.movers,
                };
                if movers == current {
                    self.effect(&input);
                    self.feed(input);
                }
            }
            Event::Input { life, input } => {
                let current = match input {
                    In::Source(_) => self.s.life,
                    In::Destination(_) => self.d.life,
                };
                if life == current {
                    self.feed(input);
                }
            }
            Event::Tick { life, at, side } => {
                let node = self.node(side);
                if node.life == life && node.timer == Some(at) {
                    node.timer = None;
                    self.feed(match side {
                        Side::Source => In::Source(source::Input::Tick),
                        Side::Destination => In::Destination(destination::Input::Tick),
                    });
                }
            }
            Event::Outbox { life, side } => {
                if self.node(side).life == life {
                    self.carry_out(side);
                }
            }
            Event::Deliver { link, to, message } => {
                if std::mem::take(&mut self.double) {
                    self.deliver(link, to, message.clone());
                }
                self.deliver(link, to, message);
            }
            Event::Lost { link, side } => {
                if self.node(side).link == Some(link) && self.lives(link, side) {
                    let reason = "silence".to_owned();
                    self.feed(match side {
                        Side::Source => In::Source(source::Input::LinkLost { reason }),
                        Side::Destination => {
                            In::Destination(destination::Input::LinkLost { reason })
                        }
                    });
                }
            }
            Event::Dialed { life } => {
                if life == self.s.life {
                    let reachable = self.d.up && self.now >= self.no_dial_before;
                    let input = if reachable {
                        self.connect();
                        source::Input::LinkUp
                    } else {
                        let reason = "refused".to_owned();
                        source::Input::LinkLost { reason }
                    };
                    self.feed(In::Source(input));
                }
            }
            Event::Restart { side } => self.restart(side),
            Event::Pages { link } => self.pages_cross(link),
        }
        true
    }

    /// Pages that were pushed over a link that still stands arrive.
    fn pages_cross(&mut self, link: usize) {
        let stands = self.links[link].up
            && [Side::Source, Side::Destination].map(|side| self.lives(link, side)) == [true; 2];
        if !(stands && self.missing) {
            return;
        }
        self.missing = false;
        if std::mem::take(&mut self.awaited) {
            let faults = FaultFigures::default();
            self.done(In::Destination(destination::Input::PagesHere { faults }));
        }
    }

    /// What a step has changed in the world once it is done.
    fn effect(&mut self, input: &In) {
        match input {
            In::Source(source::Input::Stopped { .. }) if self.s.vm == Vm::Running => {
                self.s.vm = Vm::Paused;
            }
            In::Destination(destination::Input::StateLoaded) if self.d.vm == Vm::Incoming => {
                self.d.vm = Vm::Loaded;
            }
            In::Destination(destination::Input::BlocksPlaced { round }) => {
                self.durable = self.sent_of_disk[*round as usize];
            }
            In::Source(_) | In::Destination(_) => {}
        }
    }

    /// A machine hears something, once it has carried out what it said before.
    pub(super) fn feed(&mut self, input: In) {
        let (side, busy) = match input {
            In::Source(_) => (Side::Source, !self.s.outbox.is_empty()),
            In::Destination(_) => (Side::Destination, !self.d.outbox.is_empty()),
        };
        if busy {
            return self.input(1, input);
        }
        let now = self.now;
        let out: Vec<Out> = match input {
            In::Source(input) => {
                let Some(machine) = &mut self.source else {
                    return;
                };
                let out = machine.handle(now, input);
                out.into_iter().map(Out::Source).collect()
            }
            In::Destination(input) => {
                let Some(machine) = &mut self.destination else {
                    return;
                };
                let out = machine.handle(now, input);
                out.into_iter().map(Out::Destination).collect()
            }
        };
        self.post(side, out);
    }

    pub(super) fn post(&mut self, side: Side, out: Vec<Out>) {
        let now = self.now;
        let node = self.node(side);
        let idle = node.outbox.is_empty();
        node.outbox.extend(out);
        if idle && !node.outbox.is_empty() {
            let life = node.life;
            self.at(now, Event::Outbox { life, side });
        }
    }
}
