//! The virtio-serial port: bytes in, bytes out, never blocking, whatever the host does.
//!
//! The port lives on when the host's side goes away and comes back, as it does when the service
//! restarts or the VM moves: a read then returns 0, a write EAGAIN or EPIPE, and poll(2) says POLLHUP
//! all the time. So readiness comes edge-triggered from an epoll of its own, which wakes for every
//! change; [`Port::fd`] is that epoll, to be put into the agent's poll set.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use guest_agent::protocol::PORT_NAME;
use guest_agent::protocol::frame::{Decoder, Frame};
use guest_agent::protocol::link::GuestLink;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// How long the host's devices may take to show up.
const PATIENCE: Duration = Duration::from_secs(20);

/// Frames are taken from the link only while fewer bytes than this wait for the port.
const LOW_WATER: usize = 64 << 10;

pub(crate) struct Port {
    file: File,
    ready: Epoll,
    decoder: Decoder,
    pending: Vec<u8>,
    written: usize,
}

impl Port {
    /// Waits for the port and opens it.
    pub(crate) fn open() -> Result<Self> {
        let path = find()?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(&path)
            .with_context(|| format!("opening the agent's port {}", path.display()))?;
        let ready = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("making an epoll")?;
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
        ready
            .add(&file, EpollEvent::new(flags, 0))
            .context("watching the agent's port")?;
        Ok(Self {
            file,
            ready,
            decoder: Decoder::new(),
            pending: Vec::new(),
            written: 0,
        })
    }

    /// Readable when something about the port has changed: then call [`Self::read`] and [`Self::write`].
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.ready.0.as_fd()
    }

    /// Whether bytes wait for the host. An edge may be lost when the VM moves, so look again in a while.
    pub(crate) fn has_pending(&self) -> bool {
        self.written < self.pending.len()
    }

    /// Takes what the host has sent.
    pub(crate) fn read(&mut self) -> Vec<Frame> {
        let mut events = [EpollEvent::empty(); 4];
        self.ready.wait(&mut events, EpollTimeout::ZERO).ok();
        let mut frames = Vec::new();
        let mut buffer = [0u8; 16 << 10];
        loop {
            match self.file.read(&mut buffer) {
                Ok(0) => return frames,
                Ok(n) => self.decoder.push(&buffer[..n], |f| frames.push(f)),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return frames,
            }
        }
    }

    /// Forgets bytes that were meant for an earlier connection.
    pub(crate) fn clear(&mut self) {
        self.pending.clear();
        self.written = 0;
    }

    /// Writes what the link has to say, as far as the host takes it.
    pub(crate) fn write(&mut self, link: &mut GuestLink) {
        loop {
            while self.pending.len() - self.written < LOW_WATER && link.pull(&mut self.pending) {}
            if !self.has_pending() {
                self.clear();
                return;
            }
            match self.file.write(&self.pending[self.written..]) {
                Ok(n) => self.written += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        self.pending.drain(..self.written);
        self.written = 0;
    }
}

fn find() -> Result<PathBuf> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        // The directory appears with the module, the port when the device has told its name.
        for entry in fs::read_dir("/sys/class/virtio-ports")
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            let device = PathBuf::from("/dev").join(entry.file_name());
            if name.trim_end() == PORT_NAME && device.exists() {
                return Ok(device);
            }
        }
        if Instant::now() > deadline {
            bail!(
                "the VM has no virtio-serial port named {PORT_NAME}: add one to its command line"
            );
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
