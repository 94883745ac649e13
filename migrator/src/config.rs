//! The node's configuration: one YAML file, parsed into types that cannot be wrong.
//!
//! ```yaml
//! name: a                        # this node's name, as in its certificate
//! state_dir: /var/lib/migrator   # pods, images, journal, sockets
//! topology: bridge               # optional; or { kind: routed, pods: [10.77.0.0/24, "fd77::/64"] }
//! bridge: br0                    # the bridge that pods are ports of; none if the topology is routed
//! uplink: eth0                   # the bridge's port, or else the device, that leads to the other nodes
//! xdp: auto                      # optional: small packets straight from the uplink to pods; `on`: also from a veth; `off`
//! listen: 10.78.0.1:7077         # where other nodes connect
//! advertise: 10.78.0.1:7077      # optional: what to tell them, if not `listen`
//! peers: { b: "10.78.0.2:7077" }
//! tls: { ca: ca.pem, cert: a.pem, key: a.key }
//! api_socket: /run/migrator.sock # optional: <state_dir>/api.sock
//! guest: { kernel: vmlinuz, initramfs: guest.img }
//! qemu: { binary: /usr/bin/qemu-system-x86_64, accel: auto }   # optional
//! tunnel: { kind: vxlan, vni: 7077, port: 4789, mtu: 1500 }    # optional: off
//! forwarding: { bound_limit_s: 3600 }                           # optional
//! limits: { pods: 64, log_bytes: 16777216, park_bytes: 1073741824, park_bytes_per_pod: 268435456, template_bytes: 1073741824 }   # optional
//! migration: { connections: 2, compress: auto, max_downtime_ms: 300, on_overflow: abort }   # optional
//! templates: auto                # optional: pods start from saved guests of their shape; `manual`: only from those that were asked for; `off`
//! registries: { mirrors: { docker.io: ["https://mirror.example"] }, auth_file: auth.json, ca: registry-ca.pem }   # optional
//! storage: { classes: { shared: { driver: file, path: /mnt/nfs/migrator } } }   # optional: see docs/shared-storage.md
//! ```
//!
//! `topology: { kind: routed, pods: [...] }` gives each pod a route of its own (/32 and /128) in place of a port of the bridge.
//! `pods` names the networks of all pods of the cluster, and is the same on every node; `tunnel` must be set, and `bridge` must not.
//!
//! Relative paths are taken from the file's own folder. An unknown key is an error that names it.

mod forwarding;
mod names;
mod registries;
mod storage;
mod topology;
mod tunnel;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use vm_runtime::spec::AccelChoice;

use crate::memory::compress::Compress;
use crate::network::{Ground, OnOverflow, ParkLimits, XdpChoice};
use crate::wire::preamble::MAX_DATA_CONNECTIONS;

pub use forwarding::Forwarding;
pub use names::{BadInterfaceName, BadNodeName, InterfaceName, NodeName};
pub use registries::Registries;
pub use storage::{LOCAL as LOCAL_CLASS, Storage, StorageClass};
pub use topology::Topology;
pub use tunnel::Tunnel;

/// Longest socket path the kernel takes, its final zero included (`sun_path` in `linux/un.h`).
const SUN_PATH_MAX: usize = 108;

/// What a socket in a pod's folder adds to the state folder's path, without the pod's name.
const POD_SOCKET_EXTRA: usize = "/pods//migration.sock".len() + 1;

/// Every state folder leaves room for pod names of at least this length; longer ones may be refused.
const SHORTEST_NAME_LIMIT: usize = 20;

/// Everything `migrator node` is told.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// This node's name: an RFC 1123 label, and the name in its certificate.
    pub name: NodeName,
    /// Folder of everything the node keeps. One service at a time may use it.
    pub state_dir: PathBuf,
    /// How pods are on the network.
    #[serde(default)]
    pub topology: Topology,
    /// The bridge that pods' TAPs become ports of; there is one exactly if the topology has one.
    #[serde(default)]
    pub bridge: Option<InterfaceName>,
    /// The bridge's port towards the other nodes, or else the device that leads to them.
    pub uplink: InterfaceName,
    /// Whether small packets may go from the uplink straight to a pod: `auto` where the uplink takes native XDP and is no veth, `on` or `off`.
    #[serde(default)]
    pub xdp: XdpChoice,
    /// Address that other nodes connect to.
    pub listen: SocketAddr,
    /// What other nodes are told to connect to, where it is not `listen`.
    #[serde(default)]
    pub advertise: Option<SocketAddr>,
    /// The other nodes.
    #[serde(default)]
    pub peers: BTreeMap<NodeName, SocketAddr>,
    /// Certificates.
    pub tls: TlsPaths,
    /// The API's socket; `<state_dir>/api.sock` if absent.
    #[serde(default)]
    pub api_socket: Option<PathBuf>,
    /// What guests boot from.
    pub guest: GuestPaths,
    /// The VMM.
    #[serde(default)]
    pub qemu: QemuConfig,
    /// What late frames of a departed pod go through to the other node.
    #[serde(default)]
    pub tunnel: Tunnel,
    /// What goes on for pods that have left.
    #[serde(default)]
    pub forwarding: Forwarding,
    /// Bounds.
    #[serde(default)]
    pub limits: Limits,
    /// What a migration uses where its request names nothing.
    #[serde(default)]
    pub migration: MigrationDefaults,
    /// Where images come from.
    #[serde(default)]
    pub registries: Registries,
    /// Whether pods start from templates.
    #[serde(default)]
    pub templates: TemplateMode,
    /// Where volumes can be beside `state_dir`.
    #[serde(default)]
    pub storage: Storage,
}

