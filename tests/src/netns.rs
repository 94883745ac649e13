//! Network namespaces and BPF file systems that vanish with their guard, also when a test panics.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context, ensure};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

/// Fails the test unless it runs as root: a skipped test of the dataplane proves nothing.
///
/// # Panics
/// Not root.
pub fn require_root() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test makes network namespaces and loads BPF programs: run it as root (`cargo xtask test`)"
    );
}

/// An anonymous network namespace, with its loopback up. It lives as long as this guard and the
/// threads inside.
#[derive(Debug)]
pub struct Netns {
    fd: OwnedFd,
}

impl Netns {
    /// Makes one.
    ///
    /// # Errors
    /// Not root, or the kernel has no network namespaces.
    pub fn new() -> anyhow::Result<Self> {
        let made = std::thread::spawn(|| -> io::Result<OwnedFd> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Ok(std::fs::File::open("/proc/thread-self/ns/net")?.into())
        });
        let fd = join(made).context("could not make a network namespace")?;
        let netns = Self { fd };
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// One with a bridge, `sw0`, that hands every frame on in the order in which it came, see [`keeps_order`](Self::keeps_order).
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn switch() -> anyhow::Result<Self> {
        let switch = Self::new()?;
        switch.keeps_order()?;
        switch.ip("link add sw0 type bridge forward_delay 0")?;
        switch.ip("link set sw0 up")?;
        Ok(switch)
    }

    /// As [`xtask::netns::keep_order`], inside.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn keeps_order(&self) -> anyhow::Result<()> {
        match self.spawn(xtask::netns::keep_order).join() {
            Ok(kept) => kept,
            Err(_) => anyhow::bail!("the thread in the namespace panicked"),
        }
    }

    /// A path that `ip link set ... netns` takes.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.fd.as_raw_fd()).into()
    }

    /// Runs `work` on a thread inside.
    ///
    /// # Panics
    /// The namespace cannot be entered.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let fd = self.fd.try_clone().expect("a descriptor of the namespace");
        std::thread::spawn(move || {
            setns(fd.as_fd(), CloneFlags::CLONE_NEWNET).expect("enter the namespace");
            work()
        })
    }

    /// Takes the calling thread inside, for good.
    ///
    /// # Panics
    /// The namespace cannot be entered.
    pub fn enter(&self) {
        setns(self.fd.as_fd(), CloneFlags::CLONE_NEWNET).expect("enter the namespace");
    }

    /// Runs a program with these arguments, split at spaces, inside; returns what it printed.
    ///
    /// # Errors
    /// It failed; its message is in the error.
    pub fn run(&self, program: &'static str, arguments: &str) -> anyhow::Result<String> {
        let owned = arguments.to_owned();
        let ran = self.spawn(move || Command::new(program).args(owned.split(' ')).output());
        let output = join(ran).with_context(|| format!("could not run `{program}`"))?;
        ensure!(
            output.status.success(),
            "{program} {arguments}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Sets what is at `key` below /proc/sys.
    ///
    /// # Errors
    /// This kernel does not have it, or refuses.
    pub fn sysctl(&self, key: &str, value: &str) -> anyhow::Result<()> {
        let path = format!("/proc/sys/{key}");
        let (at, value) = (path.clone(), value.to_owned());
        join(self.spawn(move || std::fs::write(at, value)))
            .with_context(|| format!("cannot write {path}"))
    }

    /// Has a veth inside collect what it receives (generic receive offload). Then frames that XDP redirects to its other end come to it.
    ///
    /// # Errors
    /// There is no such device.
    ///
    /// # Panics
    /// The name is too long for a device.
    pub fn collect(&self, device: &'static str) -> anyhow::Result<()> {
        join(self.spawn(|| set_gro(device))).with_context(|| format!("could not set {device} up"))
    }

    /// Runs `ip` with these arguments, split at spaces, inside.
    ///
    /// # Errors
    /// It failed; its message is in the error.
    pub fn ip(&self, arguments: &str) -> anyhow::Result<()> {
        self.run("ip", arguments).map(drop)
    }

    /// What happens to the links inside, from now on.
    ///
    /// # Errors
    /// No netlink socket could be opened.
    pub fn link_news(&self) -> anyhow::Result<LinkNews> {
        let opened = self.spawn(|| -> io::Result<OwnedFd> {
            let socket = socket(
                AddressFamily::Netlink,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC,
                SockProtocol::NetlinkRoute,
            )?;
            // linux/rtnetlink.h: the states of a bridge's ports come in this group as well.
            let group = NetlinkAddr::new(0, libc::RTMGRP_LINK as u32);
            bind(socket.as_raw_fd(), &group)?;
            Ok(socket)
        });
        let socket = join(opened).context("could not listen to the links of a namespace")?;
        Ok(LinkNews { socket })
    }
}

/// A netlink socket (rtnetlink(7)) that hears of every change of a namespace's links.
#[derive(Debug)]
pub struct LinkNews {
    socket: OwnedFd,
}

impl LinkNews {
    /// Waits until something has changed since the last call, or since the socket was opened.
    ///
    /// # Errors
    /// Nothing has at `until`.
    pub fn wait(&self, until: Instant) -> anyhow::Result<()> {
        let left = until.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut fds, PollTimeout::try_from(left)?)?;
        ensure!(ready > 0, "no link has changed in time");
        // Whoever waits looks at the links themselves: what the messages say is of no interest.
        let mut buffer = [0; 1 << 14];
        loop {
            match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                // More news than the socket holds are news.
                Ok(_) | Err(Errno::ENOBUFS | Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(()),
                Err(error) => return Err(error).context("could not read the news of the links"),
            }
        }
    }
}

