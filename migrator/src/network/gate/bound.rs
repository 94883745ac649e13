//! Flows that another node translates, and those that this one translates for pods that have left.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use aya::maps::{HashMap, MapData};
use migrator_ebpf::{Home, Lead, MAX_SLOTS, NO_SLOT, OWN_VNI, SentKey, names};

use super::{Gates, Taker, lock};
use crate::network::error::GateError;
use crate::network::sys::MappedWords;

pub(super) struct Maps {
    leads: Mutex<HashMap<MapData, SentKey, Lead>>,
    homes: Mutex<HashMap<MapData, SentKey, Home>>,
    led: MappedWords,
}

impl Maps {
    pub(super) fn take(maps: &mut Taker<'_>) -> Result<Self, GateError> {
        Ok(Self {
            leads: Mutex::new(maps.map(names::LEADS, HashMap::try_from)?),
            homes: Mutex::new(maps.map(names::HOMES, HashMap::try_from)?),
            led: maps.words(names::LED, OWN_VNI + 1)?,
        })
    }

    fn set_led(&self, index: u32, value: u64) {
        if let Some(word) = self.led.get(index) {
            word.store(value, Ordering::Release);
        }
    }

    fn is_led(&self, slot: u16) -> bool {
        let word = self.led.get(u32::from(slot));
        word.is_some_and(|word| word.load(Ordering::Acquire) != 0)
    }
}

/// An address as the programs have it in a flow's key.
pub(crate) fn address_of(bytes: [u8; 16]) -> IpAddr {
    IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical()
}

impl Gates {
    /// Marked frames of this network are known from now on.
    pub(crate) fn set_own_vni(&self, vni: u32) {
        self.bound.set_led(OWN_VNI, u64::from(vni));
    }

    /// This node translates a flow of a pod that leaves. False: there are too many.
    pub(crate) fn keep_home(&self, sent: SentKey, home: Home) -> bool {
        let key = SentKey {
            slot: NO_SLOT,
            ..sent
        };
        lock(&self.bound.homes).insert(key, home, 0).is_ok()
    }

    /// All of them.
    pub(crate) fn homes(&self) -> Vec<(SentKey, Home)> {
        lock(&self.bound.homes).iter().flatten().collect()
    }

    /// These have ended.
    pub(crate) fn forget_homes(&self, ended: &[SentKey]) {
        let mut homes = lock(&self.bound.homes);
        for key in ended {
            // It may be gone already.
            let _ = homes.remove(key);
        }
    }

    /// Leads a flow of the pod in its slot to the node that translates it. False: there are too many.
    pub(crate) fn lead(&self, sent: SentKey, lead: Lead) -> bool {
        let mut leads = lock(&self.bound.leads);
        let led = leads.insert(sent, lead, 0).is_ok();
        if led {
            // Behind the entry, and with the lock held: `sweep_leads` counts them.
            self.bound.set_led(u32::from(sent.slot), 1);
        }
        led
    }

    /// The flows of the pod in a slot that are led to other nodes.
    pub(crate) fn leads_of(&self, slot: u16) -> Vec<(SentKey, Lead)> {
        if !self.bound.is_led(slot) {
            return Vec::new();
        }
        let leads = lock(&self.bound.leads);
        let of_slot = |(key, lead): &(SentKey, Lead)| key.slot == slot && lead.until_s != 0;
        leads.iter().flatten().filter(of_slot).collect()
    }

    /// Nothing of the pod in a slot is led anywhere.
    pub(super) fn forget_leads(&self, slot: u16) -> Result<(), GateError> {
        if !self.bound.is_led(slot) {
            return Ok(());
        }
        let mut leads = lock(&self.bound.leads);
        let of_slot = |key: &SentKey| key.slot == slot;
        let stale: Vec<SentKey> = leads.keys().flatten().filter(of_slot).collect();
        for key in stale {
            let removed = leads.remove(&key);
            removed.map_err(|error| self.map_error(names::LEADS, error.into()))?;
        }
        self.bound.set_led(u32::from(slot), 0);
        Ok(())
    }

    /// Leads into a device that is no more are forgotten.
    pub(crate) fn keep_leads(&self, device: Option<u32>) {
        let mut leads = lock(&self.bound.leads);
        let stale: Vec<SentKey> = leads
            .iter()
            .flatten()
            .filter(|(_, lead)| Some(lead.tunnel.device) != device)
            .map(|(key, _)| key)
            .collect();
        for key in stale {
            // It may be gone already.
            let _ = leads.remove(&key);
        }
    }

    /// Removes what has ended, or was to end before this second.
    pub(crate) fn sweep_leads(&self, now_s: u32) {
        let slots: Vec<u16> = (0..MAX_SLOTS as u16)
            .filter(|slot| self.bound.is_led(*slot))
            .collect();
        if slots.is_empty() {
            return;
        }
        let mut leads = lock(&self.bound.leads);
        let (ended, live): (Vec<_>, Vec<_>) = leads
            .iter()
            .flatten()
            .partition(|(_, lead): &(SentKey, Lead)| lead.until_s <= now_s);
        for (key, _) in ended {
            // It may be gone already.
            let _ = leads.remove(&key);
        }
        for slot in slots {
            if !live.iter().any(|(key, _)| key.slot == slot) {
                self.bound.set_led(u32::from(slot), 0);
            }
        }
    }
}
