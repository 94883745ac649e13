//! The maps of a routed cluster: which address is which pod, where each pod is, and where each node is.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use aya::maps::{Array, HashMap, MapData, PerCpuArray};
use aya::programs::TcAttachType;
use migrator_ebpf::{Endpoint, HERE, MAX_ENDPOINTS, MAX_NODES, Place, Steered, Tunnel, names};
use vm_runtime::units::{Epoch, MacAddress};

use super::tunnel::NONE;
use super::{Gates, Taker, lock, remove_pin};
use crate::network::endpoints::{Change, Claim, Pod};
use crate::network::error::GateError;
use crate::network::sys::MappedWords;

/// Name of the pin of the link on the tunnel's device.
const LINK: &str = "link_steer";

pub(super) struct Maps {
    endpoints: Mutex<HashMap<MapData, [u8; 16], Endpoint>>,
    places: MappedWords,
    nodes: Mutex<Array<MapData, Tunnel>>,
    steered: Mutex<PerCpuArray<MapData, u64>>,
}

impl Maps {
    pub(super) fn take(maps: &mut Taker<'_>) -> Result<Self, GateError> {
        Ok(Self {
            endpoints: Mutex::new(maps.map(names::ENDPOINTS, HashMap::try_from)?),
            places: maps.words(names::PLACES, MAX_ENDPOINTS)?,
            nodes: Mutex::new(maps.map(names::NODES, Array::try_from)?),
            steered: Mutex::new(maps.map(names::STEERED, PerCpuArray::try_from)?),
        })
    }
}

/// The address that a tunnel leads to, if it leads anywhere.
fn remote(tunnel: &Tunnel) -> Option<IpAddr> {
    let [a, b, c, d, ..] = tunnel.remote;
    match (tunnel.device, tunnel.family) {
        (0, _) => None,
        (_, 4) => Some(Ipv4Addr::new(a, b, c, d).into()),
        _ => Some(Ipv6Addr::from(tunnel.remote).into()),
    }
}

impl Gates {
    /// Puts the program that looks pods' places up on the tunnel's device, or takes over the one of a former service.
    pub(crate) fn attach_steer(&self, device: &str, is_new: bool) -> Result<(), GateError> {
        let at = (device, TcAttachType::Egress);
        self.attach_beside(names::STEER, at, LINK, is_new)
    }

    /// Takes the program off, and forgets the pods of other nodes. What is gone already is fine.
    pub(crate) fn leave_cluster(&self) -> Result<(), GateError> {
        remove_pin(&self.dir.join(LINK))?;
        self.set_node(HERE, NONE)?;
        let known: Vec<_> = lock(&self.endpoints.endpoints).keys().flatten().collect();
        let forget: Vec<_> = known.into_iter().map(Change::Leave).collect();
        self.change_endpoints(&forget)
    }

    /// The addresses of the nodes that have a number.
    pub(crate) fn known_nodes(&self) -> Result<Vec<Option<IpAddr>>, GateError> {
        let nodes = lock(&self.endpoints.nodes);
        (0..MAX_NODES)
            .map(|number| match nodes.get(&number, 0) {
                Ok(tunnel) => Ok(remote(&tunnel)),
                Err(error) => Err(self.map_error(names::NODES, error.into())),
            })
            .collect()
    }

    /// Says where a node is.
    pub(crate) fn set_node(&self, number: u16, tunnel: Tunnel) -> Result<(), GateError> {
        lock(&self.endpoints.nodes)
            .set(u32::from(number), tunnel, 0)
            .map_err(|error| self.map_error(names::NODES, error.into()))
    }

    /// The pods that a former service has left in the maps.
    pub(crate) fn known_pods(&self) -> Vec<Pod> {
        let mut pods: BTreeMap<u32, Pod> = BTreeMap::new();
        for (address, endpoint) in lock(&self.endpoints.endpoints).iter().flatten() {
            let Some(word) = self.endpoints.places.get(endpoint.index) else {
                continue;
            };
            let place = Place::from_word(word.load(Ordering::Acquire));
            let pod = pods.entry(endpoint.index).or_insert(Pod {
                claim: Claim {
                    mac: MacAddress(endpoint.mac),
                    v4: None,
                    v6: None,
                    epoch: Epoch(place.epoch),
                },
                node: place.node,
                index: endpoint.index,
            });
            let address = Ipv6Addr::from(address);
            match address.to_ipv4_mapped() {
                Some(v4) => pod.claim.v4 = Some(v4),
                None => pod.claim.v6 = Some(address),
            }
        }
        pods.into_values().collect()
    }

    /// Carries changes out, in order.
    pub(crate) fn change_endpoints(&self, changes: &[Change]) -> Result<(), GateError> {
        let maps = &self.endpoints;
        for change in changes {
            let done = match *change {
                Change::Place(index, place) => {
                    if let Some(word) = maps.places.get(index) {
                        word.store(place.to_word(), Ordering::Release);
                    }
                    Ok(())
                }
                Change::Enter(address, mac, index) => {
                    let endpoint = Endpoint {
                        index,
                        mac: mac.0,
                        spare: 0,
                    };
                    lock(&maps.endpoints).insert(address, endpoint, 0)
                }
                // Gone already is fine.
                Change::Leave(address) => {
                    let _ = lock(&maps.endpoints).remove(&address);
                    Ok(())
                }
            };
            done.map_err(|error| self.map_error(names::ENDPOINTS, error.into()))?;
        }
        Ok(())
    }

    /// What the programs have counted, over all CPUs.
    pub(crate) fn steered(&self) -> Result<Vec<(Steered, u64)>, GateError> {
        let map = lock(&self.endpoints.steered);
        let sum = |counter| {
            let values = map
                .get(&(counter as u32), 0)
                .map_err(|error| self.map_error(names::STEERED, error.into()))?;
            Ok((counter, values.iter().sum()))
        };
        Steered::ALL.into_iter().map(sum).collect()
    }
}