fn join<T>(thread: JoinHandle<io::Result<T>>) -> io::Result<T> {
    thread
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// A folder to mount a BPF file system on; unmounted with the guard.
#[derive(Debug)]
pub struct BpfDir {
    dir: tempfile::TempDir,
}

impl BpfDir {
    /// Makes the folder; whoever opens it mounts it.
    ///
    /// # Errors
    /// No temporary folder could be made.
    pub fn new() -> io::Result<Self> {
        let dir = tempfile::Builder::new().prefix("migrator-bpf-").tempdir()?;
        Ok(Self { dir })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for BpfDir {
    fn drop(&mut self) {
        // Not mounted if the test failed early.
        let _ = umount2(self.dir.path(), MntFlags::MNT_DETACH);
    }
}

/// Makes a TAP with a virtio-net header of 10 bytes, in the namespace of the calling thread. It lives as long as its descriptor.
///
/// # Errors
/// The kernel refuses.
///
/// # Panics
/// The name is too long for a device.
pub fn open_tap(name: &str) -> io::Result<OwnedFd> {
    // SAFETY: `ifreq` is plain old data: all zeroes are a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    assert!(name.len() < request.ifr_name.len(), "`{name}` is too long");
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    let tap = std::fs::File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: `request` is a whole `ifreq` that lives through the call, which reads it and writes its name back.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(tap.into())
}

/// What `ethtool -K DEVICE gro on` does.
fn set_gro(device: &str) -> io::Result<()> {
    /// linux/ethtool.h `struct ethtool_value`.
    #[repr(C)]
    struct EthtoolValue {
        command: u32,
        data: u32,
    }
    /// linux/ethtool.h.
    const ETHTOOL_SGRO: u32 = 0x2c;
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    let mut value = EthtoolValue {
        command: ETHTOOL_SGRO,
        data: 1,
    };
    // SAFETY: `ifreq` is plain old data: all zeroes are a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    assert!(
        device.len() < request.ifr_name.len(),
        "`{device}` is too long"
    );
    for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: `request` is a whole `ifreq` that lives through the call, and so does the value that it points to.
    let result =
        unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as _, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// linux/if_tun.h: checksums and TCP segmentation.
const OFFLOADS: libc::c_ulong = 0x01 | 0x02 | 0x04 | 0x08;

/// Lets a TAP's reader take TCP segments whole, as a VMM does for a guest that can.
///
/// # Errors
/// The descriptor is no TAP.
pub fn take_segments_whole(tap: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: `TUNSETOFFLOAD` takes a number, not a pointer.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD as _, OFFLOADS) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sets the length of the virtio-net header of a TAP; QEMU makes it 12.
///
/// # Errors
/// The descriptor is no TAP, or the kernel does not know that length.
pub fn set_vnet_header(tap: BorrowedFd<'_>, len: libc::c_int) -> io::Result<()> {
    // SAFETY: `TUNSETVNETHDRSZ` reads one `int`, which lives through the call.
    let result = unsafe {
        libc::ioctl(
            tap.as_raw_fd(),
            libc::TUNSETVNETHDRSZ as _,
            std::ptr::from_ref(&len),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
