//! A pod: what the user writes, parsed into types that cannot be wrong.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, MacAddress};

/// A pod as the rest of the program sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodSpec {
    /// `metadata.name`: an RFC 1123 label, unique on a node.
    pub name: String,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// Addresses and MAC of the pod's one interface.
    pub net: PodNet,
    /// Guest RAM: the annotation `migrator/vm-memory`, or the containers' limits plus the guest's own need.
    pub memory: Bytes,
    /// Virtual CPUs: the sum of the containers' cpu limits, rounded up, at least 1.
    pub vcpus: u32,
    /// The containers, started in this order.
    pub containers: Vec<ContainerSpec>,
}

/// The pod's interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodNet {
    /// Its MAC address.
    pub mac: MacAddress,
    /// IPv4 address and prefix length.
    pub ipv4: Option<(Ipv4Addr, u8)>,
    /// IPv6 address and prefix length.
    pub ipv6: Option<(Ipv6Addr, u8)>,
    /// IPv4 default gateway.
    pub gateway4: Option<Ipv4Addr>,
    /// IPv6 default gateway.
    pub gateway6: Option<Ipv6Addr>,
}

/// One container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerSpec {
    /// Its name, unique in the pod.
    pub name: String,
    /// The image's reference, as imported.
    pub image: String,
    /// Overrides the image's entrypoint.
    pub command: Option<Vec<String>>,
    /// Overrides the image's cmd.
    pub args: Option<Vec<String>>,
    /// Added to the image's environment, in order.
    pub env: Vec<(String, String)>,
    /// Overrides the image's working directory.
    pub working_dir: Option<String>,
    /// `resources.limits.memory`.
    pub memory_limit: Option<Bytes>,
    /// `resources.limits.cpu`, in thousandths of a CPU.
    pub cpu_limit_milli: Option<u32>,
}
