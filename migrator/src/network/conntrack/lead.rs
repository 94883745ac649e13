//! The node that a pod has come to leads what the pod sends in bound flows back to the node that translates them.

use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use migrator_ebpf::{Lead, Mark, Tunnel, marked};
use tokio::sync::OnceCell;

use super::bound::{Bound, key_of, tuple_of};
use super::flow::FlowError;
use super::home::now_s;
use crate::network::error::PortError;
use crate::network::gate::address_of;
use crate::network::port::Port;
use crate::network::tunnel::{chain, lead as way_to};

/// What became of the bound flows that another node has told of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Led {
    /// Led to the nodes that translate them; or this node is the one.
    pub served: u64,
    /// Not: they break.
    pub unserved: u64,
}

/// What a port knows of the nodes that its pod's flows are bound to.
#[derive(Debug, Default)]
pub(in crate::network) struct Homeward {
    from: OnceLock<From>,
    /// The way to the node that the pod comes from, or why there is none: found out once.
    way: OnceCell<Result<Tunnel, String>>,
    led: Mutex<Led>,
}

#[derive(Debug)]
struct From {
    /// Where the pod comes from.
    source: IpAddr,
    /// The other nodes.
    nodes: Vec<IpAddr>,
}

impl Homeward {
    fn led(&self) -> MutexGuard<'_, Led> {
        self.led.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Port {
    /// The pod comes from the node at `source`, and `nodes` are those that its flows may be bound to. Finds out meanwhile whether there is a tunnel
    /// to `source`, so that the freeze need not wait for it: the source's programs answer as long as they have the pod.
    pub fn comes_from(&self, source: IpAddr, nodes: Vec<IpAddr>) {
        let source = source.to_canonical();
        let from = From { source, nodes };
        if self.inner.homeward.from.set(from).is_ok() {
            let port = self.clone();
            tokio::spawn(async move {
                port.way_back().await;
            });
        }
    }

    async fn way_back(&self) -> &Result<Tunnel, String> {
        let inner = &self.inner;
        let find = async || {
            let Some(from) = inner.homeward.from.get() else {
                return Err(
                    "it is not known where the pod comes from: add that node to `peers`".to_owned(),
                );
            };
            let tap = inner.node.netlink.require(&inner.tap_name).await;
            let mtu = tap.map_err(|error| chain(&error))?.mtu;
            let (gate, mac) = (&inner.gate, inner.pod.mac);
            let aimed = inner.node.tunnel.aim(gate, mac, mtu, from.source).await;
            aimed.map_err(|error| chain(&error))
        };
        inner.homeward.way.get_or_init(find).await
    }

    /// Bound flows that another node has sent, in the form of [`Bound::encode_all`].
    ///
    /// # Errors
    /// See [`FlowError`].
    pub fn read_bound(&self, bytes: &[u8]) -> Result<Vec<Bound>, FlowError> {
        Bound::decode_all(bytes, &self.addresses())
    }

    /// Leads these flows to the nodes that translate them. [`discard`](Self::discard) and [`release`](Self::release) undo it.
    ///
    /// # Errors
    /// The node's own addresses cannot be read.
    pub async fn lead_bound(&self, bound: &[Bound]) -> Result<(), PortError> {
        let node = &self.inner.node;
        let own = node.netlink.addresses().await?;
        let until_s = now_s().saturating_add(node.config.bound_limit.as_secs() as u32);
        let mut led = Led::default();
        let mut problem = None;
        for flow in bound {
            let is_home = flow.home.is_some_and(|home| own.contains(&home));
            let way = match is_home {
                true => Ok(None),
                false => self.way_home(flow.home).await.map(Some),
            };
            let result = way.and_then(|way| match (way, key_of(&flow.sent, self.slot())) {
                (None, _) => Ok(()),
                (Some(tunnel), Some(key)) => match node.gates.lead(key, Lead { tunnel, until_s }) {
                    true => Ok(()),
                    false => Err("there are too many such flows".to_owned()),
                },
                (Some(_), None) => Err("the programs read no packets of their kind".to_owned()),
            });
            match result {
                Ok(()) => led.served += 1,
                Err(reason) => {
                    led.unserved += 1;
                    problem = Some(reason);
                }
            }
        }
        if let Some(reason) = problem {
            tracing::warn!(
                pod = self.inner.pod.name,
                flows = led.unserved,
                reason,
                "flows that another node translates break; they need `tunnel` on both nodes, and each in the other's `peers`"
            );
        }
        let mut all = self.inner.homeward.led();
        all.served += led.served;
        all.unserved += led.unserved;
        Ok(())
    }

    /// The way to the node that translates; `None`: the one that the pod comes from.
    async fn way_home(&self, home: Option<IpAddr>) -> Result<Tunnel, String> {
        let mut tunnel = match home {
            None => self.way_back().await.clone()?,
            Some(home) => {
                let from = self.inner.homeward.from.get();
                if !from.is_some_and(|from| from.nodes.contains(&home)) {
                    return Err(format!("the node at {home} is not one of `peers`"));
                }
                let way = self.inner.node.tunnel.way();
                let (config, device) = way.map_err(|error| error.to_string())?;
                way_to(device, config.vni, home)
            }
        };
        tunnel.vni = marked(tunnel.vni, Mark::Home);
        Ok(tunnel)
    }

    /// What became of all bound flows that another node has told of.
    pub fn led_flows(&self) -> Led {
        *self.inner.homeward.led()
    }

    /// The pod's flows that this node leads to others, for the node that the pod goes to: it leads them there itself.
    pub fn flows_elsewhere(&self) -> Vec<Bound> {
        let leads = self.inner.node.gates.leads_of(self.slot());
        let bound = leads.iter().map(|(key, lead)| Bound {
            sent: tuple_of(key),
            home: Some(remote_of(&lead.tunnel)),
        });
        bound.collect()
    }
}

fn remote_of(tunnel: &Tunnel) -> IpAddr {
    match (tunnel.family, tunnel.remote) {
        (4, [a, b, c, d, ..]) => IpAddr::from([a, b, c, d]),
        (_, address) => address_of(address),
    }
}
