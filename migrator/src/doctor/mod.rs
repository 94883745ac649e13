//! What the kernel and the machine must have, whether they do, and how to get what is missing.
//!
//! Nothing is concluded from a version or a file's presence where it can be tried: probes make the
//! very system call that a migration makes. Those that touch the network or mounts run in namespaces
//! of their own, and none leaves anything behind.

mod kernel;
mod machine;
mod sandbox;
mod storage;
mod sys;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vm_runtime::spec::AccelChoice;
use vm_runtime::units::Bytes;

use crate::config::{Config, QemuConfig, TlsPaths};
use crate::network::{Ground, Setting, TunnelInfo, UplinkPath, XdpChoice, routing_settings};

/// What is examined, beside the kernel and the machine.
#[derive(Clone, Debug, Default)]
pub struct Subject {
    qemu: QemuConfig,
    guest: Option<(PathBuf, PathBuf)>,
    tls: Option<TlsPaths>,
    links: Option<(Option<String>, String)>,
    routed: Vec<Setting>,
    state_dir: Option<PathBuf>,
    storage: Option<(crate::config::Storage, String)>,
}

impl Subject {
    /// Everything that a node's configuration names.
    pub fn of_config(config: &Config) -> Self {
        Self {
            qemu: config.qemu.clone(),
            guest: Some((config.guest.kernel.clone(), config.guest.initramfs.clone())),
            tls: Some(config.tls.clone()),
            links: Some((
                config.ground().bridge().map(str::to_owned),
                config.uplink.as_str().to_owned(),
            )),
            routed: match config.ground() {
                Ground::Bridge(_) => Vec::new(),
                Ground::Routed(pods) => routing_settings(config.uplink.as_str(), pods.has_ipv6()),
            },
            state_dir: Some(config.state_dir.clone()),
            storage: Some((config.storage.clone(), config.name.to_string())),
        }
    }

    fn accel(&self) -> AccelChoice {
        self.qemu.accel
    }
}

/// The answer of `doctor`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Whether everything that is required is there.
    pub ok: bool,
    /// One entry a requirement.
    pub checks: Vec<Check>,
}

/// One requirement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// Its short name; does not change between versions.
    pub name: String,
    /// Whether migrator works without it.
    pub required: bool,
    /// What it is for.
    pub purpose: String,
    /// What was found.
    #[serde(flatten)]
    pub result: CheckResult,
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "status")]
pub enum CheckResult {
    /// It is there.
    Ok {
        /// What exactly.
        found: String,
    },
    /// It is not there, or does not work.
    Missing {
        /// What happened when it was tried.
        why: String,
        /// How to get it.
        remedy: String,
    },
}

impl CheckResult {
    /// Whether it is there.
    pub fn is_ok(&self) -> bool {
        match self {
            Self::Ok { .. } => true,
            Self::Missing { .. } => false,
        }
    }
}

/// Tries everything. Takes a few seconds where a KVM probe boots.
pub async fn examine(subject: &Subject) -> Report {
    let mut checks = vec![kernel::version()];
    checks.extend(kernel::memory_checks());
    checks.push(kernel::capabilities());
    checks.push(kernel::ptrace());
    // Namespaces belong to threads, so these have one of their own that ends with its namespaces.
    match tokio::task::spawn_blocking(sandbox::checks).await {
        Ok(found) => checks.extend(found),
        Err(error) => checks.push(missing(
            "sandbox",
            true,
            "trying network features without touching the machine's network",
            error.to_string(),
            "report this: the probe itself failed",
        )),
    }
    checks.push(machine::ram());
    checks.push(machine::erofs());
    checks.push(machine::mke2fs());
    checks.extend(machine::qemu(subject).await);
    checks.extend(machine::configured(subject));
    checks.extend(storage::checks(subject).await);
    Report {
        ok: checks.iter().all(|c| c.result.is_ok() || !c.required),
        checks,
    }
}

