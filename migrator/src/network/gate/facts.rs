//! What there is of programs, maps and hooks, for people.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use aya::maps::MapInfo;
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{SchedClassifier, TcAttachType};
use serde::{Deserialize, Serialize};

use super::{Gates, HOOKS, SlotGate, lock};

/// A program of the service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramFacts {
    /// Its name.
    pub name: String,
    /// Its number in the kernel, as in `bpftool prog show id`; changes whenever it is loaded.
    pub id: u32,
    /// The kernel's hash of its instructions, 16 hex digits: the same for the same program.
    pub tag: String,
}

/// A pinned map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapFacts {
    /// Its name, and that of its pin.
    pub name: String,
    /// Its number in the kernel.
    pub id: u32,
    /// Entries that it holds at most.
    pub entries: u32,
}

/// A place where a program sees a pod's frames.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookFacts {
    /// The device.
    pub device: String,
    /// The place: `tcx egress` sees what goes to the guest, `tcx ingress` what comes from it.
    pub hook: String,
    /// The program that belongs there.
    pub program: String,
    /// What the kernel runs there for it; absent: nothing, and frames are not seen.
    pub running: Option<ProgramFacts>,
    /// Whether the link is pinned, so that the program goes on while no service runs.
    pub pinned: bool,
    /// The link's number in the kernel, if it is pinned.
    pub link_id: Option<u32>,
    /// Other programs at the same place.
    pub others: Vec<ProgramFacts>,
}

impl ProgramFacts {
    fn of(info: &aya::programs::ProgramInfo) -> Self {
        Self {
            name: info.name_as_str().unwrap_or_default().to_owned(),
            id: info.id(),
            tag: format!("{:016x}", info.tag()),
        }
    }
}

/// When this service flipped each gate.
#[derive(Debug, Default)]
pub(super) struct Flips(Mutex<BTreeMap<u16, u64>>);

impl Flips {
    pub(super) fn note(&self, slot: u16) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |now| now.as_millis() as u64);
        let mut flips = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        flips.insert(slot, now);
    }

    fn of(&self, slot: u16) -> Option<u64> {
        let flips = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        flips.get(&slot).copied()
    }
}

impl Gates {
    /// Where maps and links are pinned.
    pub(crate) fn dir(&self) -> &std::path::Path {
        &self.dir
    }

    /// The programs, as this service has loaded them.
    pub(crate) fn program_facts(&self) -> Vec<ProgramFacts> {
        let programs = lock(&self.programs);
        let loaded = programs.programs();
        let mut facts: Vec<_> = loaded
            .filter_map(|(_, program)| Some(ProgramFacts::of(&program.info().ok()?)))
            .collect();
        facts.sort_by(|a, b| a.name.cmp(&b.name));
        facts
    }

    /// The maps that outlive the service.
    pub(crate) fn map_facts(&self) -> Vec<MapFacts> {
        let Ok(pins) = std::fs::read_dir(&self.dir) else {
            return Vec::new();
        };
        let mut facts: Vec<_> = pins
            .flatten()
            .filter(|pin| !pin.file_name().to_string_lossy().starts_with("link_"))
            .filter_map(|pin| {
                let info = MapInfo::from_pin(pin.path()).ok()?;
                Some(MapFacts {
                    name: pin.file_name().to_string_lossy().into_owned(),
                    id: info.id(),
                    entries: info.max_entries(),
                })
            })
            .collect();
        facts.sort_by(|a, b| a.name.cmp(&b.name));
        facts
    }

    /// The hooks of a pod's TAP, as the kernel has them.
    pub(crate) fn hook_facts(&self, tap: &str, slot: u16) -> Vec<HookFacts> {
        let facts_of = |(program, hook, pin): (&'static str, TcAttachType, &str)| {
            let link = PinnedLink::from_pin(self.dir.join(format!("{pin}{slot}")));
            let link = link.ok().map(FdLink::from);
            let info = link.as_ref().and_then(|link| link.info().ok());
            let there = SchedClassifier::query_tcx(tap, hook);
            let mut others: Vec<ProgramFacts> = there
                .map(|(_, programs)| programs.iter().map(ProgramFacts::of).collect())
                .unwrap_or_default();
            let ours = others.iter().position(|there| match &info {
                Some(info) => there.id == info.program_id(),
                None => there.name == program,
            });
            HookFacts {
                device: tap.to_owned(),
                hook: match hook {
                    TcAttachType::Egress => "tcx egress".to_owned(),
                    TcAttachType::Ingress => "tcx ingress".to_owned(),
                    TcAttachType::Custom(parent) => format!("tc {parent:#x}"),
                },
                program: program.to_owned(),
                running: ours.map(|at| others.remove(at)),
                pinned: link.is_some(),
                link_id: info.map(|info| info.id()),
                others,
            }
        };
        HOOKS.into_iter().map(facts_of).collect()
    }
}

impl SlotGate {
    /// When this service last flipped it, in milliseconds of Unix time. `None`: not since this service began.
    pub(crate) fn flipped_unix_ms(&self) -> Option<u64> {
        self.gates.flips.of(self.slot)
    }

    /// Whether somebody watches its frames.
    pub(crate) fn is_watched(&self) -> bool {
        self.gates.watchers.is_watched(self.slot)
    }

    /// Its hooks on a TAP.
    pub(crate) fn hooks(&self, tap: &str) -> Vec<HookFacts> {
        self.gates.hook_facts(tap, self.slot)
    }
}
