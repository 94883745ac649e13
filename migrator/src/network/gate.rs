//! The programs, their pinned maps and links, and the words that steer them.
//!
//! Everything is pinned in the node's own BPF file system: a TAP's gate and guard go on working while
//! no service runs, and the next service finds them. Loading replaces the programs under live links in
//! place, so a new version of the service brings its programs with it.

mod bound;
mod endpoints;
mod facts;
mod maps;
mod settle;
mod slot;
mod tunnel;

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aya::maps::{HashMap, MapData, PerCpuArray, RingBuf};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfLoader};
use migrator_ebpf::{
    ABI, BRIEFS_MAX, BUCKETS, Brief, Counter, CounterRow, Device, Gate, MAX_SLOTS, NO_SLOT_ROW,
    QUEUES_MAX, latch_index, names,
};

use super::error::GateError;
use super::netlink::Link;
use super::pins::{mount_bpffs, remove_pin};
use super::sys::MappedWords;
use super::uplink::{FastWay, UplinkPath, XdpChoice};
use super::watch::Watchers;
pub(crate) use bound::address_of;
pub use facts::{HookFacts, MapFacts, ProgramFacts};
use maps::Taker;
pub(crate) use settle::keep_settled;
pub(crate) use slot::SlotGate;

/// The programs, built by this crate's build script.
pub static PROGRAMS: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/programs.o"));

/// The hooks of a TAP: program, where it is attached, and the name of its link's pin.
const HOOKS: [(&str, TcAttachType, &str); 2] = [
    (names::GATE, TcAttachType::Egress, "link_gate_"),
    (names::GUARD, TcAttachType::Ingress, "link_guard_"),
];

/// The programs and maps of this node.
pub(crate) struct Gates {
    dir: PathBuf,
    programs: Mutex<Ebpf>,
    devices: Mutex<HashMap<MapData, u32, Device>>,
    counters: Mutex<PerCpuArray<MapData, CounterRow>>,
    briefs: MappedWords,
    words: MappedWords,
    parked: MappedWords,
    done: MappedWords,
    injected: MappedWords,
    injected_next: MappedWords,
    tunnel: tunnel::Maps,
    endpoints: endpoints::Maps,
    bound: bound::Maps,
    pub(crate) watchers: Arc<Watchers>,
    flips: facts::Flips,
    pub(crate) fast: FastWay,
}

