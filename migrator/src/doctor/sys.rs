//! Unsafe island: system calls that are made only to learn whether the kernel has them.
//!
//! Every probe leaves nothing behind: what it makes belongs to descriptors that it closes.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use migrator_ebpf::{INJECTED_MARK, INJECTED_PRIORITY};

/// `UFFD_API` and what dirty tracking needs (linux/userfaultfd.h): `PAGEFAULT_FLAG_WP`,
/// `WP_HUGETLBFS_SHMEM`, `WP_UNPOPULATED`, `WP_ASYNC`.
const UFFD_API: u64 = 0xaa;
const UFFD_WANTED: u64 = 1 | 1 << 12 | 1 << 13 | 1 << 15;

/// `BPF_PROG_LOAD`, `BPF_LINK_CREATE`, `BPF_PROG_TYPE_SCHED_CLS`, `BPF_TCX_EGRESS` (linux/bpf.h).
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_TCX_EGRESS: u32 = 47;

/// `mov r0, -1` (that is `TCX_NEXT`: no verdict) and `exit`.
const PASS: [u64; 2] = [0xffff_ffff_0000_00b7, 0x95];

#[repr(C)]
#[derive(Default)]
struct UffdApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct pm_scan_arg` of linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    rest: [u64; 11],
}

/// The members of `union bpf_attr` that `BPF_PROG_LOAD` reads.
#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// The members of `union bpf_attr` that `BPF_LINK_CREATE` reads for tcx.
#[repr(C)]
#[derive(Default)]
struct LinkCreate {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
    relative_fd: u32,
    expected_revision: u64,
}

const _: () = assert!(size_of::<UffdApi>() == 24);
const _: () = assert!(size_of::<ScanArg>() == 96);
const _: () = assert!(size_of::<ProgLoad>() == 72);
const _: () = assert!(size_of::<LinkCreate>() == 32);

/// The generated functions are as unsafe as the ioctls they issue.
mod raw {
    #![allow(missing_docs, unreachable_pub)]
    use super::{ScanArg, UffdApi};

    nix::ioctl_readwrite!(uffd_api, 0xaa, 0x3f, UffdApi);
    nix::ioctl_readwrite!(pagemap_scan, b'f', 16, ScanArg);
    nix::ioctl_write_ptr_bad!(
        tunsetiff,
        nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
        libc::ifreq
    );
}

/// Owns the descriptor that a system call gave, or says why there is none.
fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(result).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: needed to take ownership of what the kernel just returned: it is open, and nobody else
    // has seen it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Opens a userfaultfd and asks for asynchronous write protection.
pub(super) fn userfaultfd_wp_async() -> io::Result<()> {
    // SAFETY: needed because libc has no wrapper. userfaultfd(2) takes flags only, no pointer.
    let uffd = owned(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) })?;
    let mut api = UffdApi {
        api: UFFD_API,
        features: UFFD_WANTED,
        ioctls: 0,
    };
    // SAFETY: `api` is a live, properly sized and aligned struct for the whole call.
    unsafe { raw::uffd_api(uffd.as_raw_fd(), &raw mut api) }?;
    Ok(())
}

/// Scans nothing, of this process.
pub(super) fn pagemap_scan() -> io::Result<()> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut arg = ScanArg {
        size: size_of::<ScanArg>() as u64,
        rest: [0; 11],
    };
    // SAFETY: `arg` is a live, properly sized and aligned struct; its output vector is empty, so the
    // kernel writes nothing but the struct itself.
    unsafe { raw::pagemap_scan(pagemap.as_raw_fd(), &raw mut arg) }?;
    Ok(())
}

/// Copies a descriptor of this process through its own pidfd.
pub(super) fn pidfd_getfd() -> io::Result<()> {
    let file = File::open("/dev/null")?;
    // SAFETY: needed because libc has no wrapper. pidfd_open(2) takes numbers only.
    let pidfd = owned(unsafe { libc::syscall(libc::SYS_pidfd_open, std::process::id(), 0) })?;
    // SAFETY: needed because libc has no wrapper. pidfd_getfd(2) takes numbers only; both descriptors
    // are open during the call.
    let copy = unsafe {
        libc::syscall(
            libc::SYS_pidfd_getfd,
            pidfd.as_raw_fd(),
            file.as_raw_fd(),
            0,
        )
    };
    owned(copy).map(drop)
}

/// Makes a TAP with a virtio-net header in the current network namespace.
pub(super) fn tap() -> io::Result<()> {
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    let mut name = [0; libc::IFNAMSIZ];
    for (to, from) in name.iter_mut().zip(b"probe%d") {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let request = libc::ifreq {
        ifr_name: name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: flags as libc::c_short,
        },
    };
    // SAFETY: `request` is a live `struct ifreq` for the whole call. The header declares the number with
    // the size of an int although the kernel reads a whole `struct ifreq`, which this is.
    unsafe { raw::tunsetiff(tun.as_raw_fd(), &raw const request) }?;
    Ok(())
}

fn bpf(command: libc::c_int, attr: *const libc::c_void, size: usize) -> io::Result<OwnedFd> {
    // SAFETY: needed because libc has no wrapper. Both callers pass a pointer to a live `#[repr(C)]`
    // struct of exactly `size` bytes, which the kernel only reads; both commands return a descriptor.
    owned(unsafe { libc::syscall(libc::SYS_bpf, command, attr, size) })
}

/// Loads a program that does nothing and attaches it to a device's tcx egress, as a link.
pub(super) fn tcx(ifindex: u32) -> io::Result<()> {
    let load = ProgLoad {
        prog_type: BPF_PROG_TYPE_SCHED_CLS,
        insn_cnt: 2,
        insns: PASS.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        expected_attach_type: BPF_TCX_EGRESS,
        ..ProgLoad::default()
    };
    let program = bpf(
        BPF_PROG_LOAD,
        (&raw const load).cast(),
        size_of::<ProgLoad>(),
    )?;
    let link = LinkCreate {
        prog_fd: program.as_raw_fd().unsigned_abs(),
        target_ifindex: ifindex,
        attach_type: BPF_TCX_EGRESS,
        ..LinkCreate::default()
    };
    bpf(
        BPF_LINK_CREATE,
        (&raw const link).cast(),
        size_of::<LinkCreate>(),
    )
    .map(drop)
}

/// Opens a packet socket with virtio-net headers and marks.
pub(super) fn packet_socket() -> io::Result<()> {
    // SAFETY: socket(2) takes numbers only.
    let socket = owned(libc::c_long::from(unsafe {
        libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0)
    }))?;
    let options = [
        (libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1),
        (libc::SOL_SOCKET, libc::SO_MARK, INJECTED_MARK),
        (libc::SOL_SOCKET, libc::SO_PRIORITY, INJECTED_PRIORITY),
    ];
    for (level, option, value) in options {
        // SAFETY: needed because nix has no wrapper for these options on sockets of this kind. The value is a live int, and its
        // size is passed; the socket is open during the call.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                level,
                option,
                (&raw const value).cast(),
                size_of_val(&value) as libc::socklen_t,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
