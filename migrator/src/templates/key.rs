//! What a saved state depends on, as one name.

use std::fmt;
use std::os::unix::fs::MetadataExt;

use serde::Serialize;
use sha2::{Digest as _, Sha256};
use vm_runtime::qemu::QemuBinary;
use vm_runtime::spec::VmSpec;
use vm_runtime::units::{Bytes, MacAddress};

/// Counts when the files of templates, or what is done to a guest before it is saved, change.
const FORMAT: u32 = 1;

/// The MAC address of a template's network device: locally administered, and never on a network.
pub const MAC: MacAddress = MacAddress([0x02, 0x6d, 0x67, 0, 0, 0]);

/// Size of a template's disks, which nobody looks at.
const DISK: Bytes = Bytes::mib(1);

/// The name of a template: 32 hex digits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(String);

impl Key {
    /// Of the shape that a QEMU has saved, or is to load. What the shape tells: machine, CPU, accelerator, virtual CPUs, memory and
    /// whether it is of huge pages, every device, kernel, initramfs (thus the agent) and kernel command line. QEMU counts as the
    /// file that it is now: an upgrade of it makes other templates.
    pub fn new(qemu: &QemuBinary, shape: &VmSpec) -> Self {
        #[derive(Serialize)]
        struct Parts<'a> {
            format: u32,
            version: (u32, u32, u32),
            path: &'a std::path::Path,
            file: Option<(u64, i64, i64)>,
            shape: &'a VmSpec,
        }
        let file = std::fs::metadata(&qemu.path).ok();
        let parts = Parts {
            format: FORMAT,
            version: qemu.version,
            path: &qemu.path,
            file: file.map(|file| (file.len(), file.mtime(), file.mtime_nsec())),
            shape,
        };
        // Neither maps with keys that are no text nor failing serializers are in it.
        let text = serde_json::to_vec(&parts).unwrap_or_default();
        let digest = Sha256::digest(&text);
        Self(digest[..16].iter().map(|b| format!("{b:02x}")).collect())
    }

    /// A name that somebody gave; `None` if no template has such a one.
    pub fn parse(text: &str) -> Option<Self> {
        let hex = |c: u8| c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
        (text.len() == 32 && text.bytes().all(hex)).then(|| Self(text.to_owned()))
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The VM without what is one pod's own: pods of the same shape start from the same template.
pub fn shape(vm: &VmSpec) -> VmSpec {
    let mut shape = VmSpec {
        name: "template".to_owned(),
        uuid: "00000000-0000-4000-8000-000000000000".to_owned(),
        mac: MAC,
        ..vm.clone()
    };
    for disk in &mut shape.disks {
        disk.image_digest = String::new();
        disk.size = DISK;
    }
    for disk in &mut shape.writable {
        disk.name = "disk".to_owned();
        disk.size = DISK;
        disk.shared = None;
    }
    shape
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::PathBuf;

    use vm_runtime::spec::{Accel, DiskSpec, WritableDisk};

    use super::*;

    pub(in crate::templates) fn vm() -> VmSpec {
        VmSpec {
            disks: vec![DiskSpec {
                serial: "img0".to_owned(),
                image_digest: "sha256:aa".to_owned(),
                size: Bytes::mib(8),
            }],
            writable: vec![WritableDisk {
                serial: "w0".to_owned(),
                name: "root".to_owned(),
                size: Bytes::mib(64),
                shared: None,
            }],
            ..crate::wire::golden::offer().vm
        }
    }

    fn qemu(version: u32) -> QemuBinary {
        QemuBinary {
            path: PathBuf::from("/nonexistent/qemu"),
            lib_dir: None,
            data_dirs: Vec::new(),
            version: (version, 2, 0),
            machine_types: Vec::new(),
        }
    }

    fn key(vm: &VmSpec) -> Key {
        Key::new(&qemu(7), &shape(vm))
    }

    #[test]
    fn what_is_a_pods_own_makes_no_other_template() {
        let mut other = vm();
        other.name = "another".to_owned();
        other.uuid = "8a5e2f0c-0000-4000-8000-000000000001".to_owned();
        other.mac = "52:54:00:00:00:99".parse().unwrap();
        other.disks[0].image_digest = "sha256:bb".to_owned();
        other.disks[0].size = Bytes::mib(900);
        other.writable[0].name = "data".to_owned();
        other.writable[0].size = Bytes::mib(7);
        assert_eq!(key(&other), key(&vm()));
        assert_eq!(Key::parse(key(&vm()).as_str()), Some(key(&vm())));
        shape(&vm()).check().unwrap();
    }

    #[test]
    fn whatever_the_saved_state_depends_on_makes_another() {
        type Change = fn(&mut VmSpec);
        let changes: [Change; 14] = [
            |s| s.machine = "pc-q35-10.0".to_owned(),
            |s| s.cpu = "qemu64-v1".to_owned(),
            |s| s.accel = Accel::Kvm,
            |s| s.memory = Bytes::mib(514),
            |s| s.vcpus = 2,
            |s| s.disks.push(s.disks[0].clone()),
            |s| s.disks[0].serial = "img1".to_owned(),
            |s| s.writable.clear(),
            |s| s.free_page_reporting = false,
            |s| s.announced_images = true,
            |s| s.hugepages = true,
            |s| s.cmdline.push_str(" quiet"),
            |s| s.kernel_sha256 = "1".to_owned(),
            |s| s.initramfs_sha256 = "1".to_owned(),
        ];
        let mut keys = vec![key(&vm())];
        for change in changes {
            let mut other = vm();
            change(&mut other);
            keys.push(key(&other));
        }
        keys.push(Key::new(&qemu(10), &shape(&vm())));
        let mut program = qemu(7);
        program.path = std::env::current_exe().unwrap();
        keys.push(Key::new(&program, &shape(&vm())));
        let count = keys.len();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), count);
    }

    #[test]
    fn a_name_that_is_no_key_names_no_folder() {
        for text in ["", "..", "../../etc", "ABCDEF00ABCDEF00ABCDEF00ABCDEF00"] {
            assert_eq!(Key::parse(text), None, "{text}");
        }
    }
}
