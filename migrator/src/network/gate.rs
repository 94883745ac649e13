//! The programs, their pinned maps and links, and the words that steer them.
//!
//! Everything is pinned in the node's own BPF file system: a TAP's gate and guard go on working while
//! no service runs, and the next service finds them. Loading replaces the programs under live links in
//! place, so a new version of the service brings its programs with it.

mod endpoints;
mod facts;
mod settle;
mod tunnel;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aya::maps::{HashMap, Map, MapData, PerCpuArray, PerCpuValues, RingBuf};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfLoader};
use migrator_ebpf::{
    ABI, BRIEFS_MAX, BUCKETS, Brief, CounterRow, Device, Gate, MAX_SLOTS, NO_SLOT_ROW, QUEUES_MAX,
    bucket_index, latch_index, names,
};

use super::error::GateError;
use super::netlink::Link;
use super::pins::{mount_bpffs, remove_pin};
use super::sys::MappedWords;
use super::uplink::{FastWay, UplinkPath, XdpChoice};
use super::watch::Watchers;
pub use facts::{HookFacts, MapFacts, ProgramFacts};
pub(crate) use settle::keep_settled;

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
    tunnel: tunnel::Maps,
    endpoints: endpoints::Maps,
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
        let map_error = |map, source| GateError::Map {
            map,
            dir: dir.clone(),
            source,
        };
        let mut words = |name: &'static str, len: u32| -> Result<MappedWords, GateError> {
            let map = programs.take_map(name).ok_or(GateError::Mismatch(name))?;
            let Map::Array(data) = map else {
                return Err(GateError::Mismatch(name));
            };
            let fd = data.fd();
            MappedWords::map(fd, len as usize).map_err(|error| map_error(name, error.into()))
        };
        let briefs = words(names::BRIEFS, BRIEFS_MAX)?;
        let gates = words(names::GATES, MAX_SLOTS)?;
        let parked = words(names::PARKED, MAX_SLOTS * BUCKETS)?;
        let done = words(names::DONE, MAX_SLOTS * BUCKETS)?;
        let injected = words(names::INJECTED, MAX_SLOTS)?;
        let until = words(names::TRACE, MAX_SLOTS)?;
        let missed = words(names::TRACE_MISSED, MAX_SLOTS)?;
        let tunnel = tunnel::Maps::take(&mut programs, &dir)?;
        let endpoints = endpoints::Maps::take(&mut programs, &dir)?;
        let ring = programs.take_map(names::TRACE_RING);
        let ring = ring.ok_or(GateError::Mismatch(names::TRACE_RING))?;
        let ring =
            RingBuf::try_from(ring).map_err(|error| map_error(names::TRACE_RING, error.into()))?;
        let watchers = Watchers::start(until, missed, ring)
            .map_err(|error| map_error(names::TRACE_RING, error.into()))?;
        let devices = programs
            .take_map(names::DEVICES)
            .ok_or(GateError::Mismatch(names::DEVICES))?;
        let counters = programs
            .take_map(names::COUNTERS)
            .ok_or(GateError::Mismatch(names::COUNTERS))?;
        Ok(Self {
            devices: Mutex::new(
                HashMap::try_from(devices)
                    .map_err(|error| map_error(names::DEVICES, error.into()))?,
            ),
            counters: Mutex::new(
                PerCpuArray::try_from(counters)
                    .map_err(|error| map_error(names::COUNTERS, error.into()))?,
            ),
            programs: Mutex::new(programs),
            briefs,
            words: gates,
            parked,
            done,
            injected,
            tunnel,
            endpoints,
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
            remove_pin(&pin)?;
            fresh(program, tap, hook, &pin).map_err(|source| GateError::Attach {
                program: name,
                device: tap.to_owned(),
                source,
            })?;
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

fn fresh(
    program: &mut SchedClassifier,
    tap: &str,
    hook: TcAttachType,
    pin: &Path,
) -> Result<(), Cause> {
    // First in line: what it parks or drops, no other program of the host has acted on.
    let order = TcAttachOptions::TcxOrder(LinkOrder::first());
    let id = program.attach_with_options(tap, hook, order)?;
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

/// The gate of one slot.
#[derive(Clone, Debug)]
pub(crate) struct SlotGate {
    gates: Arc<Gates>,
    slot: u16,
}

impl SlotGate {
    pub(crate) fn slot(&self) -> u16 {
        self.slot
    }

    fn word(&self) -> &AtomicU64 {
        static SHUT: AtomicU64 = AtomicU64::new(0);
        // A slot is checked against MAX_SLOTS when it is attached.
        self.gates.words.get(u32::from(self.slot)).unwrap_or(&SHUT)
    }

    pub(crate) fn get(&self) -> Gate {
        Gate::from_word(self.word().load(Ordering::Acquire))
    }

    /// Flips the gate: one 8-byte store.
    pub(crate) fn set(&self, gate: Gate) {
        self.word().store(gate.to_word(), Ordering::Release);
        self.gates.flips.note(self.slot);
    }

    pub(crate) fn parked(&self, bucket: u8) -> u64 {
        let index = bucket_index(self.slot, bucket);
        let parked = self.gates.parked.get(index);
        parked.map_or(0, |value| value.load(Ordering::Acquire))
    }

    pub(crate) fn done(&self, bucket: u8) -> u64 {
        let index = bucket_index(self.slot, bucket);
        let done = self.gates.done.get(index);
        done.map_or(0, |value| value.load(Ordering::Acquire))
    }

    /// Parked frames, over all buckets, that have not left the service: in the park, or lost with it.
    pub(crate) fn waiting(&self) -> u64 {
        let of = |bucket| self.parked(bucket).wrapping_sub(self.done(bucket)) as i64;
        (0..=u8::MAX).map(|bucket| of(bucket).max(0) as u64).sum()
    }

    /// The counters, and what waits, of one moment: no frame is parked from the one to the other, unless frames come faster than both can be read.
    /// For a slot that no thread serves.
    pub(crate) fn counters_and_waiting(&self) -> Result<(CounterRow, u64), GateError> {
        /// At 300,000 frames a second, every fifth attempt meets none.
        const ATTEMPTS: u32 = 1000;
        let mut before = self.waiting();
        for _ in 1..ATTEMPTS {
            let counters = self.counters()?;
            let waiting = self.waiting();
            if waiting == before {
                return Ok((counters, waiting));
            }
            before = waiting;
        }
        Ok((self.counters()?, before))
    }

    /// A parked frame of the bucket has left the service. `done` never passes `parked`: if the kernel
    /// cut one parked frame into several on its way here, they count as one.
    pub(crate) fn add_done(&self, bucket: u8) {
        let done = self.done(bucket);
        if self.parked(bucket).wrapping_sub(done) as i64 > 0 {
            self.set_done(bucket, done.wrapping_add(1));
        }
    }

    /// Only one thread of one service writes `done`.
    pub(crate) fn set_done(&self, bucket: u8, value: u64) {
        let index = bucket_index(self.slot, bucket);
        if let Some(done) = self.gates.done.get(index) {
            done.store(value, Ordering::Release);
        }
    }

    /// How far the log of the pod's arrival was injected; outlives the service. 0: not at all. From a hold on, how far
    /// the log of its departure was: acknowledged, or rolled back; `u64::MAX` if that log is in memory only.
    pub(crate) fn injected(&self) -> u64 {
        let injected = self.gates.injected.get(u32::from(self.slot));
        injected.map_or(0, |value| value.load(Ordering::Acquire))
    }

    /// See [`injected`](Self::injected).
    pub(crate) fn set_injected(&self, seq: u64) {
        if let Some(injected) = self.gates.injected.get(u32::from(self.slot)) {
            injected.store(seq, Ordering::Release);
        }
    }

    /// As [`set_injected`](Self::set_injected), but never backwards.
    pub(crate) fn raise_injected(&self, seq: u64) {
        if seq > self.injected() {
            self.set_injected(seq);
        }
    }

    /// Nothing waits in any bucket, and no log was injected: for a slot whose park is new.
    pub(crate) fn clear(&self) -> Result<(), GateError> {
        self.set_injected(0);
        self.gates.fast.clear(self.slot);
        for bucket in 0..=u8::MAX {
            self.set_done(bucket, self.parked(bucket));
        }
        let cpus = aya::util::nr_cpus()
            .map_err(|(_, error)| self.gates.map_error(names::COUNTERS, error.into()))?;
        let zero = PerCpuValues::try_from(vec![CounterRow::default(); cpus])
            .map_err(|error| self.gates.map_error(names::COUNTERS, error.into()))?;
        lock(&self.gates.counters)
            .set(u32::from(self.slot), zero, 0)
            .map_err(|error| self.gates.map_error(names::COUNTERS, error.into()))
    }

    /// The slot's counters, over all CPUs.
    pub(crate) fn counters(&self) -> Result<CounterRow, GateError> {
        debug_assert!(u32::from(self.slot) < NO_SLOT_ROW);
        let values = lock(&self.gates.counters)
            .get(&u32::from(self.slot), 0)
            .map_err(|error| self.gates.map_error(names::COUNTERS, error.into()))?;
        let mut sum = CounterRow::default();
        for row in values.iter() {
            for (total, value) in sum.0.iter_mut().zip(row.0) {
                *total += value;
            }
        }
        Ok(sum)
    }
}
