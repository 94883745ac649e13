//! What holds for every [`PodSpec`], wherever it came from.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use super::yaml::invalid;
use super::{ContainerSpec, PodError, PodNet, PodSpec};
use super::{storage, surroundings};
use crate::units::Bytes;

/// Longest name: RFC 1123 labels, and Kubernetes names that become host names, have 63 characters.
const MAX_LABEL: usize = 63;

/// Most containers of a pod: each has a virtio-blk device, and q35's root bus has 32 slots.
const MAX_CONTAINERS: usize = 16;

/// Least guest RAM that boots with room to live.
const MIN_MEMORY: Bytes = Bytes::mib(128);

/// Most guest RAM.
const MAX_MEMORY: Bytes = Bytes::mib(1 << 20);

/// Most virtual CPUs.
const MAX_VCPUS: u32 = 64;

/// Longest reference of an image, in bytes.
const MAX_IMAGE: usize = 700;

/// Longest command line and environment, in bytes each: what execve takes (ARG_MAX, 128 KiB, at the least).
const MAX_ARGS: usize = 128 << 10;

pub(super) fn pod(pod: &PodSpec) -> Result<(), PodError> {
    label("metadata.name", &pod.name)?;
    for (key, value) in &pod.labels {
        let path = "metadata.labels";
        text(path, key, 317)?;
        text(path, value, MAX_LABEL)?;
    }
    net(&pod.net)?;
    let path = "metadata.annotations[\"migrator/vm-memory\"]";
    if pod.memory < MIN_MEMORY || pod.memory > MAX_MEMORY {
        let problem = format!(
            "guest RAM of {} is not between {MIN_MEMORY} and {MAX_MEMORY}",
            pod.memory
        );
        return invalid(path, problem);
    }
    if pod.vcpus == 0 || pod.vcpus > MAX_VCPUS {
        return invalid(
            "spec.containers",
            format!(
                "the cpu limits add up to {} CPUs; 1 to {MAX_VCPUS} are possible",
                pod.vcpus
            ),
        );
    }
    if pod.containers.is_empty() || pod.containers.len() > MAX_CONTAINERS {
        return invalid(
            "spec.containers",
            format!("a pod has 1 to {MAX_CONTAINERS} containers"),
        );
    }
    storage::check(pod)?;
    if let Some(class) = &pod.storage_class {
        label("metadata.annotations[\"migrator/storage-class\"]", class)?;
    }
    surroundings::check(pod)?;
    let mut names = BTreeSet::new();
    for (index, spec) in pod.containers.iter().enumerate() {
        let path = format!("spec.containers[{index}]");
        container(&path, spec)?;
        if !names.insert(&spec.name) {
            let problem = format!("`{}` is the name of another container too", spec.name);
            return invalid(&format!("{path}.name"), problem);
        }
    }
    Ok(())
}

/// RFC 1123: lower-case letters, digits and `-`, neither first nor last a `-`.
pub(super) fn label(path: &str, name: &str) -> Result<(), PodError> {
    let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    let fine = !name.is_empty()
        && name.len() <= MAX_LABEL
        && name.bytes().all(inner)
        && !name.starts_with('-')
        && !name.ends_with('-');
    if fine {
        return Ok(());
    }
    let shown: String = name.chars().take(MAX_LABEL).collect();
    invalid(
        path,
        format!(
            "`{shown}` is not a name: use up to 63 of a-z, 0-9 and `-`, beginning and ending with a letter or digit"
        ),
    )
}

pub(super) fn text(path: &str, text: &str, max: usize) -> Result<(), PodError> {
    if text.len() > max {
        return invalid(path, format!("longer than {max} bytes"));
    }
    if text.chars().any(char::is_control) {
        return invalid(path, "has a control character in it");
    }
    Ok(())
}

fn container(path: &str, container: &ContainerSpec) -> Result<(), PodError> {
    label(&format!("{path}.name"), &container.name)?;
    let image = format!("{path}.image");
    text(&image, &container.image, MAX_IMAGE)?;
    if container.image.is_empty() || container.image.contains(char::is_whitespace) {
        return invalid(&image, "must be an image's name, such as redis:7");
    }
    for (field, list) in [("command", &container.command), ("args", &container.args)] {
        let list = list.as_deref().unwrap_or_default();
        bounded(&format!("{path}.{field}"), list.iter())?;
    }
    let env = format!("{path}.env");
    bounded(
        &env,
        container.env.iter().flat_map(|(name, value)| [name, value]),
    )?;
    let mut names = BTreeSet::new();
    for (index, (name, _)) in container.env.iter().enumerate() {
        let path = format!("{env}[{index}].name");
        if name.is_empty() || name.contains('=') || name.chars().any(char::is_control) {
            return invalid(&path, "must be a name without `=`");
        }
        if !names.insert(name) {
            return invalid(&path, format!("`{name}` is set twice"));
        }
    }
    if let Some(dir) = &container.working_dir {
        let path = format!("{path}.workingDir");
        text(&path, dir, 4095)?;
        if !dir.starts_with('/') {
            return invalid(&path, "must be absolute: begin it with `/`");
        }
    }
    let limits = format!("{path}.resources.limits");
    if container
        .memory_limit
        .is_some_and(|limit| limit.0 < 4 << 20)
    {
        return invalid(
            &format!("{limits}.memory"),
            "less than 4Mi: no process runs in that; did you mean Mi or Gi?",
        );
    }
    if container.cpu_limit_milli == Some(0) {
        return invalid(&format!("{limits}.cpu"), "must be more than 0");
    }
    Ok(())
}

