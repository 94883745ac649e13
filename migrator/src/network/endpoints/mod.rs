//! The endpoint table of a routed cluster: which pod is at which node, as this node knows it, and the programs' maps that follow it.
//!
//! ```text
//!   this node's pods --own()----> [table] --> ENDPOINTS, PLACES     (the programs)
//!   other nodes' ----take()---->     |
//!                                    +------> claims(), wanted()    (the connections to the other nodes)
//! ```
//!
//! A pod that has left takes its old way's senders along with end markers: the node that it left asks each of them for its markers
//! ([`EndMarks`]), and ends the log behind the last one. The proof is in docs/routed.md.

mod facts;
mod markers;
mod marks;
mod numbers;
mod peers;
mod table;

use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use migrator_ebpf::{EndMarker, HERE, MAX_ENDPOINTS, MAX_SLOTS};
use tokio::sync::watch;
use vm_runtime::units::{Epoch, MacAddress};

use super::error::GateError;
use super::gate::Gates;
use super::networks::PodNetworks;
use super::node::Cluster;
use super::tunnel;
pub use facts::{ClusterFacts, EndpointFacts, PeerFacts, SteeredFacts};
use markers::Markers;
use marks::Marks;
use peers::Peer;
use table::Table;
pub(crate) use table::{Change, Pod};
pub use table::{Claim, Refused};

/// A node that was heard this long ago may be back in a moment: its markers are waited for.
const LATELY: Duration = Duration::from_secs(3);

/// What another node says that no node of ours would.
#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    /// It is not configured here.
    #[error("`{0}` is not among this node's peers")]
    Unknown(String),
    /// Its tunnel cannot be this one's.
    #[error(
        "its tunnel has the vni {theirs}, this node's has {ours}: set the same `tunnel.vni` on every node"
    )]
    Vni {
        /// The other node's.
        theirs: u32,
        /// This node's.
        ours: u32,
    },
    /// More pods than a node can have.
    #[error("it claims {0} pods, and a node has {MAX_SLOTS} at most")]
    TooMany(usize),
    /// It asks for markers to end a way that it has no part in.
    #[error("it asks for the end of the way to {0}, which it does not have")]
    NotTheirs(MacAddress),
    /// The maps.
    #[error(transparent)]
    Gate(#[from] GateError),
    /// The markers could not be sent.
    #[error("could not send end markers")]
    Markers(#[source] io::Error),
}

/// What another node is asked for: the end of its old way to a pod that has left this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The pod, in the epoch that it has been granted.
    pub pod: Claim,
    /// The node where it is now.
    pub at: String,
    /// What the markers are to carry.
    pub nonce: u64,
}

/// The end markers that a departed pod's port waits for. They are asked for as long as this lives.
#[derive(Debug)]
pub(crate) struct EndMarks {
    pod: Claim,
    to: String,
    marks: Mutex<Marks>,
}

impl EndMarks {
    /// A marker has come out of the pod's park. True: now all have.
    pub(crate) fn note(&self, marker: EndMarker) -> bool {
        let mut marks = lock(&self.marks);
        marks.note(marker);
        marks.are_complete()
    }

    pub(crate) fn are_complete(&self) -> bool {
        lock(&self.marks).are_complete()
    }

    /// Nodes that have not ended their way.
    pub(crate) fn missing(&self) -> String {
        lock(&self.marks).missing().join(", ")
    }
}

/// The table, and what is known of the other nodes.
#[derive(Debug)]
pub struct Endpoints {
    name: String,
    pods: PodNetworks,
    gates: Arc<Gates>,
    device: u32,
    vni: u32,
    numbers: BTreeMap<String, u16>,
    state: Mutex<State>,
    /// Counts changes of what other nodes are to be told.
    changes: watch::Sender<u64>,
}

#[derive(Debug)]
struct State {
    table: Table,
    peers: BTreeMap<String, Peer>,
    marks: Vec<Weak<EndMarks>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change of the table is whole before it is carried out.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number that no other node can guess, and never 0.
fn nonce() -> u64 {
    // A hash under keys that are the kernel's random numbers.
    RandomState::new().build_hasher().finish() | 1
}

impl Endpoints {
    /// Goes on with what a former service has left in the maps. `device` is the tunnel's.
    pub(crate) fn open(
        gates: &Arc<Gates>,
        cluster: &Cluster,
        pods: &PodNetworks,
        (device, vni): (u32, u32),
    ) -> Result<Self, GateError> {
        let peers = &cluster.peers;
        let known = gates.known_nodes()?;
        let addresses = peers
            .iter()
            .map(|(name, ip)| (name.as_str(), ip.to_canonical()));
        let numbers = numbers::number(&known, addresses);
        for (peer, number) in &numbers {
            let Some(address) = peers.get(peer) else {
                continue;
            };
            gates.set_node(*number, tunnel::lead(device, vni, *address))?;
        }
        // The device may be another one than a former service's.
        for (number, address) in (0u16..).zip(known) {
            if let Some(address) = address
                && !numbers.values().any(|used| *used == number)
            {
                gates.set_node(number, tunnel::lead(device, vni, address))?;
            }
        }
        // It leads nowhere: that it is there says that end markers are taken.
        gates.set_node(
            HERE,
            tunnel::lead(device, vni, Ipv4Addr::UNSPECIFIED.into()),
        )?;
        let mut table = Table::new(MAX_ENDPOINTS);
        table.restore(gates.known_pods());
        let peer = |(name, address): (&String, &IpAddr)| {
            let peer = Peer {
                address: Some(*address),
                ..Peer::default()
            };
            (name.clone(), peer)
        };
        Ok(Self {
            name: cluster.name.clone(),
            pods: pods.clone(),
            gates: Arc::clone(gates),
            device,
            vni,
            numbers,
            state: Mutex::new(State {
                table,
                peers: peers.iter().map(peer).collect(),
                marks: Vec::new(),
            }),
            changes: watch::Sender::new(0),
        })
    }

