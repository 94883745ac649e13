//! The shape of a VM: everything that both nodes must agree on, and nothing that is a node's own.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, MacAddress, PAGE_SIZE};

/// The machine type of new VMs: the newest that QEMU 7.2 (Debian 12) and QEMU 10 both have, so
/// that a pod can move between nodes of either.
pub const MACHINE: &str = "pc-q35-7.2";

/// The CPU model of new VMs, the same under the emulator and the hypervisor, and in each QEMU.
///
/// Not `max` or `host`: these are whatever this QEMU and this host can do, which differs between
/// versions and hosts, and a guest that has seen a feature cannot be moved to where it is missing.
/// `qemu64-v1` is versioned, thus fixed; the additions make it x86-64-v2, which today's
/// distributions are built for, and are all emulated by QEMU 7.2 already. `rdrand` gives the guest
/// entropy at once. `svm` would be a nested hypervisor. `enforce` makes a QEMU that lacks one of
/// these refuse to start, and not start with something else.
pub const CPU: &str =
    "qemu64-v1,-svm,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16,+lahf-lm,+rdrand,enforce";

/// What every guest's kernel command line begins with: console on the serial port, and a kernel
/// panic reboots at once, which ends the VM (see [`crate::command_line`]). Grace periods of RCU are expedited: a
/// guest under emulation, or with one CPU, else waits for some while it mounts and makes namespaces. No driver makes files for its debugging
/// whenever it finds a device: nobody reads them there.
pub const KERNEL_CMDLINE: &str =
    "console=ttyS0 panic=-1 reboot=t rcupdate.rcu_expedited=1 debugfs=off";

/// The most block devices a VM may have: one PCI slot each.
pub const MAX_DISKS: usize = 20;
/// The most virtual CPUs a VM may have.
pub const MAX_VCPUS: u32 = 64;
/// `COMMAND_LINE_SIZE` of Linux on x86, without the final zero.
const MAX_CMDLINE: usize = 2047;
/// Longest serial of virtio-blk, `VIRTIO_BLK_ID_BYTES` in linux/virtio_blk.h.
const MAX_SERIAL: usize = 20;
/// Longest name of a volume of a shared class, in bytes: with a suffix it is a file's name.
const MAX_VOLUME: usize = 200;

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// The kernel's hypervisor.
    Kvm,
    /// QEMU's emulator.
    Tcg,
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "KVM",
            Self::Tcg => "the emulator",
        })
    }
}

/// What the node's configuration asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccelChoice {
    /// KVM if a probe boot works, else TCG.
    #[default]
    Auto,
    /// KVM or an error.
    Kvm,
    /// The emulator.
    Tcg,
}

/// One VM, in the exact shape that source and destination build the same command line from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpec {
    /// The pod's name.
    pub name: String,
    /// SMBIOS UUID, text form.
    pub uuid: String,
    /// Versioned machine type, such as `pc-q35-7.2`.
    pub machine: String,
    /// CPU model as QEMU names it, such as `qemu64` or `max`.
    pub cpu: String,
    /// Accelerator: state saved under one does not load under the other.
    pub accel: Accel,
    /// Guest RAM.
    pub memory: Bytes,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// MAC of the one network device.
    pub mac: MacAddress,
    /// Block devices with images in order.
    pub disks: Vec<DiskSpec>,
    /// Block devices that can be written, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub writable: Vec<WritableDisk>,
    /// Whether the guest tells which memory it has freed, which then becomes holes: a virtio balloon that only does that. Absent in
    /// specs of VMs that were started before there was one.
    #[serde(default)]
    pub free_page_reporting: bool,
    /// Whether its RAM is made of huge pages, on either node. Such a guest does not tell what it frees: the pages stay its own, and the
    /// kernel forgets that one was written when it is punched.
    #[serde(default)]
    pub hugepages: bool,
    /// Whether QEMU can tell the guest how large its images are: to QEMU they could be written then, and whoever serves them refuses that.
    /// Absent in specs of VMs that were started before there were guests to be told.
    #[serde(default)]
    pub announced_images: bool,
    /// Kernel command line.
    pub cmdline: String,
    /// SHA-256 of the kernel image: the destination must have the same.
    pub kernel_sha256: String,
    /// SHA-256 of the initramfs: the destination must have the same.
    pub initramfs_sha256: String,
}

/// One block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// virtio-blk serial, such as `img0`: how the agent finds it.
    pub serial: String,
    /// Digest of the image that backs it; each node maps it to a path of its own.
    pub image_digest: String,
    /// Size in bytes.
    pub size: Bytes,
}