/// The way that the running service's frames take from the uplink to a pod.
pub fn uplink(name: &str, choice: XdpChoice, path: &UplinkPath) -> Check {
    let (check, purpose) = (
        "uplink_xdp",
        "small packets straight from the uplink to the guest",
    );
    match (path, choice) {
        (UplinkPath::Xdp, _) => present(check, false, purpose, format!("native XDP on {name}")),
        (UplinkPath::Bridge { why } | UplinkPath::Routes { why }, XdpChoice::Off) => {
            present(check, false, purpose, why.clone())
        }
        (UplinkPath::Routes { why }, XdpChoice::Auto | XdpChoice::On) => missing(
            check,
            false,
            purpose,
            why.clone(),
            "all goes by the kernel's routes, which is right and slower; `xdp: off` in the configuration silences this",
        ),
        (UplinkPath::Bridge { why }, XdpChoice::Auto | XdpChoice::On) => missing(
            check,
            false,
            purpose,
            why.clone(),
            "all goes by the bridge, which is right and slower; once the reason is gone, start the service again; `xdp: off` in the configuration silences this",
        ),
    }
}

/// The way that small late frames of pods that have left the running service's node take to the other one.
pub fn late_frames(tunnel: &TunnelInfo) -> Check {
    let (check, purpose) = (
        "tunnel_xdp",
        "small late packets of a pod that has left, sent on straight from the uplink",
    );
    match &tunnel.xdp_problem {
        _ if tunnel.device.is_none() => present(
            check,
            false,
            purpose,
            "this node has no tunnel to send them by",
        ),
        None => present(check, false, purpose, "native XDP"),
        Some(why) => missing(
            check,
            false,
            purpose,
            why.clone(),
            "they go by the bridge and the kernel's tunnel, which is right and slower",
        ),
    }
}

/// Names of the kernel features that tracking a guest's memory needs and this kernel lacks; each is really tried.
pub fn missing_kernel_features() -> Vec<String> {
    kernel::memory_checks()
        .into_iter()
        .filter(|check| check.required && !check.result.is_ok())
        .map(|check| check.name)
        .collect()
}

/// Memory that a new guest can have: `MemAvailable`; 0 if the kernel does not say.
pub fn available_memory() -> Bytes {
    machine::available()
}

/// What is free on the file system of a folder; 0 if it does not say.
pub fn available_disk(dir: &std::path::Path) -> Bytes {
    nix::sys::statvfs::statvfs(dir).map_or(Bytes(0), |stat| {
        Bytes(stat.blocks_available() * stat.fragment_size())
    })
}

fn present(name: &str, required: bool, purpose: &str, found: impl Into<String>) -> Check {
    Check {
        name: name.to_owned(),
        required,
        purpose: purpose.to_owned(),
        result: CheckResult::Ok {
            found: found.into(),
        },
    }
}

fn missing(
    name: &str,
    required: bool,
    purpose: &str,
    why: impl Into<String>,
    remedy: impl Into<String>,
) -> Check {
    Check {
        name: name.to_owned(),
        required,
        purpose: purpose.to_owned(),
        result: CheckResult::Missing {
            why: why.into(),
            remedy: remedy.into(),
        },
    }
}

/// A requirement that was tried: the error says why it is missing.
fn tried(
    name: &str,
    purpose: &str,
    result: std::io::Result<()>,
    found: &str,
    remedy: &str,
) -> Check {
    match result {
        Ok(()) => present(name, true, purpose, found),
        Err(error) => missing(name, true, purpose, error.to_string(), remedy),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_reads_well_in_json() {
        let check = missing(
            "tun",
            true,
            "guests' network",
            "no such device",
            "CONFIG_TUN",
        );
        let json = serde_json::to_value(&check).unwrap();
        assert_eq!(json["status"], "missing");
        assert_eq!(json["remedy"], "CONFIG_TUN");
        assert_eq!(serde_json::from_value::<Check>(json).unwrap(), check);
    }
}