    /// The tunnel's network identifier, which all nodes must have.
    pub fn vni(&self) -> u32 {
        self.vni
    }

    /// Changes whenever [`claims`](Self::claims) or [`wanted`](Self::wanted) may have.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn changed(&self) {
        self.changes.send_modify(|changes| *changes += 1);
    }

    /// This node has the pod: frames for it, of whatever sender here, go to its TAP from this call on, and other nodes are told.
    pub(crate) fn own(&self, claim: Claim) -> Result<(), GateError> {
        let mut state = lock(&self.state);
        match state.table.own_pod(claim) {
            Ok(changes) if changes.is_empty() => Ok(()),
            Ok(changes) => {
                self.gates.change_endpoints(&changes)?;
                drop(state);
                self.changed();
                Ok(())
            }
            Err(refused) => {
                tracing::error!(pod = %claim.mac, %refused, "other nodes cannot reach a pod of this one");
                Ok(())
            }
        }
    }

    /// The pod is no more, if this node has it in this epoch.
    pub(crate) fn withdraw(&self, mac: MacAddress, epoch: Epoch) -> Result<(), GateError> {
        let mut state = lock(&self.state);
        let known = state.table.pod(mac);
        if known.is_none_or(|pod| pod.claim.epoch != epoch) {
            return Ok(());
        }
        let changes = state.table.withdraw(mac, HERE);
        if changes.is_empty() {
            return Ok(());
        }
        self.gates.change_endpoints(&changes)?;
        drop(state);
        self.changed();
        Ok(())
    }

    /// Of the pods that a former service had here, these are left.
    pub(crate) fn keep_own(&self, macs: &BTreeSet<MacAddress>) -> Result<(), GateError> {
        let mut state = lock(&self.state);
        let changes = state.table.keep_only(HERE, macs);
        self.gates.change_endpoints(&changes)?;
        drop(state);
        self.changed();
        Ok(())
    }

    /// The pod has gone from here to another node: every node that could have sent something here is asked for its markers.
    pub(crate) fn leave(&self, claim: Claim, to: &str) -> Result<Arc<EndMarks>, GateError> {
        let mut state = lock(&self.state);
        match self.numbers.get(to) {
            Some(number) => match state.table.granted(claim, *number) {
                Ok(changes) => self.gates.change_endpoints(&changes)?,
                Err(refused) => {
                    tracing::error!(pod = %claim.mac, %refused, "this node does not know where the pod is");
                }
            },
            None => {
                tracing::error!(pod = %claim.mac, to, "it is at a node that is not among this one's peers")
            }
        }
        let waited_for = |(name, peer): &(&String, &Peer)| {
            let lately = peer.heard.is_some_and(|heard| heard.elapsed() < LATELY);
            name.as_str() == to || peer.is_up() || lately
        };
        let senders = state.peers.iter().filter(waited_for);
        let senders: Vec<_> = senders.map(|(name, _)| name.clone()).collect();
        let marks = Arc::new(EndMarks {
            pod: claim,
            to: to.to_owned(),
            marks: Mutex::new(Marks::of(senders, nonce)),
        });
        state.marks.retain(|marks| marks.strong_count() > 0);
        state.marks.push(Arc::downgrade(&marks));
        drop(state);
        self.changed();
        Ok(marks)
    }

    /// The pod that has one of a new pod's addresses, and its node's name.
    pub fn conflict(&self, claim: &Claim) -> Option<(MacAddress, String)> {
        let state = lock(&self.state);
        let holder = state.table.holder(claim)?;
        let node = state.table.pod(holder).map(|pod| pod.node);
        let named = self
            .numbers
            .iter()
            .find(|(_, number)| Some(**number) == node);
        Some((holder, named.map_or(&self.name, |(name, _)| name).clone()))
    }

    /// An address of a claim that no pod of this cluster can have.
    fn stranger(&self, claim: &Claim) -> Option<IpAddr> {
        let v6 = claim.v6.map(IpAddr::V6);
        let mut all = claim.v4.map(IpAddr::V4).into_iter().chain(v6);
        all.find(|address| self.pods.of(*address).is_none())
    }

