//! From a pod and its images to a VM and what its agent is told. Pure.

use std::sync::Arc;

use vm_runtime::agent_client as agent;
use vm_runtime::pod::{ContainerSpec, PodSpec};
use vm_runtime::spec::{Accel, CPU, DiskSpec, KERNEL_CMDLINE, VmSpec, WritableDisk};
use vm_runtime::units::Bytes;

use crate::image::{ImageRecord, resolve};

use super::addressing::interface;
use super::disks;
use super::error::{Cause, PodError};

/// What the VMM needs beside guest RAM: QEMU's own heap, its code, and the emulator's translations.
pub const VMM_OVERHEAD: Bytes = Bytes::mib(96);

/// Of guest RAM, what comes out of the memory that is available, and what out of the reserved huge pages, which are no part of that.
pub fn ordinary_and_huge(ram: Bytes, hugepages: bool) -> (Bytes, Bytes) {
    match hugepages {
        false => (ram, Bytes(0)),
        true => (Bytes(0), ram),
    }
}

/// What this node gives to every VM.
#[derive(Clone, Debug)]
pub struct Base<'a> {
    /// Versioned machine type.
    pub machine: &'a str,
    /// What runs it.
    pub accel: Accel,
    /// SHA-256 of the guest's kernel, hex.
    pub kernel_sha256: &'a str,
    /// SHA-256 of its initramfs, hex.
    pub initramfs_sha256: &'a str,
    /// The longest packet of pods, where they are routed.
    pub routed_mtu: Option<u32>,
}

/// A pod's VM, and what its agent is told.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The VM.
    pub vm: VmSpec,
    /// For the agent.
    pub configuration: agent::Configuration,
}

/// Plans a pod; `writable` are the disks that it can write to, `images` has one entry a container, in order, `uuid` is fresh.
///
/// Containers of the same image share one disk: it is read-only.
///
/// # Errors
/// [`PodError::Plan`]: pod and image together name no program, or the VM is beyond what QEMU takes.
pub fn plan(
    spec: &PodSpec,
    writable: Vec<WritableDisk>,
    images: &[Arc<ImageRecord>],
    base: &Base<'_>,
    uuid: String,
) -> Result<Plan, PodError> {
    let bad = |source: Cause| PodError::Plan {
        pod: spec.name.clone(),
        source,
    };
    let mut disks: Vec<DiskSpec> = Vec::new();
    let mut containers = Vec::new();
    let mut container_settings = Vec::new();
    let mut storage = Vec::new();
    for (container, image) in spec.containers.iter().zip(images) {
        let digest = image.erofs_digest.to_string();
        let serial = match disks.iter().find(|disk| disk.image_digest == digest) {
            Some(disk) => disk.serial.clone(),
            None => {
                let serial = format!("img{}", disks.len());
                disks.push(DiskSpec {
                    serial: serial.clone(),
                    image_digest: digest,
                    size: Bytes(image.erofs_size),
                });
                serial
            }
        };
        storage.extend(storage_of(spec, container, &writable));
        let process = resolve(container, &image.config).map_err(|e| bad(e.into()))?;
        container_settings.push(agent::ContainerSettings {
            stop_signal: signal(&image.config.stop_signal),
            ..container.settings.clone()
        });
        containers.push(agent::Container {
            name: container.name.clone(),
            disk: serial,
            argv: process.argv,
            env: process.env,
            working_dir: process.cwd,
            user: process.user,
            memory_limit: container.memory_limit.map(|b| b.0),
            cpu_limit_milli: container.cpu_limit_milli,
        });
    }
    let vm = VmSpec {
        name: spec.name.clone(),
        uuid,
        machine: base.machine.to_owned(),
        cpu: CPU.to_owned(),
        accel: base.accel,
        memory: spec.memory,
        vcpus: spec.vcpus,
        mac: spec.net.mac,
        disks,
        writable,
        free_page_reporting: !spec.hugepages,
        announced_images: true,
        hugepages: spec.hugepages,
        cmdline: KERNEL_CMDLINE.to_owned(),
        kernel_sha256: base.kernel_sha256.to_owned(),
        initramfs_sha256: base.initramfs_sha256.to_owned(),
    };
    vm.check().map_err(|e| bad(e.into()))?;
    let configuration = agent::Configuration {
        hostname: spec
            .settings
            .hostname
            .as_ref()
            .unwrap_or(&spec.name)
            .clone(),
        interfaces: vec![interface(&spec.net, base.routed_mtu)],
        dns: Vec::new(),
        containers,
        sysctls: Vec::new(),
        storage,
        settings: spec.settings.clone(),
        container_settings,
        output_offsets: Vec::new(),
    };
    Ok(Plan { vm, configuration })
}

/// The number of a signal as an image names it: `SIGQUIT`, `QUIT`, `3`, `SIGRTMIN+3`. `None`: it names none, or nothing that is one.
fn signal(name: &str) -> Option<i32> {
    let name = name.to_ascii_uppercase();
    let plain = name.strip_prefix("SIG").unwrap_or(&name);
    let numbers = 1..=libc::SIGRTMAX();
    if let Ok(number) = plain.parse() {
        return numbers.contains(&number).then_some(number);
    }
    if let Some(above) = plain.strip_prefix("RTMIN") {
        let above: i32 = above
            .strip_prefix('+')
            .map_or(Some(0), |n| n.parse().ok())?;
        let number = libc::SIGRTMIN().checked_add(above)?;
        return numbers.contains(&number).then_some(number);
    }
    let signal: nix::sys::signal::Signal = format!("SIG{plain}").parse().ok()?;
    Some(signal as i32)
}

/// The disks of a container; `None` if it has none.
fn storage_of(
    spec: &PodSpec,
    container: &ContainerSpec,
    writable: &[WritableDisk],
) -> Option<agent::Storage> {
    let (layer, volumes) = disks::serials(spec, writable);
    let mounts: Vec<agent::Mount> = container
        .volume_mounts
        .iter()
        .filter_map(|mount| {
            let (_, serial) = volumes.iter().find(|(name, _)| *name == mount.volume)?;
            Some(agent::Mount {
                disk: (*serial).to_owned(),
                path: mount.path.clone(),
                read_only: mount.read_only,
            })
        })
        .collect();
    (layer.is_some() || !mounts.is_empty()).then(|| agent::Storage {
        container: container.name.clone(),
        layer: layer.map(str::to_owned),
        mounts,
    })
}

/// A UUID of version 4 from 16 random bytes (RFC 9562, section 5.4).
pub fn uuid(mut random: [u8; 16]) -> String {
    random[6] = random[6] & 0x0f | 0x40;
    random[8] = random[8] & 0x3f | 0x80;
    let mut text = String::with_capacity(36);
    for (at, byte) in random.iter().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_name_the_signal_that_asks_them_to_end() {
        for (name, number) in [
            ("SIGQUIT", 3),
            ("quit", 3),
            ("15", 15),
            ("SIGRTMIN+3", libc::SIGRTMIN() + 3),
        ] {
            assert_eq!(signal(name), Some(number), "{name}");
        }
        for name in ["", "SIGNOTHING", "0", "99", "RTMIN+99", "-1"] {
            assert_eq!(signal(name), None, "{name}");
        }
    }

    #[test]
    fn uuids_carry_version_and_variant() {
        assert_eq!(uuid([0; 16]), "00000000-0000-4000-8000-000000000000");
        assert_eq!(uuid([0xff; 16]), "ffffffff-ffff-4fff-bfff-ffffffffffff");
    }
}
