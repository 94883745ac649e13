//! The shape of a VM: everything that both nodes must agree on, and nothing that is a node's own.

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, MacAddress};

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// The kernel's hypervisor.
    Kvm,
    /// QEMU's emulator.
    Tcg,
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
    /// Block devices in order.
    pub disks: Vec<DiskSpec>,
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
