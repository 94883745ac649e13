//! Two nodes, the network between them, and a clock.

use std::collections::{BTreeMap, VecDeque};

use vm_runtime::pod::{PodNet, PodSpec};
use vm_runtime::spec::{Accel, VmSpec};
use vm_runtime::units::{Bytes, Epoch};

use crate::migration::destination::{self, Destination};
use crate::migration::journal::{
    DestinationRecord, DestinationState, Entry, OwnerRecord, OwnerState, SourceRecord, SourceState,
};
use crate::migration::mode::Mode;
use crate::migration::source::{self, Plan, Source};
use crate::wire::id::MigrationId;
use crate::wire::message::{
    Bye, Control, DiskOffer, FaultFigures, ImageWant, Ledger, Offer, OfferOptions, QueryReply,
    Refuse, RefuseCode, StaleEnd, Verdict, Wanted,
};

mod accidents;
mod events;
mod network;
mod nodes;

use events::Event;
use network::Link;

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
    /// Whether pages cross after the resume.
    pub(super) postcopy: bool,
    /// Whether the destination takes entries of connection tracking.
    pub(super) flows: bool,
    /// Whether the pod has a writable disk.
    pub(super) disks: bool,
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
    /// The destination's guest lacks pages; outlives its service.
    missing: bool,
    /// The destination's machine waits for them.
    awaited: bool,
    /// The destination has the pod's entries of connection tracking.
    flows: bool,
    /// The last write to the pod's disk: it counts up while the guest runs.
    written: u64,
    /// The last write that a round has sent, by its number.
    sent_of_disk: [u64; 3],
    /// The last write that is durable at the destination.
    durable: u64,
    /// The source has the pod's disk.
    disk_here: bool,
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
            hugepages: false,
            vcpus: 1,
            volumes: Vec::new(),
            containers: Vec::new(),
            cold_start: false,
            storage_class: None,
            settings: Default::default(),
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
            writable: Vec::new(),
            free_page_reporting: true,
            announced_images: false,
            hugepages: false,
            cmdline: String::new(),
            kernel_sha256: String::new(),
            initramfs_sha256: String::new(),
        },
        ram: Bytes::mib(64),
        qemu_version: "7.2.22".to_owned(),
        options: OfferOptions { verify },
        record: String::new(),
        images: Vec::new(),
        routed: None,
        disks: Vec::new(),
        lists: None,
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
        let mut offer = offer(setting.verify);
        if setting.disks {
            offer.disks.push(DiskOffer {
                name: "root".to_owned(),
                size: 1 << 30,
                allocated: 1 << 20,
            });
        }
        let mut plan = Plan::new(offer, "b".to_owned(), Epoch(1));
        plan.flows = setting.flows;
        if setting.postcopy {
            plan.mode = Mode::Postcopy;
        }
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
            missing: false,
            awaited: false,
            flows: false,
            written: 1,
            sent_of_disk: [0; 3],
            durable: 0,
            disk_here: true,
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
}
