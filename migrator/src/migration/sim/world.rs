//! Two nodes, the network between them, and a clock.

use std::collections::{BTreeMap, VecDeque};

use vm_runtime::pod::{PodNet, PodSpec};
use vm_runtime::spec::{Accel, VmSpec};
use vm_runtime::units::{Bytes, Epoch};

use crate::migration::destination::{self, Destination};
use crate::migration::journal::{
    DestinationRecord, DestinationState, Entry, OwnerRecord, OwnerState, SourceRecord, SourceState,
};
use crate::migration::source::{self, Plan, Source};
use crate::wire::id::MigrationId;
use crate::wire::message::{
    Bye, Control, ImageWant, Ledger, Offer, OfferOptions, QueryReply, Refuse, RefuseCode, Verdict,
};

mod accidents;
mod nodes;

/// What varies between runs.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Setting {
    /// Of the delays; 0 makes all of them equal.
    pub(super) seed: u64,
    /// Whether an image has to be handed over.
    pub(super) images: bool,
    /// Whether pages are compared.
    pub(super) verify: bool,
    /// Whether messages of a link that a node has given up still reach its machine.
    pub(super) late: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Source,
    Destination,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vm {
    None,
    Running,
    Paused,
    Incoming,
    Loaded,
    Dead,
}

#[derive(Clone, Debug)]
enum In {
    Source(source::Input),
    Destination(destination::Input),
}

#[derive(Clone, Debug)]
enum Out {
    Source(source::Output),
    Destination(destination::Output),
}

#[derive(Clone, Debug)]
enum Event {
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
}

#[derive(Clone, Debug)]
struct Node {
    up: bool,
    /// Counts the service's starts.
    life: u32,
    /// Counts what cancels steps.
    movers: u32,
    outbox: VecDeque<Out>,
    vm: Vm,
    link: Option<usize>,
    timer: Option<u64>,
    disk_full: bool,
    owner: Option<OwnerRecord>,
    finished: bool,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    lives: (u32, u32),
    up: bool,
    /// When the last message each way arrives: nothing overtakes.
    arrives: (u64, u64),
}

/// Everything there is.
#[derive(Clone, Debug)]
pub(super) struct World {
    setting: Setting,
    now: u64,
    serial: u64,
    random: u64,
    pub(super) steps: usize,
    events: BTreeMap<(u64, u64), Event>,
    source: Option<Source>,
    destination: Option<Destination>,
    s: Node,
    d: Node,
    source_record: Option<SourceRecord>,
    destination_record: Option<DestinationRecord>,
    links: Vec<Link>,
    no_dial_before: u64,
    double: bool,
    vm_died: bool,
    /// What a rollback has to undo.
    held: bool,
    tracking: bool,
    agent_detached: bool,
    pub(super) cancel_refused: bool,
}

const ID: MigrationId = MigrationId([1; 16]);

fn offer(verify: bool) -> Offer {
    let mac = "52:54:00:00:00:01".parse().unwrap();
    let net = PodNet {
        mac,
        ipv4: None,
        ipv6: None,
        gateway4: None,
        gateway6: None,
    };
    Offer {
        migration: ID,
        epoch: Epoch(2),
        source: "a".to_owned(),
        pod: PodSpec {
            name: "web".to_owned(),
            labels: BTreeMap::new(),
            net,
            memory: Bytes::mib(64),
            vcpus: 1,
            containers: Vec::new(),
        },
        vm: VmSpec {
            name: "web".to_owned(),
            uuid: String::new(),
            machine: "pc-q35-7.2".to_owned(),
            cpu: "max".to_owned(),
            accel: Accel::Tcg,
            memory: Bytes::mib(64),
            vcpus: 1,
            mac,
            disks: Vec::new(),
            cmdline: String::new(),
            kernel_sha256: String::new(),
            initramfs_sha256: String::new(),
        },
        ram: Bytes::mib(64),
        qemu_version: "7.2.22".to_owned(),
        options: OfferOptions { verify },
        record: String::new(),
        images: Vec::new(),
    }
}