    /// This node's pods, as other nodes are told.
    pub fn claims(&self) -> Vec<Claim> {
        lock(&self.state).table.own().collect()
    }

    /// Whether another node has the pod.
    pub fn is_elsewhere(&self, mac: MacAddress) -> bool {
        let state = lock(&self.state);
        state.table.pod(mac).is_some_and(|pod| pod.node != HERE)
    }

    /// The markers that a node still owes.
    pub fn wanted(&self, peer: &str) -> Vec<Wanted> {
        let marks = lock(&self.state).marks.clone();
        let alive = marks.iter().filter_map(Weak::upgrade);
        let owed = alive.filter_map(|marks| {
            let nonce = lock(&marks.marks).nonce_of(peer)?;
            Some(Wanted {
                pod: marks.pod,
                at: marks.to.clone(),
                nonce,
            })
        });
        owed.collect()
    }

    /// Another node tells of its pods: all of them (`whole`), or what has changed. When this returns, the programs know.
    ///
    /// # Errors
    /// See [`TakeError`]. What is merely out of date or in conflict is left out, and said in the log.
    pub fn take(
        &self,
        peer: &str,
        vni: u32,
        whole: bool,
        here: &[Claim],
        gone: &[MacAddress],
    ) -> Result<(), TakeError> {
        let from = self.number_of(peer)?;
        if vni != self.vni {
            return Err(TakeError::Vni {
                theirs: vni,
                ours: self.vni,
            });
        }
        let claimed = here.len().max(gone.len());
        if claimed > MAX_SLOTS as usize {
            return Err(TakeError::TooMany(claimed));
        }
        let mut state = lock(&self.state);
        let State { table, peers, .. } = &mut *state;
        let up: BTreeSet<u16> = peers
            .iter()
            .filter(|(_, peer)| peer.is_up())
            .filter_map(|(name, _)| self.numbers.get(name).copied())
            .collect();
        let mut changes = Vec::new();
        if whole {
            let macs = here.iter().map(|claim| claim.mac).collect();
            changes.extend(table.keep_only(from, &macs));
        }
        for mac in gone {
            changes.extend(table.withdraw(*mac, from));
        }
        for claim in here {
            if let Some(address) = self.stranger(claim) {
                let pods = &self.pods;
                tracing::warn!(peer, pod = %claim.mac, %address, %pods, "a claim is not believed: set the same `topology.pods` on every node");
                continue;
            }
            match table.merge(*claim, from, |number| up.contains(&number)) {
                Ok(more) => changes.extend(more),
                Err(refused) => {
                    tracing::warn!(peer, pod = %claim.mac, epoch = claim.epoch.0, %refused, "a claim is not believed");
                }
            }
        }
        let held = table.pods().filter(|pod| pod.node == from).count();
        if let Some(peer) = peers.get_mut(peer) {
            peer.heard = Some(Instant::now());
        }
        self.gates.change_endpoints(&changes)?;
        if held > MAX_SLOTS as usize {
            return Err(TakeError::TooMany(held));
        }
        Ok(())
    }

    /// Another node, which a pod has left, asks for the end of this node's way to it there. Blocks for the time of a visit to each CPU.
    ///
    /// # Errors
    /// See [`TakeError`].
    pub fn end_old_way(&self, peer: &str, wanted: &Wanted) -> Result<(), TakeError> {
        let from = self.number_of(peer)?;
        let mut state = lock(&self.state);
        let known = state.table.pod(wanted.pod.mac).copied();
        match known {
            // It has changed over already.
            Some(pod) if pod.claim.epoch >= wanted.pod.epoch => {}
            Some(pod) if pod.node != from => return Err(TakeError::NotTheirs(wanted.pod.mac)),
            // The new owner's own word has not come yet; whoever granted the pod must know.
            Some(_) | None => {
                let at = match wanted.at == self.name {
                    // Not before this node itself says so.
                    true => return Ok(()),
                    false => self.number_of(&wanted.at)?,
                };
                if self.stranger(&wanted.pod).is_some() {
                    return Err(TakeError::NotTheirs(wanted.pod.mac));
                }
                match state.table.granted(wanted.pod, at) {
                    Ok(changes) => self.gates.change_endpoints(&changes)?,
                    Err(refused) => {
                        tracing::warn!(peer, pod = %wanted.pod.mac, %refused, "a grant is not believed");
                        return Ok(());
                    }
                }
            }
        }
        drop(state);
        let markers = Markers {
            device: self.device,
            node: from,
            mac: wanted.pod.mac,
            nonce: wanted.nonce,
        };
        markers.send().map_err(TakeError::Markers)
    }

    fn number_of(&self, peer: &str) -> Result<u16, TakeError> {
        let number = self.numbers.get(peer).copied();
        number.ok_or_else(|| TakeError::Unknown(peer.to_owned()))
    }
}
