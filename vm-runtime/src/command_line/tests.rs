use super::*;
use crate::spec::WritableDisk;
use crate::spec::tests::example;
use crate::units::Bytes;

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
    let mut spec = example();
    // As VMs have it that were started by earlier builds, and as others have it.
    for (announced, flag) in [(false, r#""read-only":true,"#), (true, "")] {
        spec.announced_images = announced;
        let built = text(&spec, &local(BootMode::Boot, &disks));
        let node = format!(
            r#"-blockdev {{"driver":"nbd","node-name":"disk0",{flag}"reconnect-delay":86400,"server":{{"path":"/p/web/i0.nbd","type":"unix"}}}}"#
        );
        assert!(built.contains(&node), "{built}");
    }
    // A file has nobody who would refuse a write.
    let files = [PathBuf::from("/i/a,b.erofs")];
    assert_eq!(text(&spec, &local(BootMode::Boot, &files)), GOLDEN);
}

#[test]
fn the_command_line_is_pinned() {
    let disks = [PathBuf::from("/i/a,b.erofs")];
    assert_eq!(text(&example(), &local(BootMode::Boot, &disks)), GOLDEN);
}

/// The example with a disk that can be written, and where its disks are.
fn with_writable(name: &str) -> (VmSpec, [PathBuf; 2]) {
    let mut spec = example();
    spec.writable.push(WritableDisk {
        serial: "w0".to_owned(),
        name: name.to_owned(),
        size: Bytes::mib(64),
        shared: None,
    });
    let disks = ["/i/a,b.erofs", "/p/web/d0.nbd"];
    (spec, disks.map(PathBuf::from))
}

#[test]
fn a_writable_disk_is_pinned_too() {
    let (mut spec, disks) = with_writable("root");
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
    let (spec, disks) = with_writable("data");
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
fn the_destination_differs_by_its_boot_mode_and_has_no_kernel_to_boot() {
    let disks = [PathBuf::from("/i/a,b.erofs")];
    let incoming = text(&example(), &local(BootMode::Incoming, &disks));
    let boots = |line: &str| {
        let options = ["-kernel ", "-initrd ", "-append "];
        options.iter().any(|option| line.starts_with(option))
    };
    let same: Vec<&str> = GOLDEN.lines().filter(|line| !boots(line)).collect();
    assert_eq!(same.len() + 3, GOLDEN.lines().count());
    assert_eq!(incoming, format!("{}\n-incoming defer", same.join("\n")));
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
