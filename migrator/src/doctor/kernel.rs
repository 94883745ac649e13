//! What the kernel must have, tried on this process.

use super::{Check, missing, present, sys, tried};

/// The first kernel with `PAGEMAP_SCAN` and `UFFD_FEATURE_WP_ASYNC`.
const OLDEST: (u32, u32) = (6, 7);

const NEWER: &str =
    "boot Linux 6.7 or later; Debian 12 has one as linux-image-amd64 in bookworm-backports";

/// Capabilities by their bit in `CapEff` (linux/capability.h), and what each is for.
const CAPABILITIES: [(u32, &str, &str); 6] = [
    (12, "CAP_NET_ADMIN", "bridges, TAPs, attaching programs"),
    (13, "CAP_NET_RAW", "packet sockets"),
    (19, "CAP_SYS_PTRACE", "taking descriptors from the VMM"),
    (21, "CAP_SYS_ADMIN", "mounting bpffs, namespaces"),
    (38, "CAP_PERFMON", "programs that read packets by pointers"),
    (39, "CAP_BPF", "loading programs"),
];

pub(super) fn version() -> Check {
    let purpose = "dirty tracking outside the VMM";
    let release = nix::sys::utsname::uname()
        .ok()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    match parse(&release) {
        Some(version) if version >= OLDEST => present("kernel", true, purpose, release),
        Some(_) | None => missing(
            "kernel",
            true,
            purpose,
            format!(
                "this is Linux {release}, older than {}.{}",
                OLDEST.0, OLDEST.1
            ),
            NEWER,
        ),
    }
}

fn parse(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

pub(super) fn memory_checks() -> Vec<Check> {
    vec![
        tried(
            "userfaultfd",
            "tracking the pages that a guest writes",
            sys::userfaultfd_wp_async(),
            "with asynchronous write protection",
            "a kernel from 6.7 on with CONFIG_USERFAULTFD and CONFIG_PTE_MARKER_UFFD_WP; root, or vm.unprivileged_userfaultfd=1",
        ),
        tried(
            "pagemap_scan",
            "reading and clearing the written pages in one call",
            sys::pagemap_scan(),
            "answers",
            NEWER,
        ),
        tried(
            "memfd",
            "guest memory that outlives the service",
            memfd(),
            "made one",
            "a kernel with CONFIG_MEMFD_CREATE",
        ),
        tried(
            "pidfd_getfd",
            "getting a running guest's descriptors back after a restart of the service",
            sys::pidfd_getfd(),
            "copied a descriptor",
            "Linux 5.6 or later; in a container, a seccomp profile that allows pidfd_getfd",
        ),
    ]
}

fn memfd() -> std::io::Result<()> {
    nix::sys::memfd::memfd_create(c"doctor", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
        .map(drop)
        .map_err(Into::into)
}

pub(super) fn capabilities() -> Check {
    let purpose = "networking, programs in the kernel, the VMM's descriptors";
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = effective(&status).unwrap_or(0);
    let lacking: Vec<String> = CAPABILITIES
        .iter()
        .filter(|(bit, _, _)| effective & (1 << bit) == 0)
        .map(|(_, name, what)| format!("{name} ({what})"))
        .collect();
    if lacking.is_empty() {
        let names: Vec<&str> = CAPABILITIES.iter().map(|(_, name, _)| *name).collect();
        present("capabilities", true, purpose, names.join(", "))
    } else {
        missing(
            "capabilities",
            true,
            purpose,
            format!("lacks {}", lacking.join(", ")),
            "run as root, or give the service these with AmbientCapabilities= in its unit",
        )
    }
}

fn effective(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|l| l.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

pub(super) fn ptrace() -> Check {
    let purpose = "taking a userfaultfd from the VMM while it starts";
    // Without the Yama module there is no file and no restriction (Documentation/admin-guide/LSM/Yama.rst).
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope");
    match scope.as_deref().map(str::trim) {
        Ok("3") => missing(
            "ptrace",
            true,
            purpose,
            "kernel.yama.ptrace_scope is 3: nobody may trace",
            "boot with kernel.yama.ptrace_scope=2 or lower",
        ),
        Ok(scope) => present("ptrace", true, purpose, format!("Yama scope {scope}")),
        Err(_) => present("ptrace", true, purpose, "no restriction"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_read_as_numbers() {
        assert_eq!(parse("6.18.5-cloud-amd64"), Some((6, 18)));
        assert_eq!(parse("6.7"), Some((6, 7)));
        assert_eq!(parse("six"), None);
    }

    #[test]
    fn effective_capabilities_are_found_in_the_status() {
        assert_eq!(
            effective("Name:\tx\nCapEff:\t00000000a80425fb\n"),
            Some(0xa804_25fb)
        );
    }
}
