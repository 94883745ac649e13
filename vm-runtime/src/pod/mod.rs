//! A pod: what the user writes, parsed into types that cannot be wrong.
//!
//! The file is a Kubernetes Pod (core/v1) of which a part is supported:
//!
//! ```yaml
//! apiVersion: v1                        # both optional
//! kind: Pod
//! metadata:
//!   name: web                           # RFC 1123 label
//!   labels: {app: web}
//!   annotations:                        # others than migrator/ are ignored
//!     migrator/ipv4: 10.77.0.10/24      # one of ipv4 and ipv6 at least
//!     migrator/ipv6: fd77::10/64
//!     migrator/gateway4: 10.77.0.1
//!     migrator/gateway6: fd77::1
//!     migrator/mac: 52:54:00:12:34:56   # derived from the name if missing
//!     migrator/vm-memory: 512Mi         # else the sum of the limits and 128Mi for the guest itself
//!     migrator/storage-class: ceph      # where its root disk and emptyDirs are: else on the node that it runs on
//!     migrator/hugepages: "true"        # guest RAM of huge pages (2 MiB), which each node must have reserved
//!     migrator/template: "false"        # always boot it, never start it from a template
//! spec:
//!   restartPolicy: Always               # OnFailure, Never; Always if missing
//!   volumes:
//!   - name: scratch
//!     emptyDir: {sizeLimit: 1Gi}        # a disk of this size, which ends with the pod
//!   - name: data
//!     persistentVolumeClaim: {claimName: web-data}   # one of `migrator volume ls`, which stays
//!   containers:
//!   - name: web
//!     image: web:1
//!     command: [/bin/server]            # replaces the image's entrypoint
//!     args: [--port, "80"]              # replaces the image's cmd
//!     workingDir: /srv
//!     env: [{name: MODE, value: fast}]
//!     resources: {limits: {memory: 64Mi, cpu: 500m, ephemeral-storage: 1Gi}}   # memory counts as 128Mi if missing
//!     volumeMounts: [{name: data, mountPath: /var/lib/data, readOnly: false}]
//! ```
//!
//! docs/pods.md has all the fields: users and rights, probes, hosts and name servers, volumes in memory.
//!
//! What containers write outside of volumes is on one disk, as large as their `ephemeral-storage` together; in guest memory, if none
//! has such a limit.
//!
//! Any other field is refused by its path: a field that would be ignored is a promise not kept.

mod limits;
mod parse;
mod probes;
mod quantity;
mod security;
mod storage;
mod surroundings;
mod validate;
mod yaml;

#[cfg(test)]
mod settings_tests;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use guest_agent::protocol::settings::{ContainerSettings, PodSettings};
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
    /// Whether guest RAM is made of huge pages: the annotation `migrator/hugepages`.
    #[serde(default)]
    pub hugepages: bool,
    /// Virtual CPUs: the sum of the containers' cpu limits, rounded up, at least 1.
    pub vcpus: u32,
    /// `spec.volumes`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<VolumeSpec>,
    /// The containers, started in this order.
    pub containers: Vec<ContainerSpec>,
    /// Whether it is always booted: the annotation `migrator/template: "false"`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cold_start: bool,
    /// The storage class of the disks that end with the pod: the annotation `migrator/storage-class`. `None`: they are on its node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage_class: Option<String>,
    /// What it expects of its surroundings.
    #[serde(default, skip_serializing_if = "is_default")]
    pub settings: PodSettings,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// A volume of a pod: a disk that containers mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSpec {
    /// Its name in the pod, by which containers mount it.
    pub name: String,
    /// Where it comes from.
    pub source: VolumeSource,
}

/// Where a volume comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum VolumeSource {
    /// Made with the pod, and removed with it: `emptyDir.sizeLimit`.
    EmptyDir {
        /// Its size.
        size: Bytes,
    },
    /// A named volume of the node, which outlives the pod: `persistentVolumeClaim.claimName`.
    Claim {
        /// The volume's name.
        volume: String,
    },
}

/// Where a container has a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeMount {
    /// The volume's name in the pod.
    pub volume: String,
    /// `mountPath`: absolute.
    pub path: String,
    /// `readOnly`.
    pub read_only: bool,
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
    /// `resources.limits.ephemeral-storage`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_limit: Option<Bytes>,
    /// `volumeMounts`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volume_mounts: Vec<VolumeMount>,
    /// `runAsUser` and `runAsGroup`, as an image would write them. Overrides the image's user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// What it expects of its surroundings.
    #[serde(default, skip_serializing_if = "is_default")]
    pub settings: ContainerSettings,
}

/// Why a pod file is refused. The path is the field's, such as `spec.containers[0].image`.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// The file is too long.
    #[error("the pod file is longer than 1 MiB")]
    TooLong,
    /// Not YAML, or not one document.
    #[error("the pod file is not one valid YAML document")]
    Yaml(#[source] serde_yaml_ng::Error),
    /// A field that must be there.
    #[error("{path}: required; {hint}")]
    Missing {
        /// The field.
        path: String,
        /// What to do.
        hint: String,
    },
    /// A field that is not known or not supported.
    #[error("{path}: not supported; {hint}")]
    Unsupported {
        /// The field.
        path: String,
        /// What to do.
        hint: String,
    },
    /// A value that does not do.
    #[error("{path}: {problem}")]
    Invalid {
        /// The field.
        path: String,
        /// What is wrong and what would be right.
        problem: String,
    },
}

/// A number of bytes as pods have it, such as `512Mi`.
///
/// # Errors
/// It is none.
pub fn parse_bytes(text: &str) -> Result<Bytes, PodError> {
    limits::bytes("size", text)
}

impl PodSpec {
    /// Parses a pod file: see the [module's documentation](self).
    pub fn from_yaml(text: &str) -> Result<Self, PodError> {
        parse::pod(text)
    }

    /// The size of the disk that containers write to outside of volumes, in whole MiB. `None`: they write to guest memory.
    pub fn root_disk(&self) -> Option<Bytes> {
        let limits = self.containers.iter().filter_map(|c| c.disk_limit);
        let sum = limits.map(|limit| limit.0).reduce(u64::saturating_add)?;
        Some(Bytes::mib(sum.div_ceil(1 << 20)))
    }

    /// The named volumes that it uses.
    pub fn claims(&self) -> impl Iterator<Item = &str> {
        self.volumes
            .iter()
            .filter_map(|volume| match &volume.source {
                VolumeSource::EmptyDir { .. } => None,
                VolumeSource::Claim { volume } => Some(volume.as_str()),
            })
    }

    /// Checks a spec that did not come through [`PodSpec::from_yaml`], but from a peer: the same rules.
    pub fn validate(&self) -> Result<(), PodError> {
        validate::pod(self)
    }
}