impl std::fmt::Debug for Gates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gates").field("dir", &self.dir).finish()
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind these locks stays whole when a holder panics: each change is one kernel call.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gates {
    /// Loads the programs, over the maps pinned in `bpffs` if there are any. Mounts it if needed. `queues`: receive queues of the
    /// uplink.
    pub(crate) fn open(bpffs: &Path, queues: u32) -> Result<Self, GateError> {
        mount_bpffs(bpffs).map_err(|source| GateError::Mount {
            path: bpffs.to_owned(),
            source,
        })?;
        let dir = bpffs.join(format!("v{ABI}"));
        std::fs::create_dir_all(&dir).map_err(|source| GateError::Mount {
            path: dir.clone(),
            source,
        })?;
        let mut programs = EbpfLoader::new()
            .default_map_pin_directory(&dir)
            .map_max_entries(names::LATCHES, latch_index(queues.clamp(1, QUEUES_MAX), 0))
            .load(PROGRAMS)
            .map_err(|error| GateError::Load(error.into()))?;
        for name in [names::GATE, names::GUARD, names::LANDING, names::STEER] {
            let program = classifier(&mut programs, name)?;
            program
                .load()
                .map_err(|error| GateError::Load(error.into()))?;
        }
        // Before any map is taken out: its programs use those of the gates, too.
        let fast = FastWay::take(&mut programs, dir.clone())?;
        start_logger(&mut programs);
        let mut maps = Taker {
            programs: &mut programs,
            dir: &dir,
        };
        let briefs = maps.words(names::BRIEFS, BRIEFS_MAX)?;
        let gates = maps.words(names::GATES, MAX_SLOTS)?;
        let parked = maps.words(names::PARKED, MAX_SLOTS * BUCKETS)?;
        let done = maps.words(names::DONE, MAX_SLOTS * BUCKETS)?;
        let injected = maps.words(names::INJECTED, MAX_SLOTS)?;
        let injected_next = maps.words(names::INJECTED_NEXT, MAX_SLOTS)?;
        let until = maps.words(names::TRACE, MAX_SLOTS)?;
        let missed = maps.words(names::TRACE_MISSED, MAX_SLOTS)?;
        let tunnel = tunnel::Maps::take(&mut maps)?;
        let endpoints = endpoints::Maps::take(&mut maps)?;
        let bound = bound::Maps::take(&mut maps)?;
        let devices = maps.map(names::DEVICES, HashMap::try_from)?;
        let counters = maps.map(names::COUNTERS, PerCpuArray::try_from)?;
        let ring = maps.map(names::TRACE_RING, RingBuf::try_from)?;
        let watchers = Watchers::start(until, missed, ring)
            .map_err(|error| maps.error(names::TRACE_RING, error.into()))?;
        Ok(Self {
            devices: Mutex::new(devices),
            counters: Mutex::new(counters),
            programs: Mutex::new(programs),
            briefs,
            words: gates,
            parked,
            done,
            injected,
            injected_next,
            tunnel,
            endpoints,
            bound,
            watchers,
            flips: facts::Flips::default(),
            fast,
            dir,
        })
    }

    /// Puts gate and guard on a pod's TAP, or takes over those that a former service left there.
    pub(crate) fn attach(&self, tap: &str, ifindex: u32, device: Device) -> Result<(), GateError> {
        let mut devices = lock(&self.devices);
        // What a former service had found out of the network still holds.
        let former = devices.get(&ifindex, 0);
        let out = former.ok().filter(|former| former.slot == device.slot);
        let device = Device {
            out: out.map_or(0, |former| former.out),
            ..device
        };
        devices
            .insert(ifindex, device, 0)
            .map_err(|error| self.map_error(names::DEVICES, error.into()))?;
        drop(devices);
        if let Some(brief) = self.briefs.get(ifindex) {
            let word = Brief {
                slot: device.slot,
                uplink: device.uplink,
            };
            brief.store(word.to_word(), Ordering::Release);
        }
        let mut programs = lock(&self.programs);
        for (name, hook, pin) in HOOKS {
            let pin = self.dir.join(format!("{pin}{}", device.slot));
            let program = classifier(&mut programs, name)?;
            if adopt(program, &pin).is_ok() {
                continue;
            }
            renew(program, name, (tap, hook), &pin)?;
        }
        Ok(())
    }

    /// Frames of the node's own bridge for a pod that has gone go out of the uplink from now on, once every CPU has left the gate.
    pub(crate) fn send_out(&self, ifindex: u32, uplink: u32) -> Result<(), GateError> {
        let mut devices = lock(&self.devices);
        let error = |source: aya::maps::MapError| self.map_error(names::DEVICES, source.into());
        let device = devices.get(&ifindex, 0).map_err(error)?;
        let device = Device {
            out: uplink,
            ..device
        };
        devices.insert(ifindex, device, 0).map_err(error)
    }

    /// Puts a program on the tunnel's device, or takes over the one that a former service left there.
    fn attach_beside(
        &self,
        name: &'static str,
        (device, hook): (&str, TcAttachType),
        pin: &str,
        is_new: bool,
    ) -> Result<(), GateError> {
        let pin = self.dir.join(pin);
        let mut programs = lock(&self.programs);
        let program = classifier(&mut programs, name)?;
        if !is_new && adopt(program, &pin).is_ok() {
            return Ok(());
        }
        renew(program, name, (device, hook), &pin)
    }

    /// Takes gate and guard away, and shuts the slot. What is gone already is fine.
    pub(crate) fn detach(&self, slot: u16, ifindex: Option<u32>) -> Result<(), GateError> {
        for (_, _, pin) in HOOKS {
            remove_pin(&self.dir.join(format!("{pin}{slot}")))?;
        }
        let mut devices = lock(&self.devices);
        let stale: Vec<u32> = devices
            .iter()
            .flatten()
            .filter(|(index, device)| device.slot == slot || Some(*index) == ifindex)
            .map(|(index, _)| index)
            .collect();
        for index in stale {
            if let Some(brief) = self.briefs.get(index) {
                brief.store(0, Ordering::Release);
            }
            devices
                .remove(&index)
                .map_err(|error| self.map_error(names::DEVICES, error.into()))?;
        }
        self.fast.forget(slot)?;
        if let Some(word) = self.words.get(u32::from(slot)) {
            // The epoch goes on: no word of a slot comes twice, or a latch could take the next pod for this one.
            let shut = Gate::from_word(word.load(Ordering::Acquire)).shut(slot);
            word.store(shut.to_word(), Ordering::Release);
        }
        self.forget_leads(slot)?;
        self.forget_tunnel(slot)
    }

    /// Opens the fast way from the uplink, if it can be had.
    pub(crate) fn start_fast_way(
        &self,
        choice: XdpChoice,
        name: &str,
        uplink: Link,
        bridge: Option<Link>,
    ) -> UplinkPath {
        self.fast
            .start(&mut lock(&self.programs), choice, name, uplink, bridge)
    }

    /// Frames that the uplink's program has sent on, and the device did not take that they were to leave by: of all pods.
    pub(crate) fn lost_on_the_way_on(&self) -> u64 {
        let rows = lock(&self.counters).get(&NO_SLOT_ROW, 0);
        let lost = |row: &CounterRow| row.get(Counter::ForwardedXdpLost);
        rows.map_or(0, |rows| rows.iter().map(lost).sum())
    }

    /// Slots that a former service has left links for.
    pub(crate) fn pinned_slots(&self) -> Vec<u16> {
        let Ok(entries) = std::fs::read_dir(&self.dir) else {
            return Vec::new();
        };
        let mut slots: Vec<u16> = entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name();
                let name = name.to_str()?;
                HOOKS
                    .iter()
                    .find_map(|(_, _, pin)| name.strip_prefix(pin)?.parse().ok())
            })
            .collect();
        slots.sort_unstable();
        slots.dedup();
        slots
    }

    /// The words and counters of one slot.
    pub(crate) fn slot(self: &Arc<Self>, slot: u16) -> SlotGate {
        SlotGate {
            gates: Arc::clone(self),
            slot,
        }
    }

    fn map_error(
        &self,
        map: &'static str,
        source: Box<dyn std::error::Error + Send + Sync>,
    ) -> GateError {
        GateError::Map {
            map,
            dir: self.dir.clone(),
            source,
        }
    }
}

