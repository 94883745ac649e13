//! Why something about a pod fails, and what kind of failure that is for a client.

use std::error::Error;
use std::io;
use std::path::PathBuf;

use vm_runtime::units::{Bytes, MacAddress};

use super::disks::PlanError;
use super::upgrade::UpgradeError;
use crate::api::error::{ApiError, chain};
use crate::api::registry_errors::code_of_pull;
use crate::api::types::{ErrorCode, PodState};
use crate::registry::{PullError, RequestError};
use crate::volumes::VolumeError;

/// Any error, as the cause of another.
pub type Cause = Box<dyn Error + Send + Sync>;

/// Why something about a pod fails.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// The YAML is no pod.
    #[error("the pod's YAML is not valid")]
    Spec(#[source] Cause),
    /// Its sockets would not fit a socket address.
    #[error("the pod name `{name}` is too long: at most {limit} bytes with this node's state_dir")]
    NameTooLong {
        /// The name.
        name: String,
        /// The longest that works here.
        limit: usize,
    },
    /// A pod of that name is here.
    #[error("a pod named `{0}` is on this node already")]
    NameTaken(String),
    /// An address of it is another pod's.
    #[error("{what} is taken by pod `{by}` on this node")]
    AddressTaken {
        /// The address.
        what: String,
        /// Whose it is.
        by: String,
    },
    /// In a routed cluster, an address of it is that of a pod of another node.
    #[error("an address of it is taken by the pod {mac} on node {node}")]
    AddressElsewhere {
        /// That pod's MAC address.
        mac: MacAddress,
        /// Its node.
        node: String,
    },
    /// A volume of it is another pod's.
    #[error("volume `{volume}` is used by pod `{by}` on this node")]
    VolumeTaken {
        /// The volume.
        volume: String,
        /// Whose it is.
        by: String,
    },
    /// A volume of it is not here, or cannot be used.
    #[error("pod `{pod}` cannot have its volumes")]
    Volume {
        /// The pod.
        pod: String,
        /// Why not.
        #[source]
        source: Box<PlanError>,
    },
    /// No slot is free.
    #[error("this node holds {0} pods already, as many as its configuration allows")]
    TooMany(u16),
    /// An image is not here.
    #[error("container `{container}`: image `{image}` is not on this node")]
    NoImage {
        /// The container.
        container: String,
        /// The image's reference.
        image: String,
    },
    /// An image is not here, and does not come.
    #[error("container `{container}`: image `{image}` is not on this node, and cannot be pulled")]
    Pull {
        /// The container.
        container: String,
        /// The image's reference.
        image: String,
        /// Why.
        #[source]
        source: Box<PullError>,
    },
    /// The image store fails.
    #[error("container `{container}`: image `{image}` cannot be used")]
    Image {
        /// The container.
        container: String,
        /// The image's reference.
        image: String,
        /// Why.
        #[source]
        source: Cause,
    },
    /// Pod and image together do not say what to run, or make no VM.
    #[error("pod `{pod}` cannot be run as it is described")]
    Plan {
        /// The pod.
        pod: String,
        /// Why.
        #[source]
        source: Cause,
    },
    /// Not enough memory.
    #[error("pod `{pod}` needs {need} of memory and this node has {available} available")]
    Memory {
        /// The pod.
        pod: String,
        /// Guest RAM and the VMM's own.
        need: Bytes,
        /// `MemAvailable`.
        available: Bytes,
    },
    /// Not enough huge pages.
    #[error("pod `{pod}` needs {need} of huge pages and this node has {available} available")]
    HugePages {
        /// The pod.
        pod: String,
        /// Guest RAM.
        need: Bytes,
        /// Those that nobody has or has reserved.
        available: Bytes,
    },
    /// No such pod.
    #[error("there is no pod `{0}` on this node")]
    NotFound(String),
    /// No such container.
    #[error("pod `{pod}` has no container `{container}`")]
    NoContainer {
        /// The pod.
        pod: String,
        /// The name asked for.
        container: String,
    },
    /// The state it is in does not allow this.
    #[error("pod `{pod}` is {}: cannot {verb} it now", state.as_str())]
    Busy {
        /// The pod.
        pod: String,
        /// Where it is.
        state: PodState,
        /// What was asked.
        verb: &'static str,
    },
    /// Its VMM was not replaced.
    #[error("pod `{pod}` was not upgraded, and goes on as it was")]
    NotUpgraded {
        /// The pod.
        pod: String,
        /// Why not.
        #[source]
        source: UpgradeError,
    },
    /// A step of starting, stopping or finding it again failed.
    #[error("pod `{pod}`: cannot {step}")]
    Step {
        /// The pod.
        pod: String,
        /// What was tried.
        step: &'static str,
        /// Why not.
        #[source]
        source: Cause,
    },
    /// The right to run it is not this node's.
    #[error("pod `{0}` cannot be started here: this node has no right to run it")]
    NotOwned(String),
    /// Its VM had another kernel than the node's.
    #[error(
        "pod `{0}` cannot be started again: its guest had another kernel or initramfs than this node boots now"
    )]
    OtherGuest(String),
    /// The VM ended while something was being done with it.
    #[error("pod `{pod}`: its VM ended: {reason}")]
    Died {
        /// The pod.
        pod: String,
        /// The VMM's and the guest's last words.
        reason: String,
    },
    /// Its containers did not start in time.
    #[error("pod `{pod}`: its containers did not start within {seconds} s")]
    Slow {
        /// The pod.
        pod: String,
        /// The deadline.
        seconds: u64,
        /// The console's end.
        console: String,
    },
    /// The guest's agent has not answered yet.
    #[error("pod `{0}`: the agent in its guest has not answered yet")]
    NoAgent(String),
    /// Its files cannot be read or written.
    #[error("cannot {verb} {}", path.display())]
    State {
        /// What was being done.
        verb: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The service is being stopped.
    #[error("the service is shutting down")]
    ShuttingDown,
}

