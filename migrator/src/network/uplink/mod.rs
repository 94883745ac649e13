//! The fast way: frames for local pods go from the uplink straight to their TAPs, by an XDP program.
//!
//! Why that neither overtakes nor loses anything is in `migrator_ebpf`'s module `uplink`, and in docs/dataplane.md. Here are its
//! programs, maps and links, pinned like the gates': frames take it while no service runs, and the next service replaces the
//! programs in place. Where it cannot be had, the kernel's way is taken, and [`UplinkPath`] says why.

mod attach;
mod features;
mod heal;
mod onward;

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use aya::Ebpf;
use aya::maps::xdp::DevMapHash;
use aya::maps::{HashMap, Map, MapData};
use aya::programs::ProgramFd;
use migrator_ebpf::{BUCKETS, Local, MAC_LEN, MAX_SLOTS, Outer, bucket_index, names};
use serde::{Deserialize, Serialize};

use super::error::GateError;
use super::gate::lock;
use super::sys::MappedWords;

pub(crate) use heal::keep;

/// Longer than a frame is between the uplink's program and the gate. It is there within one NAPI poll and its GRO
/// (`gro_flush_timeout`, zero by default; Documentation/networking/napi.rst); a CPU that stood still is waited for by
/// [`grace_period`](super::grace::grace_period) where it matters.
pub(crate) const STRAGGLERS: Duration = Duration::from_millis(20);

/// Whether the uplink's program is to be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum XdpChoice {
    /// Where the uplink takes it natively, and nothing gets slower by it: not on a veth, whose other end loses its segmentation offload.
    #[default]
    Auto,
    /// Where the uplink takes it natively.
    On,
    /// Not at all.
    Off,
}

/// The way that frames take from the uplink to a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "path")]
pub enum UplinkPath {
    /// Small packets go straight to the TAP, by the uplink's native XDP.
    Xdp,
    /// All go by the bridge.
    Bridge {
        /// Why.
        why: String,
    },
    /// All go by the kernel's routes.
    Routes {
        /// Why.
        why: String,
    },
}

/// Maps and programs of the fast way.
pub(crate) struct FastWay {
    dir: PathBuf,
    locals: Mutex<HashMap<MapData, [u8; MAC_LEN], Local>>,
    taps: Mutex<DevMapHash<MapData>>,
    passed: MappedWords,
    arrived: MappedWords,
    /// Why the kernel does not take the programs, if it does not.
    loaded: Result<(), String>,
    outers: Mutex<HashMap<MapData, u32, Outer>>,
    ways_out: Mutex<DevMapHash<MapData>>,
    /// Set while the way is open.
    open: OnceLock<Open>,
}

/// An open way.
struct Open {
    /// The program of each TAP's entry.
    into_tap: ProgramFd,
    /// The program of each entry of a device that leads out of the node.
    onto_wire: ProgramFd,
    /// The uplink's interface index.
    uplink: u32,
    /// Why a departed pod's frames cannot be sent on from there, if they cannot.
    no_way_on: Option<String>,
}

impl FastWay {
    /// Loads the programs, and takes the maps out of the object.
    pub(crate) fn take(programs: &mut Ebpf, dir: PathBuf) -> Result<Self, GateError> {
        let loaded = attach::load(programs);
        let mut take = |name| programs.take_map(name).ok_or(GateError::Mismatch(name));
        let error = |map, source| GateError::Map {
            map,
            dir: dir.clone(),
            source,
        };
        let words = |name, map: Map| {
            let Map::Array(data) = map else {
                return Err(GateError::Mismatch(name));
            };
            let len = (MAX_SLOTS * BUCKETS) as usize;
            MappedWords::map(data.fd(), len).map_err(|source| error(name, source.into()))
        };
        let locals = HashMap::try_from(take(names::LOCALS)?)
            .map_err(|source| error(names::LOCALS, source.into()))?;
        let taps = DevMapHash::try_from(take(names::TAPS)?)
            .map_err(|source| error(names::TAPS, source.into()))?;
        let outers = HashMap::try_from(take(names::OUTERS)?)
            .map_err(|source| error(names::OUTERS, source.into()))?;
        let ways_out = DevMapHash::try_from(take(names::WAYS_OUT)?)
            .map_err(|source| error(names::WAYS_OUT, source.into()))?;
        let passed = words(names::PASSED, take(names::PASSED)?)?;
        let arrived = words(names::ARRIVED, take(names::ARRIVED)?)?;
        Ok(Self {
            locals: Mutex::new(locals),
            taps: Mutex::new(taps),
            passed,
            arrived,
            outers: Mutex::new(outers),
            ways_out: Mutex::new(ways_out),
            loaded,
            open: OnceLock::new(),
            dir,
        })
    }

