//! The node that translates a pod's flows goes on doing so when the pod has left: it takes what the pod sends in them as its own, until they end.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, Weak};
use std::time::Duration;

use migrator_ebpf::{Home, NO_SLOT, SentKey};
use nix::time::{ClockId, clock_gettime};

use super::bound::{Bound, key_of};
use super::flow::{Flow, Tuple};
use super::{blocking, dump};
use crate::network::error::PortError;
use crate::network::gate::{Gates, address_of};
use crate::network::ground::Ground;
use crate::network::node::{NodeInner, NodeNetwork};
use crate::network::port::Port;

/// How often it is looked which flows have ended.
const LOOK: Duration = Duration::from_secs(5);
/// Of these looks, one in so many also clears away what this node's pods are led by no more.
const SWEEPS: u32 = 12;
/// Documentation/networking/bridge: with one of these on, the bridge translates what it passes on from port to port, which sends nothing back out
/// of the port that it came by.
const BRIDGE_FILTERS: [&str; 2] = [
    "/proc/sys/net/bridge/bridge-nf-call-iptables",
    "/proc/sys/net/bridge/bridge-nf-call-ip6tables",
];

/// Seconds of the clock that goes on while the machine sleeps.
pub(super) fn now_s() -> u32 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME);
    // 0 stands for the past; no machine is up for 136 years.
    now.map_or(1, |now| u32::try_from(now.tv_sec()).unwrap_or(u32::MAX))
}

/// Registers flows as translated here.
#[derive(Clone, Debug)]
pub struct Keeper {
    gates: Arc<Gates>,
    pod: Vec<IpAddr>,
    /// What becomes of their frames, or why none can come.
    home: Result<Home, String>,
    limit: Duration,
}

/// What became of bound flows at the node that they are bound to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Those that this node takes back, for the node that the pod goes to.
    pub bound: Vec<Bound>,
    /// How many it does not.
    pub unserved: u64,
}

impl Keeper {
    /// Takes back what the pod sends in these flows, from wherever it is. Call it before the other node is told.
    pub fn keep(&self, flows: &[Flow]) -> Kept {
        let mut kept = Kept::default();
        for flow in flows {
            match self.keep_one(flow) {
                Some(sent) => kept.bound.push(Bound { sent, home: None }),
                None => kept.unserved += 1,
            }
        }
        kept
    }

    fn keep_one(&self, flow: &Flow) -> Option<Tuple> {
        let home = self.home.as_ref().ok()?;
        let sent = flow.sent_by(&self.pod)?;
        let until_s = now_s().saturating_add(self.limit.as_secs() as u32);
        let key = key_of(&sent, NO_SLOT)?;
        let home = Home { until_s, ..*home };
        self.gates.keep_home(key, home).then_some(sent)
    }

    /// Why none can be served; `None`: there is no such reason.
    pub fn problem(&self) -> Option<&str> {
        self.home.as_ref().err().map(String::as_str)
    }
}

impl Port {
    /// What keeps flows that are bound to this node alive when the pod leaves.
    ///
    /// # Errors
    /// The bridge is gone.
    pub async fn keeper(&self) -> Result<Keeper, PortError> {
        let node = &self.inner.node;
        Ok(Keeper {
            gates: Arc::clone(&node.gates),
            pod: self.addresses(),
            home: home_at(node).await?,
            limit: node.config.bound_limit,
        })
    }
}

async fn home_at(node: &NodeInner) -> Result<Result<Home, String>, PortError> {
    if let Err(error) = node.tunnel.way() {
        return Ok(Err(error.to_string()));
    }
    let mut home = Home {
        device: 0,
        until_s: 0,
        mac: [0; 6],
        spare: 0,
    };
    if let Ground::Bridge(name) = &node.config.ground {
        let is_on = |path: &str| std::fs::read_to_string(path).is_ok_and(|text| text.trim() != "0");
        if let Some(path) = BRIDGE_FILTERS.into_iter().find(|path| is_on(path)) {
            return Ok(Err(format!(
                "{path} is on, and a bridge that translates sends nothing back out of its uplink: turn it off, and let the node route what it translates"
            )));
        }
        let bridge = node.netlink.require(name).await?;
        home.device = bridge.index;
        home.mac = bridge.mac.0;
    }
    Ok(Ok(home))
}

/// Until the network is gone: forgets flows that have ended, or have lived on for as long as they may.
pub(in crate::network) async fn keep(node: Weak<NodeInner>) {
    let mut looks = tokio::time::interval(LOOK);
    let mut look = 0u32;
    loop {
        looks.tick().await;
        let Some(node) = node.upgrade() else { return };
        let gates = Arc::clone(&node.gates);
        drop(node);
        look = look.wrapping_add(1);
        let looked = blocking(move || {
            if look.is_multiple_of(SWEEPS) {
                gates.sweep_leads(now_s());
            }
            // Before connection tracking is read: what is entered from here on is not missed there.
            let homes = gates.homes();
            if homes.is_empty() {
                return Ok(());
            }
            let pods: HashSet<IpAddr> = homes
                .iter()
                .map(|(key, _)| address_of(key.source))
                .collect();
            let pods: Vec<IpAddr> = pods.into_iter().collect();
            let live: HashSet<SentKey> = dump(&pods)?
                .iter()
                .flat_map(|flow| [flow.original, flow.reply])
                .filter_map(|way| key_of(&way, NO_SLOT))
                .collect();
            let now = now_s();
            let is_over =
                |(key, home): &&(SentKey, Home)| home.until_s <= now || !live.contains(key);
            let ended: Vec<SentKey> = homes.iter().filter(is_over).map(|(key, _)| *key).collect();
            gates.forget_homes(&ended);
            Ok(())
        });
        if let Err(error) = looked.await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "it is not known which flows of pods that have left still live"
            );
        }
    }
}

impl NodeNetwork {
    /// How many flows this node translates for pods that have left, by the pod's address.
    pub fn homes(&self) -> BTreeMap<IpAddr, u64> {
        let mut count = BTreeMap::new();
        for (key, _) in self.inner().gates.homes() {
            *count.entry(address_of(key.source)).or_default() += 1;
        }
        count
    }
}
