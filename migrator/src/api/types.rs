//! What the API's JSON looks like: shared by the service and the command line.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use crate::memory::compress::Compress;
use crate::migration::mode::{ImagesMode, Mode, OnStall};
use crate::network::{OnOverflow, PodNetworks, TunnelInfo, UplinkPath};
use serde::{Deserialize, Serialize};
use vm_runtime::pod::PodSpec;
use vm_runtime::spec::{Accel, VmSpec};
use vm_runtime::units::{Epoch, MacAddress};

pub use super::container_types::{ContainerCondition, ContainerState, ContainerStatus};
use crate::pods::logs::LogStream;

/// `GET /v1/health`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Health {
    /// `ok`: the service answers.
    pub status: String,
    /// The node's name.
    pub node: String,
    /// The service's version.
    pub version: String,
}

/// `GET /v1/node`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeInfo {
    /// The node's name.
    pub name: String,
    /// The service's version.
    pub version: String,
    /// The service's process.
    pub pid: u32,
    /// Its state folder.
    pub state_dir: PathBuf,
    /// The bridge; none where pods are routed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
    /// The networks of all pods of the cluster, where pods are routed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub routed: Option<PodNetworks>,
    /// The device towards the other nodes.
    pub uplink: String,
    /// The way from there to a pod.
    pub uplink_path: UplinkPath,
    /// Where other nodes connect.
    pub advertise: SocketAddr,
    /// The other nodes.
    pub peers: BTreeMap<String, SocketAddr>,
    /// The VMM.
    pub qemu: QemuInfo,
    /// What runs guests.
    pub accel: Accel,
    /// Why that one.
    pub accel_reason: String,
    /// What late frames of departed pods go through.
    pub tunnel: TunnelInfo,
    /// Pods on this node.
    pub pods: usize,
}

/// The VMM of a node, or of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuInfo {
    /// The program.
    pub path: PathBuf,
    /// Its version.
    pub version: String,
    /// The machine type that new pods get, or that the pod has.
    pub machine: String,
}

/// Where a pod is in its life on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PodState {
    /// The VM boots, or its containers start.
    Starting,
    /// The guest runs here.
    Running,
    /// The guest runs here, or stands still, and is on its way to another node.
    Migrating,
    /// The migration's grant was sent and not answered: it stands still here until that is known.
    InDoubt,
    /// The guest runs here, or stands still, and gets another VMM.
    Upgrading,
    /// Containers are being stopped.
    Stopping,
    /// The VM is gone; see the reason. `stop` removes what is left.
    Failed,
}

impl PodState {
    /// The state's name as JSON and tables show it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Migrating => "migrating",
            Self::InDoubt => "in_doubt",
            Self::Upgrading => "upgrading",
            Self::Stopping => "stopping",
            Self::Failed => "failed",
        }
    }
}

/// One pod in a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodSummary {
    /// Its name.
    pub name: String,
    /// The node that answers.
    pub node: String,
    /// Where it is.
    pub state: PodState,
    /// Why, where the state has a reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Its containers.
    pub containers: Vec<ContainerStatus>,
    /// MAC address.
    pub mac: MacAddress,
    /// IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
    /// Guest RAM in bytes.
    pub memory_bytes: u64,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// When it was first run, milliseconds of Unix time; a migration does not change it.
    pub created_unix_ms: u64,
    /// The right by which this node runs it.
    pub epoch: Epoch,
    /// The migration that it is in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<String>,
}

/// One pod in full.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodDetail {
    /// What lists show.
    #[serde(flatten)]
    pub summary: PodSummary,
    /// What was asked for.
    pub spec: PodSpec,
    /// Its VM.
    pub vm: VmSpec,
    /// The VMM's process; absent if there is none.
    pub vmm_pid: Option<u32>,
    /// What runs it: the node's VMM of when it began here, or of its last upgrade; absent if nothing does.
    pub qemu: Option<QemuInfo>,
    /// Its folder, with console, VMM log and sockets.
    pub dir: PathBuf,
    /// Its slot on this node, which names its links.
    pub slot: u16,
    /// Its disks that can be written, while it has a VM.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskInfo>,
    /// Its images, while it has a VM.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub images: Vec<ImageInfo>,
}

/// An image that a pod reads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Bytes of it that are on the node; the rest is fetched.
    pub here_bytes: u64,
    /// Chunks that the pod waits for.
    pub waiting: usize,
    /// Why one of them does not come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// A disk of a pod that can be written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskInfo {
    /// `root`, or the name of the pod's volume.
    pub name: String,
    /// The named volume that it is; absent if it ends with the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<String>,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// What it takes on the node, in bytes; of a Ceph image, `GET /v1/volumes` tells.
    pub allocated_bytes: u64,
    /// Its storage class, if that is a shared one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<String>,
}

/// The body of `POST /v1/volumes`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeRequest {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Its storage class; `local` if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<String>,
}

/// The body of `POST /v1/volumes/{name}/release`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReleaseRequest {
    /// Also from a pod of another node, which must not run any more.
    pub force: bool,
}

