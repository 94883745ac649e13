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
use crate::units::Bytes;

/// Name of the virtio-serial port that the guest agent opens.
pub const AGENT_PORT: &str = "migrator.agent";

/// How long QEMU waits for a disk's server that has gone, in seconds, until the guest sees an error: a day. A service that is
/// restarted is back within seconds; a guest that waits can be saved yet, one that saw an error has its file system read-only.
const RECONNECT_DELAY: u32 = 86_400;

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
            None => nothing(disk.size),
        };
        args.disk(index, &disk.serial, node);
    }
    for (index, disk) in spec.writable.iter().enumerate() {
        if let Some((_, image)) = local.rbd.iter().find(|(at, _)| *at == index) {
            args.rbd(index, &disk.serial, image);
            continue;
        }
        let node = match sockets.get(index) {
            Some(socket) => served(socket),
            None => nothing(disk.size),
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

    fn disk(&mut self, index: usize, serial: &str, mut node: Value) {
        node["node-name"] = format!("disk{index}").into();
        node["read-only"] = true.into();
        self.pair("-blockdev", node.to_string());
        self.device(
            &format!("virtio-blk-pci,drive=disk{index},serial={serial}"),
            slot::DISK + index,
        );
    }

    /// Where its server says that its file system is full, the guest stops until there is room again (`werror=enospc`); any other
    /// error is the guest's to see.
    fn writable(&mut self, index: usize, serial: &str, mut node: Value) {
        node["node-name"] = format!("writable{index}").into();
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
            "node-name": format!("writable{index}"),
        });
        self.pair("-blockdev", node.to_string());
        self.writable_device(index, serial);
    }

    /// The same device whoever serves it: the guest does not see the difference, and a saved state fits both.
    fn writable_device(&mut self, index: usize, serial: &str) {
        self.device(
            &format!(
                "virtio-blk-pci,drive=writable{index},serial={serial},discard=on,write-zeroes=on,werror=enospc,rerror=report"
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
    if path.extension().is_some_and(|ext| ext == SOCKET) {
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

/// A disk that the service serves.
fn served(socket: &Path) -> Value {
    json!({
        "driver": "nbd",
        "server": { "type": "unix", "path": socket.to_string_lossy() },
        "reconnect-delay": RECONNECT_DELAY,
    })
}

/// A disk of a template: zeros.
fn nothing(size: Bytes) -> Value {
    json!({ "driver": "null-co", "size": size.0, "read-zeroes": true })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::WritableDisk;
    use crate::spec::tests::example;

    const FDS: FdNumbers = FdNumbers {
        memory: 200,
        tap: 201,
        qmp: 202,
        agent: 203,
    };

    fn local<'a>(mode: BootMode, disks: &'a [PathBuf]) -> Local<'a> {
        Local {
            mode,
            fds: FDS,
            kernel: Path::new("/g/vmlinuz"),
            initramfs: Path::new("/g/initramfs"),
            disks,
            data_dirs: &[],
            rbd: &[],
        }
    }

    fn text(spec: &VmSpec, local: &Local<'_>) -> String {
        let mut text = String::new();
        for arg in build(spec, local).unwrap() {
            let arg = arg.into_string().unwrap();
            text.push(if arg.starts_with('-') { '\n' } else { ' ' });
            text.push_str(&arg);
        }
        text
    }

    /// Each line here is part of the machine that a saved state expects: a change of it breaks
    /// migration between versions of this program.
    const GOLDEN: &str = "
-name guest=web,debug-threads=on
-nodefaults
-no-user-config
-only-migratable
-S
-display none
-msg timestamp=on
-action reboot=shutdown,shutdown=poweroff,panic=shutdown
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-machine pc-q35-7.2,hpet=on,vmport=off,smbus=off,sata=off,dump-guest-core=off,mem-merge=off,suppress-vmdesc=on,memory-backend=ram
-accel tcg,thread=multi
-cpu qemu64-v1,-svm,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16,+lahf-lm,+rdrand,enforce
-smp cpus=2,sockets=1,cores=2,threads=1,maxcpus=2
-m size=256M
-object memory-backend-file,id=ram,size=268435456,mem-path=/proc/self/fd/200,share=on,align=2M
-uuid 8a5e2f0c-0000-4000-8000-000000000001
-kernel /g/vmlinuz
-initrd /g/initramfs
-append console=ttyS0 panic=-1
-chardev socket,id=qmp,fd=202,server=on,wait=off
-mon chardev=qmp,mode=control
-chardev file,id=console,path=console.log,append=on
-serial chardev:console
-chardev socket,id=agent,fd=203,server=on,wait=off
-device virtio-serial-pci,id=serial0,max_ports=2,bus=pcie.0,addr=0x2,disable-legacy=on,disable-modern=off
-device virtserialport,bus=serial0.0,nr=1,chardev=agent,name=migrator.agent
-netdev tap,id=net0,fd=201,vhost=off
-device virtio-net-pci,netdev=net0,mac=52:54:00:12:34:56,rx_queue_size=1024,romfile=,bus=pcie.0,addr=0x3,disable-legacy=on,disable-modern=off
-object rng-random,id=rng0,filename=/dev/urandom
-device virtio-rng-pci,rng=rng0,bus=pcie.0,addr=0x4,disable-legacy=on,disable-modern=off
-device virtio-balloon-pci,id=balloon0,free-page-reporting=on,bus=pcie.0,addr=0x5,disable-legacy=on,disable-modern=off
-blockdev {\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"/i/a,b.erofs\",\"read-only\":true},\"node-name\":\"disk0\",\"read-only\":true}
-device virtio-blk-pci,drive=disk0,serial=img0,bus=pcie.0,addr=0x8,disable-legacy=on,disable-modern=off";

    #[test]
    fn an_image_that_is_served_is_read_over_its_socket() {
        let disks = [PathBuf::from("/p/web/i0.nbd")];
        let built = text(&example(), &local(BootMode::Boot, &disks));
        assert!(
            built.contains(r#"-blockdev {"driver":"nbd","node-name":"disk0","read-only":true,"reconnect-delay":86400,"server":{"path":"/p/web/i0.nbd","type":"unix"}}"#),
            "{built}"
        );
    }

    #[test]
    fn the_command_line_is_pinned() {
        let disks = [PathBuf::from("/i/a,b.erofs")];
        assert_eq!(text(&example(), &local(BootMode::Boot, &disks)), GOLDEN);
    }

    #[test]
    fn a_writable_disk_is_pinned_too() {
        let mut spec = example();
        spec.writable.push(WritableDisk {
            serial: "w0".to_owned(),
            name: "root".to_owned(),
            size: Bytes::mib(64),
            shared: None,
        });
        let disks = [
            PathBuf::from("/i/a,b.erofs"),
            PathBuf::from("/p/web/d0.nbd"),
        ];
        let with = text(&spec, &local(BootMode::Boot, &disks));
        let more = "
-blockdev {\"discard\":\"unmap\",\"driver\":\"nbd\",\"node-name\":\"writable0\",\"reconnect-delay\":86400,\"server\":{\"path\":\"/p/web/d0.nbd\",\"type\":\"unix\"}}
-device virtio-blk-pci,drive=writable0,serial=w0,discard=on,write-zeroes=on,werror=enospc,rerror=report,bus=pcie.0,addr=0x1b,disable-legacy=on,disable-modern=off";
        assert_eq!(with, format!("{GOLDEN}{more}"));
        spec.writable.push(spec.writable[0].clone());
        assert_eq!(spec.check().unwrap_err().field, "disk serial");
    }

    #[test]
    fn a_disk_of_ceph_differs_by_its_node_only_and_tells_no_key() {
        let mut spec = example();
        spec.writable.push(WritableDisk {
            serial: "w0".to_owned(),
            name: "data".to_owned(),
            size: Bytes::mib(64),
            shared: None,
        });
        let disks = [
            PathBuf::from("/i/a,b.erofs"),
            PathBuf::from("/p/web/d0.nbd"),
        ];
        let rbd = [(
            0,
            RbdImage {
                pool: "pods".to_owned(),
                image: "db".to_owned(),
                user: "migrator".to_owned(),
                key_file: PathBuf::from("/e/ceph.key"),
                conf: PathBuf::from("/s/ceph.conf"),
            },
        )];
        let served = text(&spec, &local(BootMode::Boot, &disks));
        let own = text(
            &spec,
            &Local {
                rbd: &rbd,
                ..local(BootMode::Boot, &disks)
            },
        );
        let more: Vec<&str> = own.lines().filter(|l| !served.contains(l)).collect();
        let wanted = "-object {\"file\":\"/e/ceph.key\",\"format\":\"base64\",\"id\":\"key0\",\"qom-type\":\"secret\"}
-blockdev {\"cache\":{\"direct\":true},\"discard\":\"unmap\",\"driver\":\"raw\",\"file\":{\"cache\":{\"direct\":true},\"conf\":\"/s/ceph.conf\",\"discard\":\"unmap\",\"driver\":\"rbd\",\"image\":\"db\",\"key-secret\":\"key0\",\"pool\":\"pods\",\"user\":\"migrator\"},\"node-name\":\"writable0\"}";
        assert_eq!(more.join("\n"), wanted);
        assert_eq!(own.lines().last(), served.lines().last());
    }

    #[test]
    fn the_destination_differs_by_its_boot_mode_only() {
        let disks = [PathBuf::from("/i/a,b.erofs")];
        let incoming = text(&example(), &local(BootMode::Incoming, &disks));
        assert_eq!(incoming, format!("{GOLDEN}\n-incoming defer"));
    }

    #[test]
    fn a_template_differs_by_what_is_behind_its_disks_only() {
        let mut spec = example();
        spec.writable.push(WritableDisk {
            serial: "w0".to_owned(),
            name: "root".to_owned(),
            size: Bytes::mib(64),
            shared: None,
        });
        let paths = [PathBuf::from("/i/a"), PathBuf::from("/p/web/d0.nbd")];
        let devices = |text: &str| -> Vec<String> {
            let lines = text.lines().filter(|line| !line.starts_with("-blockdev"));
            lines.map(str::to_owned).collect()
        };
        let template = text(&spec, &local(BootMode::Template, &[]));
        let boot = text(&spec, &local(BootMode::Boot, &paths));
        assert_eq!(devices(&template), devices(&boot));
        assert_eq!(template.matches("null-co").count(), 2);
        assert!(build(&spec, &local(BootMode::Template, &paths)).is_err());
    }

    #[test]
    fn a_vm_without_a_balloon_differs_by_that_device_only() {
        let mut spec = example();
        spec.free_page_reporting = false;
        let disks = [PathBuf::from("/i/a,b.erofs")];
        let bare = text(&spec, &local(BootMode::Boot, &disks));
        let without: Vec<&str> = GOLDEN.lines().filter(|l| !l.contains("balloon")).collect();
        assert_eq!(bare, without.join("\n"));
    }

    #[test]
    fn kvm_and_data_folders_are_options() {
        let mut spec = example();
        spec.accel = Accel::Kvm;
        let disks = [PathBuf::from("/i/a")];
        let dirs = [PathBuf::from("/q/share/qemu"), PathBuf::from("/q/seabios")];
        let mut local = local(BootMode::Boot, &disks);
        local.data_dirs = &dirs;
        let text = text(&spec, &local);
        assert!(text.starts_with("\n-L /q/share/qemu\n-L /q/seabios\n-name "));
        assert!(text.contains("\n-accel kvm\n"));
    }

    #[test]
    fn wrong_specs_and_missing_files_build_nothing() {
        let mut spec = example();
        assert!(build(&spec, &local(BootMode::Boot, &[])).is_err());
        spec.machine = "q35,accel=kvm".to_owned();
        let disks = [PathBuf::from("/i/a")];
        assert!(build(&spec, &local(BootMode::Boot, &disks)).is_err());
    }
}
