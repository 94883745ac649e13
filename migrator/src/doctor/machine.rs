//! What the machine must have: programs, files, memory.

use std::path::Path;

use vm_runtime::probe;
use vm_runtime::qemu::QemuBinary;
use vm_runtime::spec::{Accel, MACHINE};
use vm_runtime::units::Bytes;

use super::{Check, Subject, missing, present};
use crate::api::error::chain;
use crate::network::Setting;

/// The first QEMU that migrator is tested with.
const OLDEST_QEMU: (u32, u32) = (7, 2);

/// What one small guest and its VMM need.
const LEAST_RAM: Bytes = Bytes::mib(512);

/// What an image's unpacking and a guest's logs need.
const LEAST_DISK: Bytes = Bytes::mib(1024);

/// What the kernel says can be had without swapping: `MemAvailable`; 0 if it does not say.
pub(super) fn available() -> Bytes {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    Bytes(available_kib(&text).unwrap_or(0) << 10)
}

pub(super) fn ram() -> Check {
    let purpose = "guest memory";
    let available = available();
    if available >= LEAST_RAM {
        present("memory", true, purpose, format!("{available} available"))
    } else {
        missing(
            "memory",
            true,
            purpose,
            format!("{available} available, {LEAST_RAM} needed for one small pod"),
            "stop something, or add memory",
        )
    }
}