impl PodError {
    /// A step that failed.
    pub fn step(pod: &str, step: &'static str, source: impl Into<Cause>) -> Self {
        Self::Step {
            pod: pod.to_owned(),
            step,
            source: source.into(),
        }
    }

    pub(super) fn code(&self) -> ErrorCode {
        match self {
            Self::Spec(_) | Self::NameTooLong { .. } | Self::Plan { .. } => ErrorCode::Invalid,
            Self::NameTaken(_)
            | Self::AddressTaken { .. }
            | Self::AddressElsewhere { .. }
            | Self::VolumeTaken { .. } => ErrorCode::Conflict,
            Self::Volume { source, .. } => match **source {
                PlanError::Volume(VolumeError::NotFound(_)) => ErrorCode::NotFound,
                PlanError::Volume(_) => ErrorCode::Internal,
                PlanError::Storage(_) => ErrorCode::Refused,
            },
            Self::TooMany(_) | Self::Memory { .. } | Self::HugePages { .. } => ErrorCode::Exhausted,
            Self::NoImage { .. } | Self::NotFound(_) | Self::NoContainer { .. } => {
                ErrorCode::NotFound
            }
            Self::Pull { source, .. } => code_of_pull(source),
            Self::Busy { .. } | Self::NoAgent(_) => ErrorCode::Busy,
            Self::NotOwned(_) | Self::OtherGuest(_) => ErrorCode::Refused,
            Self::Slow { .. } => ErrorCode::Timeout,
            Self::NotUpgraded { source, .. } => source.code(),
            Self::ShuttingDown => ErrorCode::Unavailable,
            Self::Image { .. } | Self::Step { .. } | Self::Died { .. } | Self::State { .. } => {
                ErrorCode::Internal
            }
        }
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NoImage { image, .. } => format!(
                "`migrator image pull {image}` fetches it from its registry, `migrator image import PATH` takes one from a file, \
                 `migrator image ls` lists those here"
            ),
            Self::Pull { source, .. } => {
                return source.request().and_then(RequestError::hint).map(str::to_owned);
            }
            Self::Busy {
                state: PodState::InDoubt,
                ..
            } => "it was handed over to another node, which has not answered yet: `migrator status` tells which; start the service there".to_owned(),
            Self::NotFound(_) => {
                "`migrator ps` lists the pods of this node; it may have moved to another".to_owned()
            }
            Self::NameTaken(name) => {
                format!("give it another name, or remove the other with `migrator stop {name}`")
            }
            Self::AddressTaken { .. } => {
                "give the pod another address in its annotations".to_owned()
            }
            Self::AddressElsewhere { node, .. } => format!(
                "give the pod another address in its annotations, or stop the other one on {node}"
            ),
            Self::VolumeTaken { .. } => {
                "a volume is one pod's at a time: stop the other, or claim another volume".to_owned()
            }
            Self::Volume { source, .. } if matches!(**source, PlanError::Storage(_)) => {
                return None;
            }
            Self::Volume { .. } => {
                "`migrator volume ls` lists those of this node, `migrator volume create NAME --size SIZE` makes one".to_owned()
            }
            Self::TooMany(_) => "stop a pod, or raise limits.pods".to_owned(),
            Self::Memory { .. } => {
                "stop something, or lower the containers' memory limits".to_owned()
            }
            Self::HugePages { .. } => {
                "raise vm.nr_hugepages (`sysctl`), or leave the annotation `migrator/hugepages` out"
                    .to_owned()
            }
            Self::NotOwned(_) => {
                "`migrator status` tells where it went, if it did; one that never ran is removed by `stop`, and run anew".to_owned()
            }
            Self::OtherGuest(_) => {
                "name the one that it had in `guest` of the node's configuration; or keep what its disks have \
                 (docs/storage.md says how), stop it, and run it anew"
                    .to_owned()
            }
            Self::NoAgent(_) => "try again in a moment; its console is in its folder".to_owned(),
            Self::Slow { console, .. } if !console.is_empty() => {
                format!("its console ends with: {console}")
            }
            Self::Slow { .. } | Self::Step { .. } | Self::Died { .. } => {
                "the service's log has more".to_owned()
            }
            Self::Spec(_)
            | Self::NameTooLong { .. }
            | Self::Image { .. }
            | Self::Plan { .. }
            | Self::NoContainer { .. }
            | Self::Busy { .. }
            | Self::NotUpgraded { .. }
            | Self::State { .. }
            | Self::ShuttingDown => return None,
        })
    }
}

impl From<PodError> for ApiError {
    fn from(error: PodError) -> Self {
        let answer = Self::new(error.code(), chain(&error));
        match error.hint() {
            Some(hint) => answer.hint(hint),
            None => answer,
        }
    }
}