impl Node {
    fn new(vm: Vm, owner: Option<OwnerRecord>) -> Self {
        Self {
            up: true,
            life: 0,
            movers: 0,
            outbox: VecDeque::new(),
            vm,
            link: None,
            timer: None,
            disk_full: false,
            owner,
            finished: false,
        }
    }

    fn owns(&self) -> bool {
        let owner = self.owner.as_ref();
        owner.is_some_and(|owner| owner.state == OwnerState::Owner)
    }
}

impl World {
    pub(super) fn new(setting: Setting) -> Self {
        let owner = OwnerRecord {
            pod: "web".to_owned(),
            epoch: Epoch(1),
            state: OwnerState::Owner,
        };
        let plan = Plan::new(offer(setting.verify), "b".to_owned(), Epoch(1));
        let mut world = Self {
            setting,
            now: 0,
            serial: 0,
            random: setting.seed,
            steps: 0,
            events: BTreeMap::new(),
            source: Some(Source::new(plan)),
            destination: None,
            s: Node::new(Vm::Running, Some(owner)),
            d: Node::new(Vm::None, None),
            source_record: None,
            destination_record: None,
            links: Vec::new(),
            no_dial_before: 0,
            double: false,
            vm_died: false,
            held: false,
            tracking: false,
            agent_detached: false,
            cancel_refused: false,
        };
        world.connect();
        world.input(1, In::Source(source::Input::Begin));
        world
    }

    pub(super) fn completed(&self) -> bool {
        self.d.vm == Vm::Running
    }

    pub(super) fn source_runs(&self) -> bool {
        self.s.vm == Vm::Running
    }

    /// The grant is on its way or beyond.
    pub(super) fn in_doubt(&self) -> bool {
        let granted = |event: &Event| {
            matches!(
                event,
                Event::Deliver {
                    message: Control::Grant(_),
                    ..
                }
            )
        };
        self.events.values().any(granted)
    }

    pub(super) fn source_epoch(&self) -> Epoch {
        self.s.owner.as_ref().unwrap().epoch
    }

    fn node(&mut self, side: Side) -> &mut Node {
        match side {
            Side::Source => &mut self.s,
            Side::Destination => &mut self.d,
        }
    }

    /// A delay in microseconds, up to `most`.
    fn delay(&mut self, most: u64) -> u64 {
        if self.setting.seed == 0 {
            return most / 2;
        }
        // xorshift64
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % most + 1
    }

    fn at(&mut self, time: u64, event: Event) {
        self.serial += 1;
        self.events.insert((time, self.serial), event);
    }

    fn connect(&mut self) -> usize {
        self.links.push(Link {
            lives: (self.s.life, self.d.life),
            up: true,
            arrives: (0, 0),
        });
        self.s.link = Some(self.links.len() - 1);
        self.links.len() - 1
    }

    fn send(&mut self, from: Side, link: Option<usize>, message: Control) {
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

    fn cut(&mut self, link: usize, lose: bool) {
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

    fn input(&mut self, delay: u64, input: In) {
        let life = match input {
            In::Source(_) => self.s.life,
            In::Destination(_) => self.d.life,
        };
        self.at(self.now + delay, Event::Input { life, input });
    }

    /// Reports a step as done after a while.
    fn done(&mut self, input: In) {
        let movers = match input {
            In::Source(_) => self.s.movers,
            In::Destination(_) => self.d.movers,
        };
        let time = self.now + self.delay(4_000);
        self.at(time, Event::Step { movers, input });
    }

    /// One event; false when there is none.
    pub(super) fn step(&mut self) -> bool {
        let Some(((time, _), event)) = self.events.pop_first() else {
            return false;
        };
        self.now = time;
        self.steps += 1;
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
        }
        true
    }

    /// Whether the end of the link is in the service's present life.
    fn lives(&self, link: usize, side: Side) -> bool {
        let lives = self.links[link].lives;
        match side {
            Side::Source => self.s.up && lives.0 == self.s.life,
            Side::Destination => self.d.up && lives.1 == self.d.life,
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
            In::Source(_) | In::Destination(_) => {}
        }
    }

    /// A machine hears something, once it has carried out what it said before.
    fn feed(&mut self, input: In) {
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

    fn post(&mut self, side: Side, out: Vec<Out>) {
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
