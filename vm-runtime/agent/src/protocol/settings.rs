//! What containers expect of their surroundings, as a Kubernetes Pod names it. Part of the configuration since version 3.
//!
//! The defaults are what version 2 did: a guest that is told nothing goes on as it was.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// What root in a container may do if nothing else is said: Docker's default set without MKNOD (linux/capability.h).
pub const DEFAULT_CAPABILITIES: u64 = {
    const CHOWN: u64 = 1 << 0;
    const DAC_OVERRIDE: u64 = 1 << 1;
    const FOWNER: u64 = 1 << 3;
    const FSETID: u64 = 1 << 4;
    const KILL: u64 = 1 << 5;
    const SETGID: u64 = 1 << 6;
    const SETUID: u64 = 1 << 7;
    const SETPCAP: u64 = 1 << 8;
    const NET_BIND_SERVICE: u64 = 1 << 10;
    const NET_RAW: u64 = 1 << 13;
    const SYS_CHROOT: u64 = 1 << 18;
    const AUDIT_WRITE: u64 = 1 << 29;
    const SETFCAP: u64 = 1 << 31;
    CHOWN
        | DAC_OVERRIDE
        | FOWNER
        | FSETID
        | KILL
        | SETGID
        | SETUID
        | SETPCAP
        | NET_BIND_SERVICE
        | NET_RAW
        | SYS_CHROOT
        | AUDIT_WRITE
        | SETFCAP
};

/// Of the pod as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodSettings {
    /// Its host name, if not its name.
    pub hostname: Option<String>,
    /// `hostAliases`: lines of /etc/hosts.
    pub hosts: Vec<HostAlias>,
    /// /etc/resolv.conf. `None`: the image's, or what name servers the configuration has.
    pub resolver: Option<Resolver>,
    /// `securityContext.fsGroup`: the group of volumes, and one of each process.
    pub fs_group: Option<u32>,
    /// `terminationGracePeriodSeconds`.
    pub grace_s: Option<u32>,
    /// Volumes in guest memory.
    pub memory_volumes: Vec<MemoryVolume>,
}

/// Names of an address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostAlias {
    /// The address.
    pub ip: IpAddr,
    /// Its names.
    pub names: Vec<String>,
}

/// What /etc/resolv.conf says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Resolver {
    /// Name servers.
    pub servers: Vec<IpAddr>,
    /// Domains to look in.
    pub searches: Vec<String>,
    /// Such as `ndots:5`.
    pub options: Vec<String>,
}

/// A volume in guest memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryVolume {
    /// Its name in the pod.
    pub name: String,
    /// Most bytes. `None`: half of the guest's memory, which is the kernel's rule.
    pub size: Option<u64>,
}

/// Where a container has a volume that is in memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryMount {
    /// The volume.
    pub volume: String,
    /// Where the container finds it; made if absent.
    pub path: String,
    /// Whether it may not write to it.
    pub read_only: bool,
}

/// When a container that has ended is started again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Restart {
    /// Never.
    #[default]
    Never,
    /// If its exit code was not 0.
    OnFailure,
    /// In any case.
    Always,
}

/// Of one container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerSettings {
    /// `restartPolicy` of its pod.
    pub restart: Restart,
    /// `supplementalGroups` of its pod.
    pub groups: Vec<u32>,
    /// `runAsNonRoot`: it is not started as user 0.
    pub non_root: bool,
    /// `capabilities.add`, bit by number.
    pub add_capabilities: u64,
    /// `capabilities.drop`, bit by number.
    pub drop_capabilities: u64,
    /// `allowPrivilegeEscalation: false`: no program that it starts gets more rights than it has.
    pub no_new_privileges: bool,
    /// `readOnlyRootFilesystem`.
    pub read_only_root: bool,
    /// `tty`: its standard streams are a terminal.
    pub tty: bool,
    /// `stdin`: its standard input stays open.
    pub stdin: bool,
    /// Volumes in guest memory.
    pub memory_mounts: Vec<MemoryMount>,
    /// The signal that asks it to end, by number. `None`: SIGTERM.
    pub stop_signal: Option<i32>,
    /// `startupProbe`.
    pub startup: Option<Probe>,
    /// `livenessProbe`.
    pub liveness: Option<Probe>,
    /// `readinessProbe`.
    pub readiness: Option<Probe>,
    /// `lifecycle.preStop.exec.command`: run before the signal that asks it to end.
    pub pre_stop: Option<Vec<String>>,
}

impl ContainerSettings {
    /// The capabilities of its processes, bit by number.
    pub fn capabilities(&self) -> u64 {
        DEFAULT_CAPABILITIES & !self.drop_capabilities | self.add_capabilities
    }
}

/// A check of a container, again and again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// What is checked.
    pub check: Check,
    /// Seconds from the container's start to the first.
    pub initial_delay_s: u32,
    /// Seconds between two.
    pub period_s: u32,
    /// Seconds that one may take.
    pub timeout_s: u32,
    /// So many in a row make a success.
    pub successes: u32,
    /// So many in a row make a failure.
    pub failures: u32,
}

/// What a probe checks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Check {
    /// This command in the container ends with 0.
    Exec(Vec<String>),
    /// Something takes a connection.
    Tcp {
        /// Address; `None`: the guest's own, 127.0.0.1.
        host: Option<IpAddr>,
        /// Port.
        port: u16,
    },
    /// A GET is answered with a status from 200 to 399.
    Http {
        /// Address; `None`: the guest's own, 127.0.0.1.
        host: Option<IpAddr>,
        /// Port.
        port: u16,
        /// Path, such as `/healthz`.
        path: String,
        /// Headers.
        headers: Vec<(String, String)>,
    },
}

/// How a container fares, beyond its state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// Its name.
    pub container: String,
    /// How often it was started again.
    pub restarts: u32,
    /// It runs, and its readiness probe, if it has one, succeeds.
    pub ready: bool,
    /// Why it does not run, or did not the last time.
    pub reason: Option<Reason>,
    /// The exit code of the last time that it ended.
    pub last_code: Option<i32>,
    /// It waits to be started again; for so many milliseconds when this was said.
    pub waits_ms: Option<u64>,
}

/// Why a container ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reason {
    /// It ended with 0.
    Completed,
    /// It ended otherwise.
    Error,
    /// It needed more memory than its limit.
    OomKilled,
    /// Its liveness or startup probe failed.
    Unhealthy,
    /// It could not be started again.
    StartError,
}

impl Reason {
    /// Its name, as Kubernetes has it where it has one.
    pub fn name(self) -> &'static str {
        match self {
            Self::Completed => "Completed",
            Self::Error => "Error",
            Self::OomKilled => "OOMKilled",
            Self::Unhealthy => "Unhealthy",
            Self::StartError => "StartError",
        }
    }
}
