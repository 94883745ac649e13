//! Which pod is at which node, and whom to believe. Pure: what it decides comes out as changes of the programs' maps.
//!
//! A node tells only of its own pods. A larger epoch wins, since only the owner of one epoch can grant the next. A pod that was made anew begins again
//! with a small epoch; such a claim is believed once nobody else can have the pod: the node that the table knows it at has withdrawn it, or is down.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{Ipv4Addr, Ipv6Addr};

use migrator_ebpf::{HERE, Place, mapped};
use vm_runtime::units::{Epoch, MacAddress};

/// The largest epoch that a place has room for.
const EPOCH_MAX: u64 = (1 << 48) - 1;

/// A pod, as its owner tells of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Its MAC address, which names it.
    pub mac: MacAddress,
    /// Its IPv4 address.
    pub v4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub v6: Option<Ipv6Addr>,
    /// The epoch in which the owner has it.
    pub epoch: Epoch,
}

impl Claim {
    fn addresses(&self) -> impl Iterator<Item = [u8; 16]> {
        let v4 = self.v4.map(|v4| mapped(v4.octets()));
        [v4, self.v6.map(|v6| v6.octets())].into_iter().flatten()
    }
}

/// A pod in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pod {
    pub(crate) claim: Claim,
    /// This node's number for the node that has it.
    pub(crate) node: u16,
    pub(crate) index: u32,
}

impl Pod {
    fn place(&self) -> Change {
        let place = Place {
            node: self.node,
            epoch: self.claim.epoch.0,
        };
        Change::Place(self.index, place)
    }
}

/// What is to be done to the programs' maps, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// The one store that moves a pod.
    Place(u32, Place),
    /// An address stands for a pod from now on.
    Enter([u8; 16], MacAddress, u32),
    /// An address stands for none.
    Leave([u8; 16]),
}

/// Why a claim is not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The table has a newer one.
    #[error("it is out of date: the pod's epoch is {0} at another node")]
    Stale(u64),
    /// Another pod has the address.
    #[error(
        "the pod {0} has one of its addresses: stop one of the two, or give it another address"
    )]
    AddressTaken(MacAddress),
    /// Two nodes claim the same epoch.
    #[error("another node has the pod in the same epoch")]
    Twice,
    /// No room.
    #[error("the table of pods is full")]
    Full,
    /// No owner counts that far.
    #[error("no pod has such an epoch")]
    BadEpoch,
}

/// The table.
#[derive(Debug)]
pub(crate) struct Table {
    pods: BTreeMap<MacAddress, Pod>,
    addresses: BTreeMap<[u8; 16], MacAddress>,
    /// Indices that no pod has; one that was given back comes last, so that no frame meets the next pod under it.
    free: VecDeque<u32>,
}

impl Table {
    pub(crate) fn new(room: u32) -> Self {
        Self {
            pods: BTreeMap::new(),
            addresses: BTreeMap::new(),
            free: (0..room).collect(),
        }
    }

    /// Takes in what a former service has left in the maps.
    pub(crate) fn restore(&mut self, pods: impl IntoIterator<Item = Pod>) {
        for pod in pods {
            self.free.retain(|index| *index != pod.index);
            for address in pod.claim.addresses() {
                self.addresses.insert(address, pod.claim.mac);
            }
            self.pods.insert(pod.claim.mac, pod);
        }
    }