/// Whether pods start from templates, and who makes those.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TemplateMode {
    /// The service makes one, once a pod of a shape has been booted and the node is idle.
    #[default]
    Auto,
    /// Only `migrator template build` does.
    Manual,
    /// Every pod is booted.
    Off,
}

/// PEM files of this node.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsPaths {
    /// The authority that all nodes' certificates are checked against.
    pub ca: PathBuf,
    /// This node's certificate chain.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// The guest's kernel and first file system. Both must be the same on every node.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestPaths {
    /// Kernel image (bzImage).
    pub kernel: PathBuf,
    /// Initramfs with the agent and its modules.
    pub initramfs: PathBuf,
}

/// Which QEMU, and how it runs guests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QemuConfig {
    /// The program; searched in PATH if absent.
    #[serde(default)]
    pub binary: Option<PathBuf>,
    /// Folder of its shared libraries, for a QEMU that is unpacked rather than installed.
    #[serde(default)]
    pub lib_dir: Option<PathBuf>,
    /// Folders of its firmware (`-L`), for the same case.
    #[serde(default)]
    pub data_dirs: Vec<PathBuf>,
    /// Accelerator: `auto`, `kvm` or `tcg`.
    #[serde(default)]
    pub accel: AccelChoice,
}

/// Bounds that keep one tenant from taking the whole node.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Pods on this node at a time.
    pub pods: u16,
    /// Bytes of output kept for each pod.
    pub log_bytes: u64,
    /// Bytes of packets kept for all pods that are being moved away.
    pub park_bytes: u64,
    /// Bytes of packets kept for one of them: at a gigabit a second, 256 MiB are two seconds.
    pub park_bytes_per_pod: u64,
    /// Bytes of disk that templates take together; the one made last may take more.
    pub template_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            pods: 64,
            log_bytes: 16 << 20,
            park_bytes: 1 << 30,
            park_bytes_per_pod: 256 << 20,
            template_bytes: 1 << 30,
        }
    }
}

/// What a migration uses where its request names nothing.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MigrationDefaults {
    /// Data connections, 1 to 64.
    pub connections: u8,
    /// What pages are compressed with: `none`, `lz4`, `zstd`, or `auto` for what link and processor make best.
    pub compress: Compress,
    /// The longest predicted downtime that lets a migration freeze the guest, in milliseconds. QEMU's own default is 300 as well
    /// (`downtime-limit`); what is reached is less, as rounds go on while they shorten it.
    pub max_downtime_ms: u32,
    /// What is done when more packets come for the pod than may be kept: `abort` the migration, or `drop` the newest.
    pub on_overflow: OnOverflow,
}

impl Default for MigrationDefaults {
    fn default() -> Self {
        Self {
            connections: 2,
            compress: Compress::Auto,
            max_downtime_ms: 300,
            on_overflow: OnOverflow::Abort,
        }
    }
}