/// A named volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeInfo {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// What it takes on the node, in bytes.
    pub allocated_bytes: u64,
    /// The pod that uses it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_by: Option<String>,
    /// Its storage class.
    #[serde(default = "local_class")]
    pub class: String,
    /// The node of the pod that uses it, where that can be another one: in a shared class.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Whether it ends with its pod.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ephemeral: bool,
}

fn local_class() -> String {
    crate::config::LOCAL_CLASS.to_owned()
}

/// `GET /v1/volumes`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VolumeList {
    /// By name.
    pub volumes: Vec<VolumeInfo>,
    /// Which storage classes could not be asked, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
}

/// `GET /v1/pods`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PodList {
    /// By name.
    pub pods: Vec<PodSummary>,
}

/// What a container is asked to run: the body of `POST /v1/pods/NAME/exec`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    /// The container; the pod's first if absent.
    #[serde(default)]
    pub container: Option<String>,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Added to the container's environment.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// Give it a terminal of this size.
    #[serde(default)]
    pub tty: Option<TtySize>,
    /// Whether stdin will be sent; without, it is empty.
    #[serde(default)]
    pub stdin: bool,
}

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TtySize {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// One line of the answer to `exec` without an upgrade.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum ExecEvent {
    /// Something was printed.
    Output {
        /// Where.
        stream: LogStream,
        /// What; bytes that are not UTF-8 are replaced.
        text: String,
    },
    /// The command ended; the last line.
    Exited {
        /// Exit code; 128 + signal if a signal ended it.
        code: i32,
    },
    /// The command could not be run or followed; the last line.
    Failed {
        /// Why.
        error: ErrorInfo,
    },
}

/// One line of `logs` in JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// Whose.
    pub container: String,
    /// Where it was printed.
    pub stream: LogStream,
    /// Offset of its first byte in that stream.
    pub offset: u64,
    /// When the node stored it, milliseconds of Unix time.
    pub unix_ms: u64,
    /// The text; bytes that are not UTF-8 are replaced. It may hold several lines, or a part of one.
    pub text: String,
}

/// Body of `POST /v1/pods/NAME/migrate`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    /// The destination's name, one of the node's peers.
    pub to: String,
    /// How.
    #[serde(default)]
    pub options: MigrateOptions,
}

/// How a migration is to go. What is absent comes from the node's configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MigrateOptions {
    /// Compare every page of the frozen source with the destination's by hash before the grant.
    pub verify: bool,
    /// Freeze only when the predicted downtime is at most this, in milliseconds.
    pub max_downtime_ms: Option<u32>,
    /// When the memory crosses; `auto` if absent.
    pub mode: Option<Mode>,
    /// What is done when pre-copy does not get on; `throttle` if absent.
    pub on_stall: Option<OnStall>,
    /// Data connections, 1 to 64.
    pub connections: Option<u8>,
    /// Bytes a second that memory may take on the wire while the guest runs.
    pub bandwidth: Option<std::num::NonZeroU64>,
    /// What pages are compressed with.
    pub compress: Option<Compress>,
    /// What is done when more packets come than may be kept.
    pub on_overflow: Option<OnOverflow>,
    /// When images cross that the destination lacks; `demand` if absent.
    pub images: Option<ImagesMode>,
}

/// Answer of `POST /v1/pods/NAME/migrate`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationStarted {
    /// 32 hex digits.
    pub id: String,
}

/// `GET /v1/migrations`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MigrationList {
    /// Oldest first.
    pub migrations: Vec<crate::migration::status::MigrationStatus>,
}

/// Body of every answer that is not a success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorInfo,
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorInfo {
    /// For programs; does not change between versions.
    pub code: ErrorCode,
    /// For people: what failed and why.
    pub message: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// Kinds of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request is not well-formed or asks for something impossible. HTTP 400.
    Invalid,
    /// No such pod, container, image, migration or node. HTTP 404.
    NotFound,
    /// A name or address is taken, or an image in use. HTTP 409.
    Conflict,
    /// The pod is in a state that does not allow this now. HTTP 409.
    Busy,
    /// The destination refused the pod, or another QEMU did. HTTP 409.
    Refused,
    /// Not enough memory, disk or slots. HTTP 507.
    Exhausted,
    /// The service is shutting down. HTTP 503.
    Unavailable,
    /// A registry cannot be reached, breaks off, or sends what it must not. HTTP 502.
    Registry,
    /// It took too long. HTTP 504.
    Timeout,
    /// Anything else; the service's log has more. HTTP 500.
    Internal,
}

impl ErrorCode {
    /// The HTTP status that carries it.
    pub fn http_status(self) -> u16 {
        match self {
            Self::Invalid => 400,
            Self::NotFound => 404,
            Self::Conflict | Self::Busy | Self::Refused => 409,
            Self::Internal => 500,
            Self::Registry => 502,
            Self::Unavailable => 503,
            Self::Timeout => 504,
            Self::Exhausted => 507,
        }
    }
}
