//! What is known of the other nodes of a routed cluster.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Instant;

use vm_runtime::units::{Epoch, MacAddress};

use super::{Endpoints, lock};

#[derive(Debug, Default)]
pub(super) struct Peer {
    pub(super) address: Option<IpAddr>,
    /// It takes what this node tells.
    pub(super) listens: bool,
    /// Connections over which it tells this node.
    pub(super) tells: u32,
    pub(super) heard: Option<Instant>,
    pub(super) problem: Option<String>,
    pub(super) acked: BTreeMap<MacAddress, Epoch>,
}

impl Peer {
    pub(super) fn is_up(&self) -> bool {
        self.listens || self.tells > 0
    }
}

impl Endpoints {
    fn change_peer(&self, name: &str, how: impl FnOnce(&mut Peer)) {
        if let Some(peer) = lock(&self.state).peers.get_mut(name) {
            how(peer);
        }
    }

    /// A node has taken what it was told: these pods, in these epochs.
    pub fn acknowledged(&self, peer: &str, claims: &[(MacAddress, Epoch)]) {
        self.change_peer(peer, |peer| {
            peer.listens = true;
            peer.heard = Some(Instant::now());
            peer.problem = None;
            peer.acked.extend(claims.iter().copied());
        });
    }

    /// The connection over which a node is told is lost, or did not come about.
    pub fn unreachable(&self, peer: &str, reason: String) {
        self.change_peer(peer, |peer| {
            peer.listens = false;
            peer.acked.clear();
            peer.problem = Some(reason);
        });
    }

    /// A connection begins, or ends, over which a node tells this one.
    pub fn hears(&self, peer: &str, begins: bool) {
        self.change_peer(peer, |peer| {
            peer.heard = Some(Instant::now());
            peer.tells = match begins {
                true => peer.tells + 1,
                false => peer.tells.saturating_sub(1),
            };
        });
    }
}