/// Why a configuration cannot be used. The messages name the file, and the key where there is one.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Not YAML, a key that is unknown or missing, or a value of the wrong kind.
    #[error("the configuration file {} is not valid", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Names the key, line and column.
        #[source]
        source: serde_yaml_ng::Error,
    },
    /// A value that no node can work with.
    #[error("the configuration file {}: `{key}` {problem}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key, with its section.
        key: &'static str,
        /// What is wrong with its value, and what to write.
        problem: String,
    },
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// See [`ConfigError`]; files that the configuration names are not looked at.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        let folder = std::path::absolute(path)
            .ok()
            .and_then(|p| p.parent().map(Path::to_owned))
            .unwrap_or_else(|| PathBuf::from("/"));
        Self::parse(&text, path, &folder)
    }

    /// Parses `text`; `path` is for messages, `folder` is what relative paths are taken from.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn parse(text: &str, path: &Path, folder: &Path) -> Result<Self, ConfigError> {
        let mut config: Self =
            serde_yaml_ng::from_str(text).map_err(|source| ConfigError::Parse {
                path: path.to_owned(),
                source,
            })?;
        for file in [
            &mut config.state_dir,
            &mut config.tls.ca,
            &mut config.tls.cert,
            &mut config.tls.key,
            &mut config.guest.kernel,
            &mut config.guest.initramfs,
        ]
        .into_iter()
        .chain(config.api_socket.as_mut())
        .chain(config.qemu.lib_dir.as_mut())
        .chain(config.qemu.data_dirs.iter_mut())
        .chain(config.registries.files_mut())
        .chain(config.storage.files_mut())
        {
            *file = folder.join(&*file);
        }
        // A bare program name stays one, to be searched in PATH.
        if let Some(binary) = config.qemu.binary.as_mut()
            && binary.components().count() > 1
        {
            *binary = folder.join(&*binary);
        }
        config
            .check()
            .map_err(|(key, problem)| ConfigError::Value {
                path: path.to_owned(),
                key,
                problem,
            })?;
        Ok(config)
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        if self.peers.contains_key(&self.name) {
            return Err((
                "peers",
                format!(
                    "names this node itself (`{}`): remove that entry",
                    self.name
                ),
            ));
        }
        if self.advertise.unwrap_or(self.listen).port() == 0 {
            return Err(("listen", "needs a port other than 0".to_owned()));
        }
        topology::check(self)?;
        if self.longest_pod_name() < SHORTEST_NAME_LIMIT {
            // Short pod names would work, and a longer one would fail at night.
            return Err((
                "state_dir",
                format!(
                    "is too long for the sockets in it: {} bytes, at most {}",
                    self.state_dir.as_os_str().len(),
                    SUN_PATH_MAX - POD_SOCKET_EXTRA - SHORTEST_NAME_LIMIT
                ),
            ));
        }
        if self.api_socket().as_os_str().len() >= SUN_PATH_MAX {
            return Err(("api_socket", "is too long for a socket's path".to_owned()));
        }
        if let Tunnel::Vxlan { vni, port, mtu } = self.tunnel {
            if !(1..=tunnel::VNI_MAX).contains(&vni) {
                return Err((
                    "tunnel.vni",
                    format!("must be between 1 and {}", tunnel::VNI_MAX),
                ));
            }
            if port == 0 {
                return Err(("tunnel.port", "needs a port other than 0".to_owned()));
            }
            if mtu.is_some_and(|mtu| !tunnel::MTU_RANGE.contains(&mtu)) {
                return Err(("tunnel.mtu", "must be between 1280 and 65535".to_owned()));
            }
        }
        self.forwarding.check()?;
        if self.limits.pods == 0 || self.limits.pods > 4096 {
            return Err(("limits.pods", "must be between 1 and 4096".to_owned()));
        }
        if self.limits.log_bytes < 1 << 16 {
            return Err(("limits.log_bytes", "must be at least 65536".to_owned()));
        }
        for (key, bytes) in [
            ("limits.park_bytes", self.limits.park_bytes),
            ("limits.park_bytes_per_pod", self.limits.park_bytes_per_pod),
        ] {
            if bytes < 1 << 16 {
                return Err((key, "must be at least 65536".to_owned()));
            }
        }
        if !(1..=MAX_DATA_CONNECTIONS).contains(&self.migration.connections) {
            return Err((
                "migration.connections",
                format!("must be between 1 and {MAX_DATA_CONNECTIONS}"),
            ));
        }
        if self.migration.max_downtime_ms == 0 {
            return Err(("migration.max_downtime_ms", "must be at least 1".to_owned()));
        }
        self.storage.check()?;
        self.registries.check()
    }

    /// What pods' TAPs are put on.
    pub fn ground(&self) -> Ground {
        match (&self.topology, &self.bridge) {
            (Topology::Routed { pods }, _) => Ground::Routed(pods.clone()),
            // Without a bridge the configuration is refused.
            (Topology::Bridge, bridge) => {
                let bridge = bridge.as_ref().map_or("", InterfaceName::as_str);
                Ground::Bridge(bridge.to_owned())
            }
        }
    }

    /// What is kept of packets at most.
    pub fn park_limits(&self) -> ParkLimits {
        ParkLimits {
            bytes: self.limits.park_bytes,
            bytes_per_pod: self.limits.park_bytes_per_pod,
        }
    }

    /// The longest pod name whose sockets still fit a socket address, in bytes.
    pub fn longest_pod_name(&self) -> usize {
        SUN_PATH_MAX.saturating_sub(POD_SOCKET_EXTRA + self.state_dir.as_os_str().len())
    }

    /// The API's socket.
    pub fn api_socket(&self) -> PathBuf {
        self.api_socket
            .clone()
            .unwrap_or_else(|| self.state_dir.join("api.sock"))
    }

    /// What other nodes connect to.
    pub fn advertised(&self) -> SocketAddr {
        self.advertise.unwrap_or(self.listen)
    }
}

#[cfg(test)]
mod tests;