fn available_kib(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

pub(super) fn erofs() -> Check {
    let purpose = "turning images into block devices";
    let found = std::env::var_os("PATH").and_then(|path| {
        std::env::split_paths(&path)
            .map(|dir| dir.join("mkfs.erofs"))
            .find(|file| file.is_file())
    });
    match found {
        Some(path) => present("mkfs.erofs", true, purpose, path.display().to_string()),
        None => missing(
            "mkfs.erofs",
            true,
            purpose,
            "not in PATH",
            "apt-get install erofs-utils",
        ),
    }
}

/// mke2fs, for pods with disks.
pub(super) fn mke2fs() -> Check {
    let purpose = "pods with disks that they write to, and volumes";
    match crate::block::mkfs::find_mke2fs() {
        Some(path) => present("mke2fs", false, purpose, path.display().to_string()),
        None => missing(
            "mke2fs",
            false,
            purpose,
            "not in PATH",
            "apt-get install e2fsprogs",
        ),
    }
}

/// QEMU, its machine type, and what would run guests.
pub(super) async fn qemu(subject: &Subject) -> Vec<Check> {
    let config = vm_runtime::qemu::QemuConfig {
        binary: subject.qemu.binary.clone(),
        lib_dir: subject.qemu.lib_dir.clone(),
        data_dirs: subject.qemu.data_dirs.clone(),
    };
    let get = "apt-get install qemu-system-x86 (7.2 or later), or name one in qemu.binary";
    let purpose = "running guests";
    let qemu = match QemuBinary::open(&config).await {
        Ok(qemu) => qemu,
        Err(error) => return vec![missing("qemu", true, purpose, chain(&error), get)],
    };
    let (major, minor, micro) = qemu.version;
    let found = format!("{major}.{minor}.{micro} at {}", qemu.path.display());
    let mut checks = Vec::new();
    checks.push(if (major, minor) >= OLDEST_QEMU {
        present("qemu", true, purpose, found)
    } else {
        let why = format!("{found} is older than {}.{}", OLDEST_QEMU.0, OLDEST_QEMU.1);
        missing("qemu", true, purpose, why, get)
    });
    let purpose = "moving guests between QEMUs of different versions";
    checks.push(if qemu.supports(MACHINE) {
        present("machine_type", false, purpose, MACHINE)
    } else {
        missing(
            "machine_type",
            false,
            purpose,
            format!("this QEMU does not know {MACHINE}"),
            "use a QEMU of 7.2 or later that still has it, on every node",
        )
    });
    let purpose = "running guests at full speed";
    checks.push(match probe::resolve(&qemu, subject.accel()).await {
        Ok((Accel::Kvm, reason)) => present("kvm", false, purpose, reason),
        Ok((Accel::Tcg, reason)) => missing(
            "kvm",
            false,
            purpose,
            format!("guests run under the emulator: {reason}"),
            "a machine or outer VM with hardware virtualisation, and /dev/kvm",
        ),
        Err(error) => missing(
            "kvm",
            true,
            purpose,
            chain(&error),
            "a machine with hardware virtualisation; or set qemu.accel to `auto`",
        ),
    });
    checks
}

fn file(name: &str, purpose: &str, path: &Path, remedy: &str) -> Check {
    match std::fs::File::open(path).and_then(|f| f.metadata()) {
        Ok(meta) if meta.is_file() && meta.len() > 0 => present(
            name,
            true,
            purpose,
            format!("{} ({})", path.display(), Bytes(meta.len())),
        ),
        Ok(_) => missing(
            name,
            true,
            purpose,
            format!("{} is empty or no file", path.display()),
            remedy,
        ),
        Err(error) => missing(
            name,
            true,
            purpose,
            format!("{}: {error}", path.display()),
            remedy,
        ),
    }
}

/// Everything that only a configuration names.
pub(super) fn configured(subject: &Subject) -> Vec<Check> {
    let mut checks = Vec::new();
    if let Some((kernel, initramfs)) = &subject.guest {
        checks.push(file(
            "guest_kernel",
            "booting guests",
            kernel,
            "unpack vmlinuz of Debian's linux-image-cloud-amd64, as `cargo xtask setup` does",
        ));
        checks.push(file(
            "guest_initramfs",
            "the agent inside guests",
            initramfs,
            "build it with `cargo xtask setup`",
        ));
    }
    if let Some(tls) = &subject.tls {
        for (name, path) in [
            ("tls_ca", &tls.ca),
            ("tls_cert", &tls.cert),
            ("tls_key", &tls.key),
        ] {
            checks.push(file(
                name,
                "knowing the other nodes, and being known to them",
                path,
                "issue it from the nodes' authority; the lab makes its own",
            ));
        }
    }
    if let Some((bridge, uplink)) = &subject.links {
        let bridge = bridge.as_ref();
        for (name, link, purpose) in bridge
            .map(|bridge| ("bridge_link", bridge, "the pods' switch"))
            .into_iter()
            .chain([("uplink_link", uplink, "the way to the other nodes")])
        {
            checks.push(match nix::net::if_::if_nametoindex(link.as_str()) {
                Ok(index) => present(name, true, purpose, format!("{link}, index {index}")),
                Err(error) => missing(
                    name,
                    true,
                    purpose,
                    format!("{link}: {error}"),
                    format!("make it in the service's network namespace, or correct the configuration: ip link show {link}"),
                ),
            });
        }
    }
    checks.extend(subject.routed.iter().map(routing));
    if let Some(dir) = &subject.state_dir {
        checks.push(disk(dir));
    }
    checks
}

/// A setting that the service makes itself when it starts.
fn routing(setting: &Setting) -> Check {
    let (name, wanted) = ("routing", setting.wanted());
    let purpose = setting.purpose();
    match setting.differs() {
        Ok(None) => present(name, false, purpose, wanted),
        Ok(Some(now)) => missing(
            name,
            false,
            purpose,
            format!("it is {now}, and `{wanted}` is needed"),
            "nothing, if the service does not run: it sets this when it starts; else start it again, and look for what changes it",
        ),
        Err(error) => missing(
            name,
            false,
            purpose,
            format!("`{wanted}` is needed, and it cannot be read: {error}"),
            "a kernel with IPv4 and IPv6 (CONFIG_IPV6), and the uplink of the configuration",
        ),
    }
}

fn disk(dir: &Path) -> Check {
    let purpose = "images and logs";
    // The folder itself may not have been made yet.
    let existing = dir.ancestors().find(|d| d.exists()).unwrap_or(dir);
    match nix::sys::statvfs::statvfs(existing) {
        Ok(stat) => {
            let free = Bytes(stat.blocks_available() * stat.fragment_size());
            let text = format!("{free} free at {}", existing.display());
            if free >= LEAST_DISK {
                present("disk", false, purpose, text)
            } else {
                missing("disk", false, purpose, text, "free some, or move state_dir")
            }
        }
        Err(error) => missing(
            "disk",
            false,
            purpose,
            format!("{}: {error}", existing.display()),
            "make the folder",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read_from_meminfo() {
        let text = "MemTotal: 10 kB\nMemAvailable:   23974520 kB\n";
        assert_eq!(available_kib(text), Some(23_974_520));
    }

    #[test]
    fn a_missing_file_is_named() {
        let check = file(
            "guest_kernel",
            "booting",
            Path::new("/nonexistent/vmlinuz"),
            "get",
        );
        assert!(!check.result.is_ok());
        assert!(
            serde_json::to_string(&check)
                .unwrap()
                .contains("/nonexistent/vmlinuz")
        );
    }
}
