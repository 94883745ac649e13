//! Packet sockets (packet(7)), for those who send to a device or take what crosses it. An unsafe island.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
    sockopt,
};

/// A socket on one device of the calling thread's network namespace. Frames carry a virtio-net header of
/// [`VNET_HEADER`](migrator::network::VNET_HEADER) bytes.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// One that only sends, past the device's qdisc and its tcx programs. Frames on their way may come to `buffer` bytes.
    ///
    /// # Errors
    /// Not root, or there is no such device.
    pub fn sender(device: &str, buffer: usize) -> io::Result<Self> {
        let socket = Self::open(device, None)?;
        setsockopt(&socket.0, sockopt::SndBufForce, &buffer)?;
        socket.enable(libc::PACKET_QDISC_BYPASS)?;
        Ok(socket)
    }

    /// One that gets every frame of the device, and keeps at most `buffer` bytes of them.
    ///
    /// # Errors
    /// Not root, or there is no such device.
    pub fn receiver(device: &str, buffer: usize) -> io::Result<Self> {
        let socket = Self::open(device, Some(SockProtocol::EthAll))?;
        setsockopt(&socket.0, sockopt::RcvBufForce, &buffer)?;
        Ok(socket)
    }

    fn open(device: &str, protocol: Option<SockProtocol>) -> io::Result<Self> {
        let index = nix::net::if_::if_nametoindex(device)?;
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Packet, SockType::Raw, flags, protocol)?;
        let socket = Self(fd);
        socket.enable(libc::PACKET_VNET_HDR)?;
        // SAFETY: `sockaddr_ll` is plain old data: all zeroes are a valid value.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = i32::try_from(index).map_err(|_| Errno::EINVAL)?;
        // Protocol 0 keeps the socket's own.
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

    fn enable(&self, option: libc::c_int) -> io::Result<()> {
        let on: libc::c_int = 1;
        // SAFETY: the option takes one `int`, which lives through the call.
        let result = unsafe {
            libc::setsockopt(
                self.0.as_raw_fd(),
                libc::SOL_PACKET,
                option,
                (&raw const on).cast(),
                size_of_val(&on) as libc::socklen_t,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Gives one frame to the device. False: its queue is full, so try again.
    ///
    /// # Errors
    /// The kernel takes no such frame.
    pub fn send(&self, frame: &[u8]) -> io::Result<bool> {
        match send(self.0.as_raw_fd(), frame, MsgFlags::MSG_DONTWAIT) {
            Ok(_) => Ok(true),
            Err(Errno::ENOBUFS | Errno::EAGAIN | Errno::EINTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Takes one frame; none if none is there. Its length is cut to the buffer's.
    ///
    /// # Errors
    /// The device is gone.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match recv(self.0.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(length) => Ok(Some(length)),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
