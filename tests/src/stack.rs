//! A guest that is a namespace with a TCP stack of its own, and connections between namespaces.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context, ensure};

use crate::netns::{Netns, open_tap};

/// Longest silence of a socket on a busy machine.
const PATIENCE: Duration = Duration::from_secs(15);
/// More than any queue on the way holds.
const MUCH: usize = 300_000;

/// The guest: a namespace behind a TAP, which is its `eth0`.
#[derive(Debug)]
pub struct Stack {
    /// The namespace.
    pub netns: Netns,
    /// The TAP's other end, with a virtio-net header.
    pub tap: OwnedFd,
}

impl Stack {
    /// Makes one; `mac` and `mtu` as `ip link` takes them. It has no address yet.
    ///
    /// # Errors
    /// The kernel refuses.
    ///
    /// # Panics
    /// The namespace cannot be entered.
    pub fn new(mac: &str, mtu: u32) -> anyhow::Result<Self> {
        let netns = Netns::new()?;
        let tap = netns.spawn(|| open_tap("eth0")).join().expect("a thread")?;
        netns.ip(&format!("link set eth0 address {mac} mtu {mtu} up"))?;
        Ok(Self { netns, tap })
    }
}

/// Both ends of a connection.
#[derive(Debug)]
pub struct Connection(TcpStream, TcpStream);

impl Connection {
    /// From one namespace to another, whose end listens at `at`, and is asked for at `to`.
    ///
    /// # Errors
    /// It is not accepted.
    ///
    /// # Panics
    /// A namespace cannot be entered.
    pub fn open(from: &Netns, to: &str, there: &Netns, at: &str) -> anyhow::Result<Self> {
        let (to, at): (SocketAddr, SocketAddr) = (to.parse()?, at.parse()?);
        let listener = there.spawn(move || TcpListener::bind(at)).join();
        let listener = listener.expect("a thread")?;
        let asks = from.spawn(move || TcpStream::connect_timeout(&to, PATIENCE));
        let asks = asks.join().expect("a thread");
        let asks = asks.with_context(|| format!("to {to}"))?;
        let (answers, _) = listener.accept()?;
        for end in [&asks, &answers] {
            end.set_read_timeout(Some(PATIENCE))?;
            end.set_write_timeout(Some(PATIENCE))?;
        }
        Ok(Self(asks, answers))
    }

    /// Much goes from each end to the other.
    ///
    /// # Errors
    /// It does not.
    ///
    /// # Panics
    /// The thread that sends has.
    pub fn lives_on(&self) -> anyhow::Result<()> {
        for (from, mut to) in [(&self.0, &self.1), (&self.1, &self.0)] {
            let mut from = from.try_clone()?;
            let sends = std::thread::spawn(move || from.write_all(&[7; MUCH]));
            let mut came = vec![0; MUCH];
            to.read_exact(&mut came)?;
            ensure!(came.iter().all(|byte| *byte == 7));
            sends.join().expect("a thread")?;
        }
        Ok(())
    }

    /// The end that asked.
    pub fn asker(&self) -> &TcpStream {
        &self.0
    }

    /// Whom the end that answers sees.
    ///
    /// # Errors
    /// It is not connected.
    pub fn peer(&self) -> anyhow::Result<SocketAddr> {
        Ok(self.1.peer_addr()?)
    }
}

/// A namespace that is no node, on the nodes' network: 10.78.0.9 and fd78::9. Its end of the cable at the bridge `sw0` of `switch` is `p9`.
///
/// # Errors
/// The kernel refuses.
pub fn world(switch: &Netns) -> anyhow::Result<Netns> {
    let world = Netns::new()?;
    world.ip(&format!(
        "link add eth0 type veth peer name p9 netns {}",
        switch.path().display()
    ))?;
    switch.ip("link set p9 master sw0 up")?;
    world.ip("link set eth0 up")?;
    world.ip("addr add 10.78.0.9/24 dev eth0")?;
    world.ip("addr add fd78::9/64 dev eth0 nodad")?;
    Ok(world)
}
