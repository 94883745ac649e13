//! What can fail, one type an operation.

use std::io;
use std::path::PathBuf;

/// The kernel refused a change to a link, a bridge port, a forwarding entry, a route or a neighbour.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// There is no such link.
    #[error(
        "there is no link `{0}` in this network namespace: create it, or correct the node's configuration"
    )]
    Missing(String),
    /// The request failed.
    #[error("could not {action} `{link}`: is this service root in its network namespace?")]
    Refused {
        /// What was tried.
        action: &'static str,
        /// On which link.
        link: String,
        /// The kernel's answer.
        source: Box<rtnetlink::Error>,
    },
}

impl NetlinkError {
    pub(crate) fn new(action: &'static str, link: &str, source: rtnetlink::Error) -> Self {
        Self::Refused {
            action,
            link: link.to_owned(),
            source: Box::new(source),
        }
    }
}

/// The programs or their maps could not be brought up.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    /// The BPF file system could not be mounted.
    #[error("could not mount a BPF file system on {}: the service needs root (CAP_SYS_ADMIN)", path.display())]
    Mount {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Loading failed.
    #[error(
        "could not load the network programs: this needs Linux 6.6 with tcx, and root (CAP_BPF, CAP_NET_ADMIN); `migrator doctor` tells more"
    )]
    Load(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A program or map is not in the object, or not of the kind it should be.
    #[error(
        "the network programs lack `{0}`: this binary was built from mismatched sources; build it again"
    )]
    Mismatch(&'static str),
    /// A map could not be mapped, read or written.
    #[error("could not access the map `{map}`; if an older version of the service pinned it, remove the folder {} while no pod runs", dir.display())]
    Map {
        /// Which.
        map: &'static str,
        /// The folder of the pins.
        dir: PathBuf,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A program could not be attached to a device, or its link not be pinned.
    #[error("could not attach `{program}` to `{device}`")]
    Attach {
        /// Which program.
        program: &'static str,
        /// To which device.
        device: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A pin could not be removed.
    #[error("could not remove the pin {}", path.display())]
    Unpin {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Why a node cannot be a router for its pods.
#[derive(Debug, thiserror::Error)]
pub enum GroundError {
    /// Pods' packets have no way to the other nodes.
    #[error(
        "pods are routed, and the tunnel that leads to the other nodes could not be set up: the log says why"
    )]
    NoTunnel,
    /// What pods send would not get through the tunnel.
    #[error(
        "packets of pods are up to {mtu} bytes long, and need an uplink of {needs} with what the tunnel adds, and `{uplink}` takes {has}: set `tunnel.mtu` to at most {has} less 50 (70 if nodes reach each other by IPv6) on every node, or raise the MTU of `{uplink}`"
    )]
    TooNarrow {
        /// The pods'.
        mtu: u32,
        /// With the tunnel's own bytes.
        needs: u32,
        /// The uplink.
        uplink: String,
        /// The uplink's.
        has: u32,
    },
    /// A setting of the kernel.
    #[error(
        "could not set `{setting}`, which is needed for {why}: set it before the service starts, if it may not"
    )]
    Setting {
        /// As `sysctl` takes it.
        setting: String,
        /// What for.
        why: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A link, a route or a neighbour.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
}

/// Why [`NodeNetwork::open`](super::NodeNetwork::open) failed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No rtnetlink socket.
    #[error("could not open an rtnetlink socket")]
    Socket(#[source] io::Error),
    /// The bridge or the uplink.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The programs.
    #[error(transparent)]
    Gate(#[from] GateError),
    /// What pods' TAPs are put on.
    #[error(transparent)]
    Ground(#[from] GroundError),
}

/// Why [`NodeNetwork::attach`](super::NodeNetwork::attach) failed. Devices it made are gone again.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The slot is beyond what the maps hold.
    #[error(
        "slot {slot} is beyond the {} that a node has",
        migrator_ebpf::MAX_SLOTS
    )]
    BadSlot {
        /// The slot.
        slot: u16,
    },
    /// A descriptor of the pod's devices could not be made or asked.
    #[error("could not {action} `{device}`: it may still be held by a VMM that was left behind")]
    Device {
        /// What was tried.
        action: &'static str,
        /// On which device.
        device: String,
        /// Why.
        source: io::Error,
    },
    /// A link could not be configured.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The gate could not be put in place.
    #[error(transparent)]
    Gate(#[from] GateError),
    /// The TAP could not be put on the node's network.
    #[error(transparent)]
    Ground(#[from] GroundError),
}

/// Why an operation of a [`Port`](super::Port) failed.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// The port was released or discarded, or its thread has ended.
    #[error("the network port of pod `{0}` is gone")]
    Gone(String),
    /// The operation does not fit the port's state.
    #[error("cannot {operation} while the port is {stage}")]
    WrongStage {
        /// What was asked.
        operation: &'static str,
        /// The state.
        stage: super::Stage,
    },
    /// The kernel offers no grace period: it runs with `nohz_full`.
    #[error(
        "membarrier is not available, so frames in flight cannot be waited for: boot without nohz_full"
    )]
    GracePeriod(#[source] io::Error),
    /// The TAP could not be read.
    #[error("could not read what is left in the TAP of pod `{pod}`")]
    Tap {
        /// Whose.
        pod: String,
        /// Why.
        source: io::Error,
    },
    /// The uplink could not be opened for the announcement.
    #[error("could not send the announcement of pod `{pod}` on `{uplink}`")]
    Announce {
        /// Whose.
        pod: String,
        /// Where.
        uplink: String,
        /// Why.
        source: io::Error,
    },
    /// A link or forwarding entry.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// Counters or pins.
    #[error(transparent)]
    Gate(#[from] GateError),
    /// The kernel's connection tracking.
    #[error(transparent)]
    Conntrack(super::conntrack::ConntrackError),
}
