//! The QEMU command line, from a [`VmSpec`]. Pure: both nodes build the same shape from the same
//! spec, and only paths, descriptor numbers and the boot mode differ.
//!
//! - Each device sits at a PCI address that is written here, and no option ROM is loaded, so that
//!   the device tree does not depend on the QEMU version.
//! - The guest's RAM, its TAP and both sockets are inherited descriptors: nothing has to appear in
//!   a file system first, and nothing has to be polled for.
//! - A VM starts paused in either mode; a guest that reboots, powers off or panics ends its VM,
//!   and the pod's restart policy decides what is next. A reboot would keep the pod's VM, but
//!   a container that "reboots" is a container that has ended.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::spec::{Accel, MAX_DISKS, SpecError, VmSpec};

/// Name of the virtio-serial port that the guest agent opens.
pub const AGENT_PORT: &str = "migrator.agent";

/// How long QEMU waits for a disk's server that has gone, in seconds, until the guest sees an error: a day. A service that is
/// restarted is back within seconds; a guest that waits can be saved yet, one that saw an error has its file system read-only.
const RECONNECT_DELAY: u32 = 86_400;

/// What the names of QEMU's nodes begin with, of images and of writable disks.
const IMAGE: &str = "disk";
const WRITABLE: &str = "writable";

/// Whether a node of this name is a disk of the guest's.
pub(crate) fn is_disk(node: &str) -> bool {
    node.starts_with(IMAGE) || node.starts_with(WRITABLE)
}

/// What the name of an image's socket ends with: a path with another name is a file.
const SOCKET: &str = "nbd";

/// PCI slots on the root bus. 0x1f is the chipset's own; images start at [`slot::DISK`] and go up, writable disks at
/// [`slot::WRITABLE`] and go down.
mod slot {
    pub(super) const SERIAL: usize = 0x02;
    pub(super) const NET: usize = 0x03;
    pub(super) const RNG: usize = 0x04;
    pub(super) const BALLOON: usize = 0x05;
    pub(super) const DISK: usize = 0x08;
    pub(super) const WRITABLE: usize = 0x1b;
}

// The last disk stays clear of the chipset, and images of writable disks.
const _: () = assert!(slot::DISK + MAX_DISKS == slot::WRITABLE + 1);

/// How the VM begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootMode {
    /// At the kernel's first instruction.
    Boot,
    /// With a state that another VM saved.
    Incoming,
    /// As [`BootMode::Boot`], with nothing behind its disks: the guest must not look at them.
    Template,
}

/// Descriptor numbers in the QEMU process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FdNumbers {
    /// The memfd that is guest RAM.
    pub memory: RawFd,
    /// The TAP.
    pub tap: RawFd,
    /// The listening socket of the monitor.
    pub qmp: RawFd,
    /// The listening socket of the agent's port.
    pub agent: RawFd,
}

/// What a node adds to the spec.
#[derive(Clone, Copy, Debug)]
pub struct Local<'a> {
    /// How it begins.
    pub mode: BootMode,
    /// Descriptor numbers in QEMU.
    pub fds: FdNumbers,
    /// The kernel image.
    pub kernel: &'a Path,
    /// The initramfs.
    pub initramfs: &'a Path,
    /// Of each image of the spec, in its order, the socket that it is served at (`*.nbd`) or its file; then the socket of each writable disk;
    /// none for a template.
    pub disks: &'a [PathBuf],
    /// `-L` folders.
    pub data_dirs: &'a [PathBuf],
    /// The writable disks that QEMU reads and writes itself, by their index.
    pub rbd: &'a [(usize, RbdImage)],
}

/// An image of a Ceph pool, as a node reaches it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RbdImage {
    /// The pool.
    pub pool: String,
    /// The image.
    pub image: String,
    /// Whose key it is, without `client.`.
    pub user: String,
    /// The file with the key, base64.
    pub key_file: PathBuf,
    /// Where the monitors are, and what else librados is told.
    pub conf: PathBuf,
}