/// Texts that become arguments or variables: no NUL, and not too long together.
fn bounded<'a>(path: &str, texts: impl Iterator<Item = &'a String>) -> Result<(), PodError> {
    let mut total = 0;
    for text in texts {
        total += text.len() + 1;
        if text.contains('\0') {
            return invalid(path, "has a NUL character in it");
        }
        if total > MAX_ARGS {
            return invalid(path, "longer than 128 KiB");
        }
    }
    Ok(())
}

fn net(net: &PodNet) -> Result<(), PodError> {
    let path = |name: &str| format!("metadata.annotations[\"migrator/{name}\"]");
    if net.mac.0[0] & 1 == 1 || net.mac.0 == [0; 6] {
        return invalid(
            &path("mac"),
            format!("{} is not a unicast address", net.mac),
        );
    }
    if net.ipv4.is_none() && net.ipv6.is_none() {
        return invalid(&path("ipv4"), "a pod needs an IPv4 or an IPv6 address");
    }
    if let Some((address, prefix)) = net.ipv4 {
        ipv4(&path("ipv4"), address, prefix)?;
    }
    if let Some((address, prefix)) = net.ipv6 {
        ipv6(&path("ipv6"), address, prefix)?;
    }
    if let Some(gateway) = net.gateway4 {
        let reachable = net.ipv4.is_some_and(|(address, prefix)| {
            let same = network4(gateway, prefix) == network4(address, prefix);
            gateway != address && (same || gateway.is_link_local())
        });
        if !reachable {
            return invalid(
                &path("gateway4"),
                format!(
                    "{gateway} is not another address in the pod's IPv4 subnet, nor link-local"
                ),
            );
        }
    }
    if let Some(gateway) = net.gateway6 {
        let reachable = net.ipv6.is_some_and(|(address, prefix)| {
            let same = network6(gateway, prefix) == network6(address, prefix);
            gateway != address && (same || gateway.is_unicast_link_local())
        });
        if !reachable {
            return invalid(
                &path("gateway6"),
                format!(
                    "{gateway} is not another address in the pod's IPv6 subnet, nor link-local"
                ),
            );
        }
    }
    Ok(())
}

fn network4(address: Ipv4Addr, prefix: u8) -> u32 {
    u32::from(address)
        .checked_shr(32 - u32::from(prefix))
        .unwrap_or(0)
}

fn network6(address: Ipv6Addr, prefix: u8) -> u128 {
    u128::from(address)
        .checked_shr(128 - u32::from(prefix))
        .unwrap_or(0)
}

fn ipv4(path: &str, address: Ipv4Addr, prefix: u8) -> Result<(), PodError> {
    if prefix == 0 || prefix > 32 {
        return invalid(path, format!("prefix /{prefix} is not between /1 and /32"));
    }
    let host_bits = 32 - u32::from(prefix);
    let mask = if host_bits == 0 {
        0
    } else {
        u32::MAX >> u32::from(prefix)
    };
    let host = u32::from(address) & mask;
    // A /31 and a /32 have neither network nor broadcast address (RFC 3021).
    let reserved = host_bits >= 2 && (host == 0 || host == mask);
    if reserved
        || address.is_unspecified()
        || address.is_loopback()
        || address.is_multicast()
        || address.is_broadcast()
    {
        return invalid(path, format!("{address}/{prefix} is not a host's address"));
    }
    Ok(())
}

fn ipv6(path: &str, address: Ipv6Addr, prefix: u8) -> Result<(), PodError> {
    if prefix == 0 || prefix > 128 {
        return invalid(path, format!("prefix /{prefix} is not between /1 and /128"));
    }
    let mapped = address.to_ipv4_mapped().is_some();
    if mapped
        || address.is_unspecified()
        || address.is_loopback()
        || address.is_multicast()
        || address.is_unicast_link_local()
    {
        return invalid(
            path,
            format!("{address}/{prefix} is not a host's global or unique local address"),
        );
    }
    Ok(())
}
