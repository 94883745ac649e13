//! The unsafe island of the network: TAP devices, packet sockets, memory-mapped counters, and two calls
//! that the grace period needs. Everything outside it is safe code over the types here.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use aya::maps::{MapData, RingBuf};
use aya_log::EbpfLogger;
use migrator_ebpf::{INJECTED_MARK, INJECTED_PRIORITY};
use nix::errno::Errno;
use nix::sys::socket::MsgFlags;
use tokio::io::unix::AsyncFd;

/// Bytes of `struct virtio_net_hdr` (linux/virtio_net.h), the header that every parked frame keeps.
pub const VNET_HEADER: usize = 10;

/// The largest frame a TAP can hand out: header, Ethernet, and a 64 KiB packet with VLAN tags.
pub(crate) const FRAME_MAX: usize = 64 * 1024 + 128;

/// linux/if_tun.h.
const TUN_DEVICE: &CStr = c"/dev/net/tun";
/// linux/if_tun.h `TUN_F_*`: checksums, TCP segmentation for IPv4 and IPv6, with ECN.
const OFFLOAD_TCP: libc::c_ulong = 0x01 | 0x02 | 0x04 | 0x08;
/// linux/if_tun.h `TUN_F_CSUM`.
const OFFLOAD_CHECKSUM: libc::c_ulong = 0x01;
/// linux/ethtool.h `ETHTOOL_GTSO`.
const ETHTOOL_GTSO: u32 = 0x1e;
/// linux/membarrier.h `MEMBARRIER_CMD_GLOBAL`.
const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;

nix::ioctl_write_ptr_bad!(tun_set_iff, libc::TUNSETIFF, libc::ifreq);
nix::ioctl_read_bad!(tun_get_iff, libc::TUNGETIFF, libc::ifreq);
nix::ioctl_read_bad!(
    tun_get_vnet_header,
    nix::request_code_read!(b'T', 215, size_of::<libc::c_int>()),
    libc::c_int
);
nix::ioctl_write_int_bad!(
    tun_set_offload,
    nix::request_code_write!(b'T', 208, size_of::<libc::c_uint>())
);
nix::ioctl_readwrite_bad!(sioc_ethtool, libc::SIOCETHTOOL, libc::ifreq);