/// Builds QEMU's arguments (without the program's name). Its working folder must be the VM's own:
/// the console goes to `console.log` there.
///
/// # Errors
/// The spec is not right, or the disks are not as many as the spec says.
pub fn build(spec: &VmSpec, local: &Local<'_>) -> Result<Vec<OsString>, SpecError> {
    spec.check()?;
    let is_template = local.mode == BootMode::Template;
    let wanted = match is_template {
        true => 0,
        false => spec.disks.len() + spec.writable.len(),
    };
    if wanted != local.disks.len() {
        return Err(SpecError {
            name: spec.name.clone(),
            field: "disks",
            problem: format!("are {wanted}, but {} files are given", local.disks.len()),
        });
    }
    let mut args = Args::default();
    args.process(spec, local);
    args.machine(spec, local.fds.memory);
    args.guest_code(spec, local);
    args.devices(spec, local.fds);
    let images = spec.disks.len().min(local.disks.len());
    let (images, sockets) = local.disks.split_at(images);
    for (index, disk) in spec.disks.iter().enumerate() {
        let node = match images.get(index) {
            Some(path) => image(path),
            None => nothing(),
        };
        // QEMU tells a guest of another size only where it may write itself.
        let is_file = images.get(index).is_some_and(|path| !is_served(path));
        args.disk(index, &disk.serial, node, spec.announced_images && !is_file);
    }
    for (index, disk) in spec.writable.iter().enumerate() {
        if let Some((_, image)) = local.rbd.iter().find(|(at, _)| *at == index) {
            args.rbd(index, &disk.serial, image);
            continue;
        }
        let node = match sockets.get(index) {
            Some(socket) => served(socket),
            None => nothing(),
        };
        args.writable(index, &disk.serial, node);
    }
    match local.mode {
        BootMode::Boot | BootMode::Template => {}
        BootMode::Incoming => args.pair("-incoming", "defer"),
    }
    Ok(args.0)
}

#[derive(Default)]
struct Args(Vec<OsString>);

impl Args {
    fn flag(&mut self, name: &str) {
        self.0.push(name.into());
    }

    fn pair(&mut self, name: &str, value: impl Into<OsString>) {
        self.0.push(name.into());
        self.0.push(value.into());
    }

    fn process(&mut self, spec: &VmSpec, local: &Local<'_>) {
        for dir in local.data_dirs {
            self.pair("-L", dir);
        }
        self.pair("-name", format!("guest={},debug-threads=on", spec.name));
        self.flag("-nodefaults");
        self.flag("-no-user-config");
        // A device that cannot be saved is an error now, and not at the first migration.
        self.flag("-only-migratable");
        self.flag("-S");
        self.pair("-display", "none");
        self.pair("-msg", "timestamp=on");
        self.pair(
            "-action",
            "reboot=shutdown,shutdown=poweroff,panic=shutdown",
        );
        self.pair(
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        );
    }

    fn machine(&mut self, spec: &VmSpec, memory: RawFd) {
        // suppress-vmdesc: a description of the device state for debuggers, made and sent anew in
        // each save, which costs milliseconds of the blackout and nobody reads.
        let machine = &spec.machine;
        self.pair(
            "-machine",
            format!(
                "{machine},hpet=on,vmport=off,smbus=off,sata=off,dump-guest-core=off,mem-merge=off,suppress-vmdesc=on,memory-backend=ram"
            ),
        );
        self.pair(
            "-accel",
            match spec.accel {
                Accel::Kvm => "kvm",
                Accel::Tcg => "tcg,thread=multi",
            },
        );
        self.pair("-cpu", &spec.cpu);
        let cores = spec.vcpus;
        self.pair(
            "-smp",
            format!("cpus={cores},sockets=1,cores={cores},threads=1,maxcpus={cores}"),
        );
        // Aligned as huge pages are, or the kernel could map none of them.
        let size = spec.memory.0;
        self.pair("-m", format!("size={}M", size >> 20));
        self.pair(
            "-object",
            format!(
                "memory-backend-file,id=ram,size={size},mem-path=/proc/self/fd/{memory},share=on,align=2M"
            ),
        );
        self.pair("-uuid", &spec.uuid);
    }

    fn guest_code(&mut self, spec: &VmSpec, local: &Local<'_>) {
        if local.mode == BootMode::Incoming {
            // What it runs comes in its memory, and a reboot ends the VM: QEMU would read 20 MiB for nobody.
            return;
        }
        self.pair("-kernel", local.kernel);
        self.pair("-initrd", local.initramfs);
        self.pair("-append", &spec.cmdline);
    }