fn classifier<'a>(
    programs: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, GateError> {
    programs
        .program_mut(name)
        .and_then(|program| program.try_into().ok())
        .ok_or(GateError::Mismatch(name))
}

pub(crate) type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Replaces the program of a pinned link. The link may be dead: its device was removed.
fn adopt(program: &mut SchedClassifier, pin: &Path) -> Result<(), Cause> {
    let link: SchedClassifierLink = FdLink::from(PinnedLink::from_pin(pin)?).try_into()?;
    let id = program.attach_to_link(link)?;
    // The pin keeps the link; this process need not.
    drop(program.take_link(id)?);
    Ok(())
}

/// Puts the program there in place of whatever the pin stands for.
fn renew(
    program: &mut SchedClassifier,
    name: &'static str,
    (device, hook): (&str, TcAttachType),
    pin: &Path,
) -> Result<(), GateError> {
    remove_pin(pin)?;
    fresh(program, (device, hook), pin).map_err(|source| GateError::Attach {
        program: name,
        device: device.to_owned(),
        source,
    })
}

fn fresh(
    program: &mut SchedClassifier,
    (device, hook): (&str, TcAttachType),
    pin: &Path,
) -> Result<(), Cause> {
    // First in line: what it parks or drops, no other program of the host has acted on.
    let order = TcAttachOptions::TcxOrder(LinkOrder::first());
    let id = program.attach_with_options(device, hook, order)?;
    let link: FdLink = program.take_link(id)?.try_into()?;
    drop(link.pin(pin)?);
    Ok(())
}

/// Passes what the programs log on to this process's log. Optional: they work without a listener.
fn start_logger(programs: &mut Ebpf) {
    let Ok(logger) = aya_log::EbpfLogger::init(programs) else {
        return;
    };
    let Ok(mut logger) = super::sys::watch_logger(logger) else {
        return;
    };
    tokio::spawn(async move {
        while let Ok(mut ready) = logger.readable_mut().await {
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    });
}
