//! What one would write with sockets alone: one takes frames off a device that is no port of a bridge, and keeps them; another one sends them
//! into a TAP. It keeps no order against newer frames, knows no flows, and writes nothing down.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use clap::ValueEnum;
use migrator::network::{VNET_HEADER, tap_name};
use migrator_tests::bpf::{Attached, Map, MapType, Program, immediate, instruction};
use migrator_tests::netns::open_tap;
use migrator_tests::packet::PacketSocket;
use migrator_tests::xsk::XdpSocket;
use nix::net::if_::if_nametoindex;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::frames::{number_in, number_of};
use crate::ground::{BARE, Ground, RAW};
use crate::guest::BUFFER;
use crate::schedule::{Place, settle};
use crate::sender::{self, send};

/// What the plain socket may keep in the kernel: a hold of the largest frames.
const SOCKET_BUFFER: usize = 1 << 30;
/// linux/bpf.h: `XDP_PASS`, and the helper's number.
const PASS: i32 = 2;
const REDIRECT_MAP: i32 = 51;

/// The TAP that frames are kept in.
const KEPT: &str = "kept0";

/// Which sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sockets {
    /// AF_PACKET to receive and to send
    Packet,
    /// AF_XDP in copy mode to receive and to send
    Xdp,
    /// A TAP that XDP redirects to, and AF_PACKET to send
    Tap,
}

/// The device that frames come in by.
pub(crate) struct Plain {
    sockets: Sockets,
    map: Map<4>,
    _attached: Option<Attached>,
}

impl Plain {
    /// With a program on the device if frames are `made`, as a veth without one takes none that the kernel makes. It redirects to the
    /// socket if there is one.
    ///
    /// # Errors
    /// The kernel lacks something.
    pub(crate) fn new(ground: &Ground, sockets: Sockets, made: bool) -> Result<Plain> {
        ground.within(|| {
            let map_type = match sockets {
                Sockets::Packet | Sockets::Xdp => MapType::Xsk,
                Sockets::Tap => MapType::Dev,
            };
            let map = Map::<4>::new(map_type, 1)?;
            let program = [
                instruction(0x61, 2, 1, 16, 0),              // r2 = the receive queue
                instruction(0x18, 1, 1, 0, immediate(&map)), // r1 = the map
                instruction(0, 0, 0, 0, 0),                  //
                instruction(0xb7, 3, 0, 0, PASS),            // r3 = without a socket: XDP_PASS
                instruction(0x85, 0, 0, 0, REDIRECT_MAP),    // r0 = bpf_redirect_map(r1, r2, r3)
                instruction(0x95, 0, 0, 0, 0),               // exit
            ];
            let program = Program::load(&program)?;
            let attached = made.then(|| program.attach(if_nametoindex(RAW)?));
            let attached = attached.transpose()?;
            Ok(Plain {
                sockets,
                map,
                _attached: attached,
            })
        })
    }

    /// Begins to keep what comes in by the device.
    ///
    /// # Errors
    /// There is no such socket.
    pub(crate) fn keep(&self, ground: &Ground) -> Result<Keeper> {
        let runs = Arc::new(AtomicBool::new(true));
        let goes_on = Arc::clone(&runs);
        let sockets = self.sockets;
        let mut inlet = ground.within(|| -> Result<Inlet> {
            Ok(match sockets {
                Sockets::Packet => Inlet::Packet(PacketSocket::receiver(RAW, SOCKET_BUFFER)?),
                Sockets::Xdp => {
                    let socket = XdpSocket::receiver(RAW)?;
                    self.map.set(0, immediate(&socket).to_ne_bytes())?;
                    Inlet::Xdp(socket)
                }
                Sockets::Tap => {
                    let tap = open_tap(KEPT)?;
                    ground
                        .netns
                        .ip(&format!("link set {KEPT} txqueuelen 65536 up"))?;
                    self.map.set(0, if_nametoindex(KEPT)?.to_ne_bytes())?;
                    Inlet::Tap(tap)
                }
            })
        })?;
        let thread = std::thread::spawn(move || inlet.keep(&goes_on));
        Ok(Keeper { runs, thread })
    }

    /// Sends all frames into the TAP of the port without programs, and returns when that began.
    ///
    /// # Errors
    /// The TAP does not take them.
    pub(crate) fn inject(&self, ground: &Ground, kept: &[Box<[u8]>]) -> Result<Instant> {
        let tap = tap_name(BARE);
        ground.within(|| {
            settle(Place::Receiver)?;
            match self.sockets {
                Sockets::Packet | Sockets::Tap => {
                    let socket = PacketSocket::sender(&tap, sender::BUFFER)?;
                    let begun = Instant::now();
                    kept.iter().try_for_each(|frame| send(&socket, frame))?;
                    Ok(begun)
                }
                Sockets::Xdp => {
                    let mut socket = XdpSocket::sender(&tap)?;
                    let begun = Instant::now();
                    for frame in kept {
                        socket.send(&frame[VNET_HEADER..])?;
                    }
                    socket.flush()?;
                    Ok(begun)
                }
            }
        })
    }
}

enum Inlet {
    Packet(PacketSocket),
    Xdp(XdpSocket),
    Tap(OwnedFd),
}

impl Inlet {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Inlet::Packet(socket) => socket.as_fd(),
            Inlet::Xdp(socket) => socket.as_fd(),
            Inlet::Tap(tap) => tap.as_fd(),
        }
    }

    fn take(&mut self, buffer: &mut [u8], kept: &mut Vec<Box<[u8]>>) -> Result<()> {
        match self {
            Inlet::Packet(socket) => {
                while let Some(length) = socket.receive(buffer)? {
                    let frame = &buffer[..length];
                    if number_of(frame).is_some() {
                        kept.push(frame.into());
                    }
                }
            }
            Inlet::Tap(tap) => {
                while let Ok(length) = nix::unistd::read(tap.as_fd(), buffer) {
                    let frame = &buffer[..length];
                    if number_of(frame).is_some() {
                        kept.push(frame.into());
                    }
                }
            }
            Inlet::Xdp(socket) => {
                socket.receive(|frame| {
                    if number_in(frame).is_some() {
                        kept.push([&[0; VNET_HEADER], frame].concat().into());
                    }
                });
            }
        }
        Ok(())
    }

    /// Until nobody sends any more and none is left.
    fn keep(&mut self, goes_on: &AtomicBool) -> Result<Vec<Box<[u8]>>> {
        settle(Place::Receiver)?;
        let mut buffer = vec![0; BUFFER];
        let mut kept = Vec::new();
        loop {
            // Asked first, so that what came before the end is still taken.
            let last = !goes_on.load(Ordering::Acquire);
            self.take(&mut buffer, &mut kept)?;
            if last {
                return Ok(kept);
            }
            let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(5u8))?;
        }
    }
}

/// The thread that keeps.
pub(crate) struct Keeper {
    runs: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<Box<[u8]>>>>,
}

impl Keeper {
    /// Ends it, and returns all frames in the order in which they came.
    ///
    /// # Errors
    /// It has failed.
    pub(crate) fn stop(self) -> Result<Vec<Box<[u8]>>> {
        self.runs.store(false, Ordering::Release);
        let kept = self.thread.join();
        kept.map_err(|_| anyhow!("the receiver panicked"))?
            .context("the receiver")
    }
}