/// One block device that can be written. Each node serves it at a socket of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WritableDisk {
    /// virtio-blk serial, such as `w0`: how the agent finds it.
    pub serial: String,
    /// What it is to the pod: `root`, or the name of a volume.
    pub name: String,
    /// Size in bytes.
    pub size: Bytes,
    /// Where it is, if that is a place that several nodes see: such a disk does not move with its pod. From version 4 of the
    /// protocol on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared: Option<SharedDisk>,
}

/// A disk on storage that several nodes see.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedDisk {
    /// The storage class, by the name that it has on every node.
    pub class: String,
    /// What the storage itself says that it is: two nodes may call different places by one name.
    pub class_id: String,
    /// The volume, unique in its class.
    pub volume: String,
    /// Who does its reads and writes.
    pub driver: SharedDriver,
    /// Whether it ends with its pod.
    #[serde(default)]
    pub ephemeral: bool,
}

/// Who does the reads and writes of a shared disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SharedDriver {
    /// The service, on a file of a mounted file system.
    File,
    /// QEMU itself, on an image of a Ceph pool.
    Rbd,
}

impl fmt::Display for SharedDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::File => "file",
            Self::Rbd => "rbd",
        })
    }
}

/// A spec that cannot become a VM.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("VM `{name}`: {field} {problem}")]
pub struct SpecError {
    /// The VM's name, cleaned of what a terminal would obey.
    pub name: String,
    /// The field.
    pub field: &'static str,
    /// What is wrong with it, and what would be right.
    pub problem: String,
}

impl VmSpec {
    /// Checks each field: a spec may come from another node, and its text goes into a command line.
    ///
    /// # Errors
    /// The first field that is not right.
    pub fn check(&self) -> Result<(), SpecError> {
        let bad = |field, problem: &str| {
            Err(SpecError {
                name: self.name.escape_debug().take(80).collect(),
                field,
                problem: problem.to_owned(),
            })
        };
        let dns = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
        if !only(&self.name, 63, dns) {
            return bad("name", "must be 1 to 63 of a-z, 0-9 and `-`");
        }
        let hex_dash = |c: u8| c.is_ascii_hexdigit() || c == b'-';
        if self.uuid.len() != 36 || !only(&self.uuid, 36, hex_dash) {
            return bad(
                "uuid",
                "must look like 8a5e2f0c-0000-4000-8000-000000000000",
            );
        }
        let version = |c: u8| c.is_ascii_digit() || c == b'.';
        match self.machine.strip_prefix("pc-q35-") {
            Some(rest) if only(rest, 8, version) => {}
            _ => return bad("machine", "must be a versioned q35, such as pc-q35-7.2"),
        }
        let cpu = |c: u8| c.is_ascii_alphanumeric() || b"-+_.,".contains(&c);
        if !only(&self.cpu, 512, cpu) {
            return bad("cpu", "must be a CPU model with +feature and -feature");
        }
        let memory = self.memory.0;
        if memory < Bytes::mib(64).0 || !memory.is_multiple_of(512 * PAGE_SIZE as u64) {
            return bad("memory", "must be a multiple of 2 MiB, and at least 64 MiB");
        }
        if memory > 1 << 42 {
            return bad("memory", "must be at most 4 TiB");
        }
        if self.hugepages && self.free_page_reporting {
            return bad("free_page_reporting", "must be off with huge pages");
        }
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            return bad("vcpus", "must be 1 to 64");
        }
        if self.disks.len() + self.writable.len() > MAX_DISKS {
            return bad(
                "disks",
                "must be 20 at most, images and writable ones together",
            );
        }
        let alnum = |c: u8| c.is_ascii_alphanumeric();
        let images = self.disks.iter().map(|disk| &disk.serial);
        let writable = self.writable.iter().map(|disk| &disk.serial);
        let serials: Vec<&String> = images.chain(writable).collect();
        for (at, serial) in serials.iter().enumerate() {
            if !only(serial, MAX_SERIAL, alnum) {
                return bad("disk serial", "must be 1 to 20 letters and digits");
            }
            if serials[..at].contains(serial) {
                return bad("disk serial", "must be unique");
            }
        }
        if self.writable.iter().any(|disk| !only(&disk.name, 63, dns)) {
            return bad("disk name", "must be 1 to 63 of a-z, 0-9 and `-`");
        }
        // Part of a path, or of a node's name in QEMU.
        let dotted = |c: u8| dns(c) || c == b'.';
        let shared = self.writable.iter().filter_map(|disk| disk.shared.as_ref());
        for shared in shared {
            let volume = &shared.volume;
            if !only(volume, MAX_VOLUME, dotted) || volume.starts_with('.') {
                return bad("disk volume", "must be 1 to 200 of a-z, 0-9, `-` and `.`");
            }
            if !only(&shared.class, 63, dns) || !only(&shared.class_id, 64, dns) {
                return bad("disk class", "must be 1 to 63 of a-z, 0-9 and `-`");
            }
        }
        let printable = |c: u8| (b' '..=b'~').contains(&c);
        if !only(&self.cmdline, MAX_CMDLINE, printable) {
            return bad("cmdline", "must be 1 to 2047 printable ASCII characters");
        }
        Ok(())
    }
}

