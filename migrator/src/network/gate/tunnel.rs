//! The tunnel's part of the programs: where slots lead, which pods frames may come out for, and what was answered.

use std::sync::Mutex;
use std::sync::atomic::Ordering;

use aya::maps::{Array, HashMap, MapData};
use aya::programs::TcAttachType;
use migrator_ebpf::{Landing, MAX_SLOTS, Tunnel, landing_key, names};
use vm_runtime::units::MacAddress;

use super::{Gates, SlotGate, Taker, lock, remove_pin};
use crate::network::error::GateError;
use crate::network::sys::MappedWords;
use crate::network::uplink::FastWay;

/// Name of the pin of the link on the tunnel's device.
const LINK: &str = "link_landing";

/// Nowhere.
pub(super) const NONE: Tunnel = Tunnel {
    device: 0,
    vni: 0,
    family: 0,
    remote: [0; 16],
};

pub(super) struct Maps {
    tunnels: Mutex<Array<MapData, Tunnel>>,
    landings: Mutex<HashMap<MapData, u64, Landing>>,
    probed: MappedWords,
}

impl Maps {
    pub(super) fn take(maps: &mut Taker<'_>) -> Result<Self, GateError> {
        Ok(Self {
            tunnels: Mutex::new(maps.map(names::TUNNELS, Array::try_from)?),
            landings: Mutex::new(maps.map(names::LANDINGS, HashMap::try_from)?),
            probed: maps.words(names::PROBED, MAX_SLOTS)?,
        })
    }
}

impl Gates {
    /// Puts the program on the tunnel's device, or takes over the one that a former service left there.
    pub(crate) fn attach_landing(&self, device: &str, is_new: bool) -> Result<(), GateError> {
        let at = (device, TcAttachType::Ingress);
        self.attach_beside(names::LANDING, at, LINK, is_new)
    }

    /// Takes the program off the tunnel's device. What is gone already is fine.
    pub(crate) fn detach_landing(&self) -> Result<(), GateError> {
        remove_pin(&self.dir.join(LINK))
    }

    /// Frames for a pod that come out of the tunnel go to its TAP.
    pub(crate) fn land(&self, mac: MacAddress, landing: Landing) -> Result<(), GateError> {
        lock(&self.tunnel.landings)
            .insert(landing_key(mac.0), landing, 0)
            .map_err(|error| self.map_error(names::LANDINGS, error.into()))
    }

    /// The slot leads nowhere, and nothing comes out of the tunnel for it.
    pub(super) fn forget_tunnel(&self, slot: u16) -> Result<(), GateError> {
        self.set_tunnel(slot, NONE)?;
        self.fast.forget_outer(slot)?;
        self.forget_landing(slot)
    }

    /// Nothing comes out of the tunnel for the slot.
    pub(crate) fn forget_landing(&self, slot: u16) -> Result<(), GateError> {
        let mut landings = lock(&self.tunnel.landings);
        // A pod that has come back has another slot, and the entry may be that one's.
        let stale: Vec<u64> = landings
            .iter()
            .flatten()
            .filter(|(_, landing)| landing.slot == slot)
            .map(|(key, _)| key)
            .collect();
        for key in stale {
            landings
                .remove(&key)
                .map_err(|error| self.map_error(names::LANDINGS, error.into()))?;
        }
        Ok(())
    }

    fn set_tunnel(&self, slot: u16, tunnel: Tunnel) -> Result<(), GateError> {
        if u32::from(slot) >= MAX_SLOTS {
            return Ok(());
        }
        lock(&self.tunnel.tunnels)
            .set(u32::from(slot), tunnel, 0)
            .map_err(|error| self.map_error(names::TUNNELS, error.into()))
    }
}

impl SlotGate {
    /// Where the slot's frames go in TUNNEL. Not while it is in that mode.
    pub(crate) fn set_tunnel(&self, tunnel: Tunnel) -> Result<(), GateError> {
        self.gates.set_tunnel(self.slot, tunnel)
    }

    /// The way from the uplink.
    pub(crate) fn fast(&self) -> &FastWay {
        &self.gates.fast
    }

    /// Has the uplink's program send a [`Probe`](migrator_ebpf::Probe).
    pub(crate) fn ask_by_uplink(&self, frame: &[u8]) -> std::io::Result<()> {
        FastWay::ask(&lock(&self.gates.programs), frame)
    }

    /// Nothing comes out of the tunnel for the slot any more.
    pub(crate) fn forget_landing(&self) -> Result<(), GateError> {
        self.gates.forget_landing(self.slot)
    }

    /// Interface index of the device that the slot's frames go into; 0: none.
    pub(crate) fn tunnel_device(&self) -> Result<u32, GateError> {
        lock(&self.gates.tunnel.tunnels)
            .get(&u32::from(self.slot), 0)
            .map(|tunnel| tunnel.device)
            .map_err(|error| self.gates.map_error(names::TUNNELS, error.into()))
    }

    /// The number of the last probe that was answered.
    pub(crate) fn probed(&self) -> u64 {
        let probed = self.gates.tunnel.probed.get(u32::from(self.slot));
        probed.map_or(0, |number| number.load(Ordering::Acquire))
    }
}