    fn devices(&mut self, spec: &VmSpec, fds: FdNumbers) {
        let FdNumbers {
            tap, qmp, agent, ..
        } = fds;
        let socket = |id: &str, fd: RawFd| format!("socket,id={id},fd={fd},server=on,wait=off");
        self.pair("-chardev", socket("qmp", qmp));
        self.pair("-mon", "chardev=qmp,mode=control");
        self.pair("-chardev", "file,id=console,path=console.log,append=on");
        self.pair("-serial", "chardev:console");
        self.pair("-chardev", socket("agent", agent));
        self.device("virtio-serial-pci,id=serial0,max_ports=2", slot::SERIAL);
        self.pair(
            "-device",
            format!("virtserialport,bus=serial0.0,nr=1,chardev=agent,name={AGENT_PORT}"),
        );
        // The longest ring that QEMU has: what was parked during a move arrives at once.
        self.pair("-netdev", format!("tap,id=net0,fd={tap},vhost=off"));
        self.device(
            &format!(
                "virtio-net-pci,netdev=net0,mac={},rx_queue_size=1024,romfile=",
                spec.mac
            ),
            slot::NET,
        );
        self.pair("-object", "rng-random,id=rng0,filename=/dev/urandom");
        self.device("virtio-rng-pci,rng=rng0", slot::RNG);
        if spec.free_page_reporting {
            // Never inflated: what the guest frees, QEMU punches out of the RAM file.
            let balloon = "virtio-balloon-pci,id=balloon0,free-page-reporting=on";
            self.device(balloon, slot::BALLOON);
        }
    }

    /// An image: whoever serves it refuses every write.
    fn disk(&mut self, index: usize, serial: &str, mut node: Value, writable: bool) {
        node["node-name"] = format!("{IMAGE}{index}").into();
        if !writable {
            node["read-only"] = true.into();
        }
        self.pair("-blockdev", node.to_string());
        self.device(
            &format!("virtio-blk-pci,drive={IMAGE}{index},serial={serial}"),
            slot::DISK + index,
        );
    }

    /// Where its server says that its file system is full, the guest stops until there is room again (`werror=enospc`); any other
    /// error is the guest's to see.
    fn writable(&mut self, index: usize, serial: &str, mut node: Value) {
        node["node-name"] = format!("{WRITABLE}{index}").into();
        node["discard"] = "unmap".into();
        self.pair("-blockdev", node.to_string());
        self.writable_device(index, serial);
    }

    /// A disk that QEMU reads and writes itself. Not cached: another node writes to it before this VM gets the right to, and what was
    /// answered outlives this QEMU.
    fn rbd(&mut self, index: usize, serial: &str, image: &RbdImage) {
        let RbdImage {
            pool,
            image,
            user,
            key_file,
            conf,
        } = image;
        let secret = serde_json::json!({
            "qom-type": "secret",
            "id": format!("key{index}"),
            "file": key_file.to_string_lossy(),
            "format": "base64",
        });
        self.pair("-object", secret.to_string());
        let direct = serde_json::json!({ "direct": true });
        let node = serde_json::json!({
            "driver": "raw",
            "file": {
                "driver": "rbd",
                "pool": pool,
                "image": image,
                "user": user,
                "conf": conf.to_string_lossy(),
                "key-secret": format!("key{index}"),
                "cache": direct,
                "discard": "unmap",
            },
            "cache": direct,
            "discard": "unmap",
            "node-name": format!("{WRITABLE}{index}"),
        });
        self.pair("-blockdev", node.to_string());
        self.writable_device(index, serial);
    }

    /// The same device whoever serves it: the guest does not see the difference, and a saved state fits both.
    fn writable_device(&mut self, index: usize, serial: &str) {
        self.device(
            &format!(
                "virtio-blk-pci,drive={WRITABLE}{index},serial={serial},discard=on,write-zeroes=on,werror=enospc,rerror=report"
            ),
            slot::WRITABLE - index,
        );
    }

    /// A PCI device on the root bus, of today's virtio only: no I/O ports, no legacy layout.
    fn device(&mut self, text: &str, slot: usize) {
        self.pair(
            "-device",
            format!("{text},bus=pcie.0,addr=0x{slot:x},disable-legacy=on,disable-modern=off"),
        );
    }
}

/// An image. As JSON, a path may hold commas; lossy only for names that are no UTF-8, which our own image store never makes.
fn image(path: &Path) -> Value {
    if is_served(path) {
        return served(path);
    }
    json!({
        "driver": "raw",
        "file": {
            "driver": "file",
            "filename": path.to_string_lossy(),
            "read-only": true,
        },
    })
}

fn is_served(path: &Path) -> bool {
    path.extension().is_some_and(|ext| ext == SOCKET)
}

/// A disk that the service serves.
fn served(socket: &Path) -> Value {
    json!({
        "driver": "nbd",
        "server": { "type": "unix", "path": socket.to_string_lossy() },
        "reconnect-delay": RECONNECT_DELAY,
    })
}

/// A disk of a template: empty. Its guest has a driver for it, and is told the size when there is one.
fn nothing() -> Value {
    json!({ "driver": "null-co", "size": 0 })
}

#[cfg(test)]
mod tests;