fn only(text: &str, longest: usize, allowed: impl Fn(u8) -> bool) -> bool {
    (1..=longest).contains(&text.len()) && text.bytes().all(allowed)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn example() -> VmSpec {
        VmSpec {
            name: "web".to_owned(),
            uuid: "8a5e2f0c-0000-4000-8000-000000000001".to_owned(),
            machine: MACHINE.to_owned(),
            cpu: CPU.to_owned(),
            accel: Accel::Tcg,
            memory: Bytes::mib(256),
            vcpus: 2,
            mac: "52:54:00:12:34:56".parse().unwrap(),
            disks: vec![DiskSpec {
                serial: "img0".to_owned(),
                image_digest: "sha256:00".to_owned(),
                size: Bytes::mib(8),
            }],
            writable: Vec::new(),
            free_page_reporting: true,
            announced_images: false,
            hugepages: false,
            cmdline: "console=ttyS0 panic=-1".to_owned(),
            kernel_sha256: String::new(),
            initramfs_sha256: String::new(),
        }
    }

    #[test]
    fn a_plain_spec_is_right() {
        assert_eq!(example().check(), Ok(()));
    }

    #[test]
    fn a_spec_of_a_vm_without_a_balloon_is_still_read() {
        let mut text = serde_json::to_value(example()).unwrap();
        let fields = text.as_object_mut().unwrap();
        fields.remove("free_page_reporting");
        fields.remove("hugepages");
        fields.remove("announced_images");
        let spec: VmSpec = serde_json::from_value(text).unwrap();
        assert!(!spec.free_page_reporting && !spec.hugepages && !spec.announced_images);
    }

    #[test]
    fn a_shared_disk_leads_nowhere_else() {
        for (volume, fine) in [
            ("db", true),
            ("web.8a5e2f0c.root", true),
            ("../db", false),
            (".db", false),
            ("a/b", false),
            ("", false),
        ] {
            let mut spec = example();
            spec.writable.push(WritableDisk {
                serial: "w0".to_owned(),
                name: "data".to_owned(),
                size: Bytes::mib(64),
                shared: Some(SharedDisk {
                    class: "ceph".to_owned(),
                    class_id: "6f0a".to_owned(),
                    volume: volume.to_owned(),
                    driver: SharedDriver::Rbd,
                    ephemeral: false,
                }),
            });
            assert_eq!(spec.check().is_ok(), fine, "{volume}");
        }
    }

    #[test]
    fn each_field_is_checked_because_a_peer_may_have_written_it() {
        type Change = fn(&mut VmSpec);
        let changes: [(&str, Change); 12] = [
            ("name", |s| s.name = "Web,debug-threads=off".to_owned()),
            ("uuid", |s| s.uuid = "1".to_owned()),
            ("machine", |s| s.machine = "pc-q35-7.2,accel=kvm".to_owned()),
            ("machine", |s| s.machine = "q35".to_owned()),
            ("cpu", |s| s.cpu = "qemu64 -monitor stdio".to_owned()),
            ("memory", |s| s.memory = Bytes(Bytes::mib(256).0 + 1)),
            ("memory", |s| s.memory = Bytes(!0x1f_ffff)),
            ("free_page_reporting", |s| s.hugepages = true),
            ("vcpus", |s| s.vcpus = 0),
            ("disks", |s| s.disks = vec![s.disks[0].clone(); 21]),
            ("disk serial", |s| s.disks.push(s.disks[0].clone())),
            ("cmdline", |s| s.cmdline = "a\nb".to_owned()),
        ];
        for (field, change) in changes {
            let mut spec = example();
            change(&mut spec);
            assert_eq!(spec.check().unwrap_err().field, field);
        }
    }
}
