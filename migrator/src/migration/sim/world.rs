//! Two nodes, the network between them, and a clock.

use std::collections::{BTreeMap, VecDeque};

use vm_runtime::pod::{PodNet, PodSpec};
use vm_runtime::spec::{Accel, VmSpec};
use vm_runtime::units::{Bytes, Epoch};

use super::accidents::Accident;
use crate::migration::destination::{self, Destination};
use crate::migration::journal::{
    DestinationRecord, DestinationState, Entry, OwnerRecord, OwnerState, SourceRecord, SourceState,
};
use crate::migration::source::{self, Plan, Source};
use crate::wire::id::MigrationId;
use crate::wire::message::{
    Bye, Control, ImageWant, Ledger, Offer, OfferOptions, QueryReply, Refuse, RefuseCode, Verdict,
};

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
        let arrives = self.links[link].arrives;
        for (side, last) in [(Side::Source, arrives.1), (Side::Destination, arrives.0)] {
            let time = (self.now + self.delay(3_000_000)).max(last + 1);
            self.at(time, Event::Lost { link, side });
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

    fn carry_out(&mut self, side: Side) {
        let Some(out) = self.node(side).outbox.pop_front() else {
            return;
        };
        match out {
            Out::Source(out) => self.at_source(out),
            Out::Destination(out) => self.at_destination(out),
        }
        let now = self.now;
        let node = self.node(side);
        if !node.outbox.is_empty() {
            let life = node.life;
            self.at(now, Event::Outbox { life, side });
        }
    }

    fn write(&mut self, entry: Entry, side: Side) {
        match entry {
            Entry::Owner(record) => self.node(side).owner = Some(record),
            Entry::Source(record) => self.source_record = Some(record),
            Entry::Destination(record) => {
                if record.state == (DestinationState::Owner { resumed: false }) {
                    self.d.owner = Some(record.owner());
                }
                self.destination_record = Some(record);
            }
        }
    }

    fn at_source(&mut self, out: source::Output) {
        use source::{Input, Output};
        let step = match out {
            Output::Send(message) => return self.send(Side::Source, self.s.link, message),
            Output::Journal(_) if std::mem::take(&mut self.s.disk_full) => {
                self.s.outbox.clear();
                let reason = "disk full".to_owned();
                return self.input(0, In::Source(Input::JournalFailed { reason }));
            }
            Output::Journal(entry) | Output::Note(entry) => return self.write(entry, Side::Source),
            Output::SendImages(_) => Input::ImagesSent,
            Output::StartTracking => {
                self.tracking = true;
                Input::TrackingStarted
            }
            Output::SendRound { round } => {
                self.place(round);
                Input::RoundSent {
                    pages: 1000,
                    bytes: 4_100_000,
                }
            }
            Output::Scan => Input::Scanned {
                dirtied: 10,
                pending: 10,
            },
            Output::DetachAgent => {
                self.agent_detached = true;
                Input::AgentDetached { state: vec![1] }
            }
            Output::Hold => {
                self.held = true;
                Input::Held
            }
            Output::DrainTap => Input::Drained,
            Output::StopVm => Input::Stopped { at_unix_us: 1 },
            Output::ReadResidue => Input::ResidueRead,
            Output::SendLastPages { round } => {
                self.place(round);
                Input::LastPagesSent { pages: 10 }
            }
            Output::SaveState => {
                let end = crate::wire::message::StateEnd { bytes: 1 };
                self.send(Side::Source, self.s.link, end.into());
                Input::StateSent
            }
            Output::SendHashes => {
                let end = crate::wire::message::HashesEnd { pages: 1 };
                self.send(Side::Source, self.s.link, end.into());
                Input::HashesSent
            }
            Output::Rollback(rollback) => {
                self.s.movers += 1;
                if rollback.resume_vm && self.s.vm == Vm::Paused {
                    self.s.vm = Vm::Running;
                }
                self.held &= !rollback.release_hold;
                self.tracking &= !rollback.stop_tracking;
                self.agent_detached &= !rollback.attach_agent;
                Input::RolledBack
            }
            Output::Forward => Input::Forwarded,
            Output::KillVm => {
                self.s.vm = Vm::None;
                return;
            }
            Output::Release => {
                self.held = false;
                let ledger = Ledger::default();
                Input::Released { ledger }
            }
            Output::Redial => {
                let (life, time) = (self.s.life, self.now + self.delay(3_000));
                return self.at(time, Event::Dialed { life });
            }
            Output::WakeAt(at) => return self.wake(Side::Source, at),
            Output::CancelRefused => {
                self.cancel_refused = true;
                return;
            }
            Output::Finish(_) => {
                self.s.finished = true;
                self.source = None;
                return self.hang_up(Side::Source);
            }
        };
        self.done(In::Source(step));
    }

    /// The pages of a round arrive beside the control connection.
    fn place(&mut self, round: u32) {
        self.done(In::Destination(destination::Input::RoundPlaced { round }));
    }

    fn wake(&mut self, side: Side, at: u64) {
        let time = at.max(self.now);
        let node = self.node(side);
        node.timer = Some(at);
        let life = node.life;
        self.at(time, Event::Tick { life, at, side });
    }

    fn hang_up(&mut self, side: Side) {
        if let Some(link) = self.node(side).link.take() {
            self.cut(link, false);
        }
    }

    fn at_destination(&mut self, out: destination::Output) {
        use destination::{Input, Output};
        let step = match out {
            Output::Send(message) => return self.send(Side::Destination, self.d.link, message),
            Output::Journal(_) if std::mem::take(&mut self.d.disk_full) => {
                self.d.outbox.clear();
                let reason = "disk full".to_owned();
                return self.input(0, In::Destination(Input::JournalFailed { reason }));
            }
            Output::Journal(entry) | Output::Note(entry) => {
                return self.write(entry, Side::Destination);
            }
            Output::Check(_) => Input::Checked(self.verdict_of_check()),
            Output::ReceiveImages(_) => Input::ImagesReceived,
            Output::PrepareVm => {
                self.d.vm = Vm::Incoming;
                Input::VmPrepared
            }
            Output::Verify => Input::Verified {
                pages: 100,
                mismatched: 0,
            },
            Output::LoadState => Input::StateLoaded,
            Output::OpenNetwork | Output::Adopt { .. } | Output::PodFailed { .. } => return,
            Output::Resume if self.d.vm == Vm::Dead => Input::Failed {
                reason: "no VM".to_owned(),
            },
            Output::Resume => {
                assert!(matches!(self.d.vm, Vm::Loaded | Vm::Running), "{self:?}");
                self.d.vm = Vm::Running;
                let steps = Vec::new();
                Input::Resumed {
                    at_unix_us: 2,
                    steps,
                }
            }
            Output::Discard => {
                self.d.movers += 1;
                self.d.vm = Vm::None;
                Input::Discarded
            }
            Output::SendBye => return self.bye(self.d.link),
            Output::WakeAt(at) => return self.wake(Side::Destination, at),
            Output::CancelRefused => return,
            Output::Finish(_) => {
                self.d.finished = true;
                self.destination = None;
                return self.hang_up(Side::Destination);
            }
        };
        self.done(In::Destination(step));
    }

    fn bye(&mut self, link: Option<usize>) {
        let bye = Bye {
            migration: ID,
            ledger: Ledger::default(),
        };
        self.send(Side::Destination, link, bye.into());
    }

    fn verdict_of_check(&self) -> Result<Vec<ImageWant>, Refuse> {
        if self.destination_record.is_some() {
            return Err(Refuse {
                code: RefuseCode::Busy,
                reason: "known".to_owned(),
            });
        }
        let want = ImageWant {
            image: 0,
            chunks: vec![1],
        };
        Ok(Vec::from_iter(self.setting.images.then_some(want)))
    }

    fn deliver(&mut self, link: usize, to: Side, message: Control) {
        if !self.lives(link, to) {
            return;
        }
        let current = self.node(to).link == Some(link);
        match to {
            Side::Source if current || self.setting.late => {
                self.feed(In::Source(source::Input::Peer(message)));
            }
            Side::Source => {}
            Side::Destination => self.deliver_to_destination(link, current, message),
        }
    }

    fn deliver_to_destination(&mut self, link: usize, current: bool, message: Control) {
        match (message, self.destination.is_some()) {
            (Control::Offer(offer), false) if !self.d.finished => {
                self.d.link = Some(link);
                self.destination = Some(Destination::new(offer, "a".to_owned()));
                self.input(0, In::Destination(destination::Input::Begin));
            }
            (Control::Query(_), true) if !current => {
                if let Some(old) = self.d.link.replace(link) {
                    self.cut(old, !self.setting.late);
                }
                self.feed(In::Destination(destination::Input::Asked));
            }
            (message, true) if current || self.setting.late => {
                self.feed(In::Destination(destination::Input::Peer(message)));
            }
            // What the journal answers once there is no machine.
            (Control::Query(_), false) => {
                let verdict = self.answer();
                let migration = ID;
                let reply = QueryReply { migration, verdict };
                self.send(Side::Destination, Some(link), reply.into());
            }
            (Control::Released(_), false) => {
                if let Some(record) = &mut self.destination_record
                    && record.verdict() == Some(Verdict::Running)
                {
                    record.state = DestinationState::Settled;
                }
                self.bye(Some(link));
            }
            _ => {}
        }
    }

    fn answer(&mut self) -> Verdict {
        let record = self.destination_record.take();
        let known = record.as_ref().and_then(DestinationRecord::verdict);
        self.destination_record = Some(match record {
            Some(record) if known.is_some() => record,
            _ => DestinationRecord {
                migration: ID,
                pod: String::new(),
                from: "a".to_owned(),
                epoch: Epoch(0),
                state: DestinationState::Discarded {
                    reason: String::new(),
                },
            },
        });
        known.unwrap_or(Verdict::Discarded)
    }

    fn crash(&mut self, side: Side) {
        if !self.node(side).up {
            return;
        }
        for link in 0..self.links.len() {
            if self.lives(link, side) {
                self.cut(link, false);
            }
        }
        let node = self.node(side);
        node.up = false;
        node.life += 1;
        node.movers += 1;
        node.outbox.clear();
        node.link = None;
        node.timer = None;
        match side {
            Side::Source => self.source = None,
            Side::Destination => self.destination = None,
        }
        let time = self.now + self.delay(400_000);
        self.at(time, Event::Restart { side });
    }

    fn restart(&mut self, side: Side) {
        let now = self.now;
        let node = self.node(side);
        node.up = true;
        node.finished = true;
        let vm_alive = !matches!(node.vm, Vm::None | Vm::Dead);
        let owner = node.owner.clone();
        match side {
            Side::Source => {
                let started = |r: &SourceRecord| r.state == SourceState::Started;
                if let Some(record) = self.source_record.clone().filter(started) {
                    self.s.finished = false;
                    let (machine, out) = Source::recover(now, record, owner, vm_alive);
                    self.source = Some(machine);
                    self.post(side, out.into_iter().map(Out::Source).collect());
                }
            }
            Side::Destination => {
                let open = |r: &DestinationRecord| match r.state {
                    DestinationState::Prepared | DestinationState::Owner { resumed: false } => true,
                    DestinationState::Owner { resumed: true }
                    | DestinationState::Settled
                    | DestinationState::Discarded { .. } => false,
                };
                if let Some(record) = self.destination_record.clone().filter(open) {
                    self.d.finished = false;
                    let (machine, out) = Destination::recover(now, record, owner, vm_alive);
                    self.destination = Some(machine);
                    self.post(side, out.into_iter().map(Out::Destination).collect());
                } else if self
                    .destination_record
                    .as_ref()
                    .is_some_and(|r| matches!(r.state, DestinationState::Discarded { .. }))
                {
                    // The journal knows nothing to recover; what the crash left of the VM, the start of the service removes.
                    self.d.vm = Vm::None;
                }
            }
        }
    }

    /// An accident happens now.
    pub(super) fn strike(&mut self, accident: Accident) {
        let reason = "accident".to_owned();
        match accident {
            Accident::CrashSource => self.crash(Side::Source),
            Accident::CrashDestination => self.crash(Side::Destination),
            Accident::CrashBoth => {
                self.crash(Side::Source);
                self.crash(Side::Destination);
            }
            Accident::CutAndLose | Accident::CutAndDeliver => {
                for link in 0..self.links.len() {
                    self.cut(link, accident == Accident::CutAndLose);
                }
            }
            Accident::Outage => {
                self.no_dial_before = self.now + 20_000_000;
                for link in 0..self.links.len() {
                    self.cut(link, true);
                }
            }
            Accident::Cancel => self.feed(In::Source(source::Input::Cancel)),
            Accident::CancelDestination => {
                self.feed(In::Destination(destination::Input::Cancel));
            }
            Accident::SourceVmDies => {
                if matches!(self.s.vm, Vm::Running | Vm::Paused) {
                    self.vm_died = true;
                    self.s.vm = Vm::Dead;
                    self.feed(In::Source(source::Input::VmDied { reason }));
                }
            }
            Accident::DestinationVmDies => {
                if !matches!(self.d.vm, Vm::None | Vm::Dead) {
                    // Before the grant this is the source's good luck.
                    let granted = self.destination_record.as_ref().map(|r| r.verdict());
                    self.vm_died |= granted == Some(Some(Verdict::Running)) || self.granting();
                    self.d.vm = Vm::Dead;
                    self.feed(In::Destination(destination::Input::VmDied { reason }));
                }
            }
            Accident::SourceFails => self.feed(In::Source(source::Input::Failed { reason })),
            Accident::DestinationFails => {
                // A resume that fails for good is the death of the VM.
                if !self.granting() {
                    self.feed(In::Destination(destination::Input::Failed { reason }));
                }
            }
            Accident::SourceDiskFull => self.s.disk_full = true,
            Accident::DestinationDiskFull => self.d.disk_full = true,
            Accident::Double => self.double = true,
        }
    }

    /// The destination has taken the grant and not yet resumed.
    fn granting(&self) -> bool {
        self.destination.as_ref().is_some_and(Destination::granted)
    }

    /// What must hold after every step.
    pub(super) fn check(&self) {
        let both = self.s.vm == Vm::Running && self.d.vm == Vm::Running;
        assert!(!both, "two run the guest\n{self:?}");
        assert!(!(self.s.owns() && self.d.owns()), "two own it\n{self:?}");
        if self.s.vm == Vm::Running {
            assert!(self.s.owns(), "the source runs without the right\n{self:?}");
        }
        if self.d.vm == Vm::Running {
            assert!(
                self.d.owns(),
                "the destination runs without the right\n{self:?}"
            );
        }
    }

    /// What must hold at the end.
    pub(super) fn check_end(&self) {
        let running = [self.s.vm, self.d.vm].map(|vm| u8::from(vm == Vm::Running));
        let running: u8 = running.iter().sum();
        if !self.vm_died {
            assert_eq!(running, 1, "nobody runs the guest\n{self:?}");
        }
        assert!(self.source.is_none(), "the source is not done\n{self:?}");
        assert!(
            self.destination.is_none(),
            "the destination is not done\n{self:?}"
        );
        let owners = u8::from(self.s.owns()) + u8::from(self.d.owns());
        assert_eq!(owners, 1, "not one owner\n{self:?}");
        assert!(!self.held, "the gate still holds packets\n{self:?}");
        if self.s.owns() {
            assert!(
                !self.tracking && !self.agent_detached,
                "not all undone\n{self:?}"
            );
            assert_eq!(self.d.vm, Vm::None, "something is left behind\n{self:?}");
        } else {
            assert_eq!(self.s.vm, Vm::None, "the old VM is left behind\n{self:?}");
        }
        let record = self.source_record.as_ref().map(|r| &r.state);
        assert!(
            record != Some(&SourceState::Started),
            "the journal is open\n{self:?}"
        );
    }
}