    /// The uplink whose program counts what it leaves to the kernel; 0 if there is none.
    pub(crate) fn uplink(&self) -> u32 {
        self.open.get().map_or(0, |open| open.uplink)
    }

    /// From here on frames for the pod are counted; none is redirected before [`lead_to`](Self::lead_to). True if they were before:
    /// then the gate may count them at once, else [`STRAGGLERS`] later.
    pub(crate) fn introduce(&self, mac: [u8; MAC_LEN], local: Local) -> Result<bool, GateError> {
        if self.uplink() == 0 {
            return Ok(true);
        }
        let mut locals = lock(&self.locals);
        let known = locals
            .get(&mac, 0)
            .is_ok_and(|known| known.slot == local.slot);
        locals
            .insert(mac, local, 0)
            .map_err(|source| self.error(names::LOCALS, source.into()))?;
        Ok(known)
    }

    /// Opens the way to a slot's TAP, which is up.
    pub(crate) fn lead_to(&self, slot: u16, tap: u32) -> Result<(), GateError> {
        let Some(open) = self.open.get() else {
            return Ok(());
        };
        lock(&self.taps)
            .insert(u32::from(slot), tap, Some(&open.into_tap), 0)
            .map_err(|source| self.error(names::TAPS, source.into()))
    }

    /// Leaves a slot's frames to the kernel. What is gone already is fine.
    pub(crate) fn forget(&self, slot: u16) -> Result<(), GateError> {
        let gone = |error: &aya::maps::MapError| match error {
            aya::maps::MapError::KeyNotFound => true,
            aya::maps::MapError::SyscallError(error) => {
                error.io_error.raw_os_error() == Some(libc::ENOENT)
            }
            _ => false,
        };
        let mut taps = lock(&self.taps);
        if taps.get(u32::from(slot), 0).is_ok() {
            match taps.remove(u32::from(slot)) {
                Err(error) if !gone(&error) => {
                    return Err(self.error(names::TAPS, error.into()));
                }
                Ok(()) | Err(_) => {}
            }
        }
        let mut locals = lock(&self.locals);
        let macs: Vec<_> = locals
            .iter()
            .flatten()
            .filter(|(_, local)| local.slot == slot)
            .map(|(mac, _)| mac)
            .collect();
        for mac in macs {
            match locals.remove(&mac) {
                Err(error) if !gone(&error) => {
                    return Err(self.error(names::LOCALS, error.into()));
                }
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }

    /// Nothing of a slot is under way: for one whose TAP is new, which no frame has come to.
    pub(crate) fn clear(&self, slot: u16) {
        for bucket in 0..=u8::MAX {
            let (passed, _) = self.counts(slot, bucket);
            let index = bucket_index(slot, bucket);
            if let Some(arrived) = self.arrived.get(index) {
                arrived.store(passed, Ordering::Release);
            }
        }
    }

    /// Frames of a bucket that were left to the kernel, and those that have arrived. The second one is read first, as the program does.
    fn counts(&self, slot: u16, bucket: u8) -> (u64, u64) {
        let index = bucket_index(slot, bucket);
        let read = |words: &MappedWords| words.get(index).map_or(0, |w| w.load(Ordering::Acquire));
        let arrived = read(&self.arrived);
        (read(&self.passed), arrived)
    }

    fn error(
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