    pub(crate) fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.values()
    }

    pub(crate) fn pod(&self, mac: MacAddress) -> Option<&Pod> {
        self.pods.get(&mac)
    }

    /// Another pod that has one of these addresses.
    pub(crate) fn holder(&self, claim: &Claim) -> Option<MacAddress> {
        let taken = |address| {
            self.addresses
                .get(&address)
                .filter(|mac| **mac != claim.mac)
        };
        claim.addresses().find_map(taken).copied()
    }

    /// This node's own.
    pub(crate) fn own(&self) -> impl Iterator<Item = Claim> + '_ {
        let own = self.pods.values().filter(|pod| pod.node == HERE);
        own.map(|pod| pod.claim)
    }

    /// This node has the pod: its journal says so, whatever others say. An address that another pod has stays that one's.
    pub(crate) fn own_pod(&mut self, claim: Claim) -> Result<Vec<Change>, Refused> {
        self.set(claim, HERE)
    }

    /// The pod has been granted to another node, by this one or by one that had it.
    pub(crate) fn granted(&mut self, claim: Claim, to: u16) -> Result<Vec<Change>, Refused> {
        match self.pods.get(&claim.mac) {
            Some(known) if known.claim.epoch >= claim.epoch => Ok(Vec::new()),
            _ => self.set(claim, to),
        }
    }

    /// Another node says that it has the pod. `is_up`: whether the node with a number could contradict.
    pub(crate) fn merge(
        &mut self,
        claim: Claim,
        from: u16,
        is_up: impl Fn(u16) -> bool,
    ) -> Result<Vec<Change>, Refused> {
        if let Some(known) = self.pods.get(&claim.mac)
            && known.node != from
        {
            let (epoch, others) = (known.claim.epoch, known.node == HERE || is_up(known.node));
            if claim.epoch < epoch && others {
                return Err(Refused::Stale(epoch.0));
            }
            if claim.epoch == epoch && others {
                return Err(Refused::Twice);
            }
        }
        self.set(claim, from)
    }

    /// The node does not have the pod any more. Nothing, if it is at another by now.
    pub(crate) fn withdraw(&mut self, mac: MacAddress, from: u16) -> Vec<Change> {
        match self.pods.get(&mac) {
            Some(pod) if pod.node == from => self.remove(mac),
            _ => Vec::new(),
        }
    }

    /// The node has these pods and no others.
    pub(crate) fn keep_only(&mut self, from: u16, macs: &BTreeSet<MacAddress>) -> Vec<Change> {
        let theirs = self.pods.values().filter(|pod| pod.node == from);
        let gone: Vec<_> = theirs
            .map(|pod| pod.claim.mac)
            .filter(|mac| !macs.contains(mac))
            .collect();
        gone.into_iter().flat_map(|mac| self.remove(mac)).collect()
    }

    fn remove(&mut self, mac: MacAddress) -> Vec<Change> {
        let Some(pod) = self.pods.remove(&mac) else {
            return Vec::new();
        };
        self.free.push_back(pod.index);
        self.leave(pod.claim.addresses())
    }

    fn leave(&mut self, addresses: impl Iterator<Item = [u8; 16]>) -> Vec<Change> {
        let leave = |address| {
            self.addresses.remove(&address);
            Change::Leave(address)
        };
        addresses.map(leave).collect()
    }

    fn set(&mut self, claim: Claim, node: u16) -> Result<Vec<Change>, Refused> {
        if claim.epoch.0 > EPOCH_MAX {
            return Err(Refused::BadEpoch);
        }
        if let Some(mac) = self.holder(&claim) {
            return Err(Refused::AddressTaken(mac));
        }
        let known = self.pods.get(&claim.mac).copied();
        let index = match known {
            Some(pod) => pod.index,
            None => self.free.pop_front().ok_or(Refused::Full)?,
        };
        let pod = Pod { claim, node, index };
        if known == Some(pod) {
            return Ok(Vec::new());
        }
        self.pods.insert(claim.mac, pod);
        // First where it is: an address that is found must lead somewhere.
        let mut changes = vec![pod.place()];
        let before: BTreeSet<_> = known.iter().flat_map(|pod| pod.claim.addresses()).collect();
        let now: BTreeSet<_> = claim.addresses().collect();
        changes.extend(self.leave(before.difference(&now).copied()));
        for address in now.difference(&before) {
            self.addresses.insert(*address, claim.mac);
            changes.push(Change::Enter(*address, claim.mac, index));
        }
        Ok(changes)
    }
}
