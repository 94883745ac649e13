//! The first process of a container: what it does before it knows which container that is, and after.
//!
//! A template has one that waits. In the guests that start from it, it is told what it is to become, and gets the mounts and streams for
//! that: so they need not make new namespaces, which takes some 50 ms under emulation.

use std::ffi::CString;
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};
use guest_agent::protocol::message::Configuration;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::unistd::{Pid, sethostname};
use serde::{Deserialize, Serialize};

use crate::cgroups::Cgroup;
use crate::disks::{Root, Volume};
use crate::furniture::Devices;
use crate::launch::{self, Program, Stdio};
use crate::{etc, rootfs, sys};

/// What a container's first process is to become.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) home: Home,
    pub(crate) program: Program,
}

/// What is around the program.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Home {
    pod: Configuration,
    volumes: Vec<(String, bool)>,
    read_only: bool,
}

impl Home {
    pub(crate) fn new(pod: &Configuration, volumes: &[Volume], read_only: bool) -> Self {
        let volumes = volumes.iter().map(|v| (v.path.clone(), v.read_only));
        Self {
            pod: pod.clone(),
            volumes: volumes.collect(),
            read_only,
        }
    }
}

/// What it gets for that.
pub(crate) struct Things {
    /// Copies of mounts, attached nowhere: of the root, then of each volume.
    pub(crate) mounts: Vec<OwnedFd>,
    pub(crate) stdio: Stdio,
    /// Where it tells why it has come to nothing.
    pub(crate) tell: OwnedFd,
}

/// Copies of the mounts of a container's root and volumes, which are the agent's.
pub(crate) fn mounts(root: &Root, volumes: &[Volume]) -> Result<Vec<OwnedFd>> {
    let path = CString::new(root.path.as_os_str().as_bytes()).context("a path with a NUL in it")?;
    let root = sys::clone_mount(&path).context("copying the mount of the root");
    let volumes = volumes.iter().map(|volume| {
        let mount = sys::clone_mount(&volume.source);
        mount.with_context(|| format!("copying the mount of {}", volume.path))
    });
    std::iter::once(root).chain(volumes).collect()
}

/// Forks into new namespaces. `None` in the child.
pub(crate) fn fork(cgroup: BorrowedFd<'_>) -> std::io::Result<Option<(Pid, OwnedFd)>> {
    sys::fork_into(
        libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWUTS | libc::CLONE_NEWIPC,
        cgroup,
    )
}

/// What such a child does.
pub(crate) fn become_program(devices: &Devices, order: Order, things: Things) -> ! {
    go_on(Ready::new(devices), order, things)
}

fn go_on(ready: Result<Ready>, order: Order, things: Things) -> ! {
    let read_only = order.home.read_only;
    let there = ready.and_then(|ready| ready.enter(order.home, things.mounts));
    let program = order.program;
    program.execute(there, read_only, &things.stdio, things.tell)
}

/// A first process that does not know its container yet.
struct Ready {
    furniture: rootfs::Furniture,
    disguise: rootfs::Disguise,
}

impl Ready {
    fn new(devices: &Devices) -> Result<Self> {
        launch::begin()?;
        // Only now: the new namespace begins where the process is, and it was born into the container's cgroup.
        unshare(CloneFlags::CLONE_NEWCGROUP).context("making a cgroup namespace")?;
        Ok(Self {
            furniture: rootfs::Furniture::copy(devices)?,
            disguise: rootfs::Disguise::copy()?,
        })
    }

    /// Moves into its container.
    fn enter(self, home: Home, mounts: Vec<OwnedFd>) -> Result<()> {
        let mut mounts = mounts.into_iter();
        let root = mounts.next().context("there is no root")?;
        ensure!(
            mounts.len() == home.volumes.len(),
            "there are {} volumes in place of {}",
            mounts.len(),
            home.volumes.len()
        );
        sethostname(&home.pod.hostname).context("setting the host name")?;
        rootfs::enter(&root, self.furniture)?;
        self.disguise.put_on()?;
        for ((path, read_only), mount) in home.volumes.iter().zip(mounts) {
            rootfs::attach_volume(path, *read_only, &mount)?;
        }
        etc::write(&home.pod)
    }
}

/// A first process that waits to be told what it is to become. It ends if nobody does.
#[derive(Debug)]
pub(crate) struct Waiting {
    pid: Pid,
    pidfd: OwnedFd,
    link: UnixStream,
}

impl Waiting {
    /// Forks one, for the container that will have these devices.
    pub(crate) fn fork(cgroup: &Cgroup, devices: &Devices) -> Result<Self> {
        let (link, other) = UnixStream::pair().context("making a pair of sockets")?;
        if let Some((pid, pidfd)) = fork(cgroup.dir().as_fd())? {
            return Ok(Self { pid, pidfd, link });
        }
        drop(link);
        let ready = Ready::new(devices);
        // Nobody has told anything, or it makes no sense: there is nobody to say so to.
        let Some((order, things)) = listen(other) else {
            sys::exit_now(127);
        };
        go_on(ready, order, things)
    }

    /// Tells it. Its pid and pidfd.
    ///
    /// # Errors
    /// It is not there any more.
    pub(crate) fn tell(mut self, order: &Order, things: &Things) -> Result<(Pid, OwnedFd)> {
        let order = postcard::to_allocvec(order)?;
        let stdio: &[OwnedFd] = match &things.stdio {
            Stdio::Pipes(all) => all,
            Stdio::Terminal(slave) => std::slice::from_ref(slave),
        };
        let all = std::iter::once(&things.tell)
            .chain(stdio)
            .chain(&things.mounts);
        let fds: Vec<_> = all.map(AsRawFd::as_raw_fd).collect();
        // How long the order is, and how many of the descriptors are streams.
        let mut head = (order.len() as u32).to_ne_bytes().to_vec();
        head.push(stdio.len() as u8);
        let rights = [ControlMessage::ScmRights(&fds)];
        let (link, slices) = (self.link.as_raw_fd(), [IoSlice::new(&head)]);
        sendmsg::<()>(link, &slices, &rights, MsgFlags::empty(), None)?;
        self.link.write_all(&order)?;
        Ok((self.pid, self.pidfd))
    }
}

fn listen(mut link: UnixStream) -> Option<(Order, Things)> {
    let mut head = [0; 5];
    let mut fds = sys::receive(link.as_fd(), &mut head).ok()?.into_iter();
    let [a, b, c, d, streams] = head;
    let mut order = vec![0; u32::from_ne_bytes([a, b, c, d]) as usize];
    link.read_exact(&mut order).ok()?;
    let tell = fds.next()?;
    let stdio = match streams {
        1 => Stdio::Terminal(fds.next()?),
        _ => Stdio::Pipes([fds.next()?, fds.next()?, fds.next()?]),
    };
    let things = Things {
        mounts: fds.collect(),
        stdio,
        tell,
    };
    Some((postcard::from_bytes(&order).ok()?, things))
}