fn interface_request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: `ifreq` is plain old data: all zeroes are a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(Errno::ENAMETOOLONG.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

/// Makes a TAP that keeps the virtio-net header, in the calling thread's network namespace. It lives
/// as long as a descriptor of it.
pub(crate) fn create_tap(name: &str) -> io::Result<OwnedFd> {
    let mut request = interface_request(name)?;
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: a NUL-terminated path; the result is checked before it is owned.
    let fd = unsafe {
        libc::open(
            TUN_DEVICE.as_ptr(),
            libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `open` just returned it, and nobody else knows it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: `request` is a whole `ifreq` that lives through the call, which only reads it.
    unsafe { tun_set_iff(fd.as_raw_fd(), &raw const request) }?;
    Ok(fd)
}

/// The name of the device behind a TAP's descriptor.
pub(crate) fn tap_name(tap: BorrowedFd<'_>) -> io::Result<String> {
    let mut request = interface_request("")?;
    // SAFETY: `request` is a whole `ifreq` that lives through the call, which fills it.
    unsafe { tun_get_iff(tap.as_raw_fd(), &raw mut request) }?;
    let name: Vec<u8> = request.ifr_name.iter().map(|c| *c as u8).collect();
    let name = CStr::from_bytes_until_nul(&name).map_err(|_| Errno::EINVAL)?;
    Ok(name.to_string_lossy().into_owned())
}

/// Bytes in front of each frame of this TAP: 10, or what the VMM has set (QEMU: 12).
pub(crate) fn vnet_header_len(tap: BorrowedFd<'_>) -> io::Result<usize> {
    let mut len: libc::c_int = 0;
    // SAFETY: the call writes one `int`, which lives through it.
    unsafe { tun_get_vnet_header(tap.as_raw_fd(), &raw mut len) }?;
    usize::try_from(len).map_err(|_| Errno::EINVAL.into())
}

/// Lets a park take frames whole that its pod's TAP would take whole, and no others: what is too big
/// for the TAP must be cut by the kernel before it is parked, because the way back in cannot.
pub(crate) fn set_park_offloads(park: BorrowedFd<'_>, segmentation: bool) -> io::Result<()> {
    let flags = if segmentation {
        OFFLOAD_TCP
    } else {
        OFFLOAD_CHECKSUM
    };
    // SAFETY: the argument is a number, not a pointer.
    unsafe { tun_set_offload(park.as_raw_fd(), flags as libc::c_int) }?;
    Ok(())
}

/// Whether a device takes TCP segments that are not cut yet.
pub(crate) fn takes_tcp_segments(name: &str) -> io::Result<bool> {
    /// linux/ethtool.h `struct ethtool_value`.
    #[repr(C)]
    struct EthtoolValue {
        command: u32,
        data: u32,
    }
    let socket = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Inet,
        nix::sys::socket::SockType::Datagram,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let mut value = EthtoolValue {
        command: ETHTOOL_GTSO,
        data: 0,
    };
    let mut request = interface_request(name)?;
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: `request` and the value it points to are whole and live through the call, which writes
    // within the `ethtool_value` that its command stands for.
    unsafe { sioc_ethtool(socket.as_raw_fd(), &raw mut request) }?;
    Ok(value.data != 0)
}

/// The kernel's own grace period (`synchronize_rcu`): some milliseconds. See [`super::grace`].
pub(crate) fn rcu_grace_period() -> io::Result<()> {
    // SAFETY: a system call without memory arguments.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether a frame is one that its device is to cut (linux/virtio_net.h: `gso_type` is the header's second byte, `VIRTIO_NET_HDR_GSO_NONE` 0).
pub(crate) fn is_segment(frame: &[u8]) -> bool {
    frame.get(1).is_some_and(|gso_type| *gso_type != 0)
}

/// What became of a frame that was given to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    /// In its queue.
    Queued,
    /// The queue is full, or takes no such frame yet: try again.
    Full,
    /// The kernel will never take it.
    Refused(Errno),
}

/// A packet socket that only sends, bound to one device.
#[derive(Debug)]
pub(crate) struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// Puts frames into the queue of a TAP, which has no qdisc: past its gate, which passes what has these marks. Frames carry a virtio-net header
    /// of [`VNET_HEADER`] bytes.
    pub(crate) fn injector(ifindex: u32) -> io::Result<Self> {
        let socket = Self::open(ifindex)?;
        socket.set(libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1)?;
        socket.set(libc::SOL_SOCKET, libc::SO_MARK, INJECTED_MARK)?;
        socket.set(libc::SOL_SOCKET, libc::SO_PRIORITY, INJECTED_PRIORITY)?;
        Ok(socket)
    }

    /// Sends plain frames like any local sender, behind what the qdisc holds.
    pub(crate) fn open(ifindex: u32) -> io::Result<Self> {
        // SAFETY: no memory arguments; the result is checked before it is owned. Protocol 0: receives nothing.
        let fd = unsafe {
            libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
                0,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `socket` just returned it, and nobody else knows it.
        let socket = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        // SAFETY: `sockaddr_ll` is plain old data: all zeroes are a valid value.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = i32::try_from(ifindex).map_err(|_| Errno::EINVAL)?;
        // SAFETY: the address lives through the call, and its size is the one given.
        let result = unsafe {
            libc::bind(
                socket.0.as_raw_fd(),
                (&raw const address).cast(),
                size_of_val(&address) as libc::socklen_t,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(socket)
    }

    fn set(&self, level: libc::c_int, option: libc::c_int, value: u32) -> io::Result<()> {
        // SAFETY: the options take one `int` each, which lives through the call.
        let result = unsafe {
            libc::setsockopt(
                self.0.as_raw_fd(),
                level,
                option,
                (&raw const value).cast(),
                size_of_val(&value) as libc::socklen_t,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Gives one frame to the device.
    pub(crate) fn send(&self, frame: &[u8]) -> Sent {
        match nix::sys::socket::send(self.0.as_raw_fd(), frame, MsgFlags::MSG_DONTWAIT) {
            Ok(_) => Sent::Queued,
            Err(
                Errno::ENOBUFS | Errno::EAGAIN | Errno::EINTR | Errno::ENOMEM | Errno::ENETDOWN,
            ) => Sent::Full,
            Err(errno) => Sent::Refused(errno),
        }
    }
}

/// Of a connected UDP socket: its packets leave whole, or the send fails with `EMSGSIZE`.
pub(crate) fn send_whole(socket: BorrowedFd<'_>, v6: bool) -> io::Result<()> {
    let (level, option, value) = match v6 {
        false => (
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            libc::IP_PMTUDISC_DO,
        ),
        true => (
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU_DISCOVER,
            libc::IPV6_PMTUDISC_DO,
        ),
    };
    // SAFETY: the option takes one `int`, which lives through the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// What the kernel knows of the path of a connected UDP socket: the longest packet it takes, in bytes.
pub(crate) fn path_mtu(socket: BorrowedFd<'_>, v6: bool) -> io::Result<u32> {
    let (level, option) = match v6 {
        false => (libc::IPPROTO_IP, libc::IP_MTU),
        true => (libc::IPPROTO_IPV6, libc::IPV6_MTU),
    };
    let mut value: libc::c_int = 0;
    let mut len = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the call writes one `int` and its length, which live through it.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    u32::try_from(value).map_err(|_| Errno::EINVAL.into())
}

/// Makes the programs' log awaitable.
pub(crate) fn watch_logger<T>(logger: EbpfLogger<T>) -> io::Result<AsyncFd<EbpfLogger<T>>>
where
    EbpfLogger<T>: AsRawFd,
{
    // SAFETY: the logger owns the ring buffer's descriptor, gives out always the same one, and closes
    // it only when it is dropped, which is after the registration's end.
    Ok(unsafe { AsyncFd::register(logger) }?)
}

/// Makes a ring buffer awaitable.
pub(crate) fn watch_ring(ring: RingBuf<MapData>) -> io::Result<AsyncFd<RingBuf<MapData>>> {
    // SAFETY: the ring owns the map's descriptor, gives out always the same one, and closes it only when it is dropped, which is
    // after the registration's end.
    Ok(unsafe { AsyncFd::register(ring) }?)
}

/// A BPF array of `u64` in this process's memory.
#[derive(Debug)]
pub(crate) struct MappedWords {
    base: NonNull<AtomicU64>,
    len: usize,
}

// SAFETY: the mapping is shared memory that is only read and written through `AtomicU64`.
unsafe impl Send for MappedWords {}
// SAFETY: as above.
unsafe impl Sync for MappedWords {}

impl MappedWords {
    /// Maps an array of `len` entries that was made with `BPF_F_MMAPABLE`.
    pub(crate) fn map(map: impl AsFd, len: usize) -> io::Result<Self> {
        let bytes = len * size_of::<u64>();
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases no Rust object; the
        // kernel refuses a length beyond the map's own.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_fd().as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(Errno::EFAULT)?;
        Ok(Self { base, len })
    }

    /// One word. `None` beyond the end.
    pub(crate) fn get(&self, index: u32) -> Option<&AtomicU64> {
        let index = usize::try_from(index).ok()?;
        if index >= self.len {
            return None;
        }
        // SAFETY: within the mapping, which is page-aligned, holds `len` words and lives as long as
        // `self`; the kernel's side changes them by whole aligned words only.
        Some(unsafe { self.base.add(index).as_ref() })
    }
}

impl Drop for MappedWords {
    fn drop(&mut self) {
        // SAFETY: the range that `map` got; no reference into it outlives `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len * size_of::<u64>()) };
    }
}
