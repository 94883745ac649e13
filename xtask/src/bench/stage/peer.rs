//! The guest under QEMU alone: the same kernel, devices and load as under migrator, moved by QEMU's own migration over the
//! same link.

mod args;
mod course;
mod mirror;
mod qemu;
mod replace;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tokio::sync::broadcast::{Receiver, error::RecvError};
use tokio::time::{Instant, timeout_at};
use vm_runtime::agent_client::{AgentClient, OutputSink, Stream};
use vm_runtime::pod::PodSpec;
use vm_runtime::qmp::QmpEvent;

pub(in crate::bench) use self::args::Memory;
use self::args::{Incoming, TLS_CLIENT, TLS_SERVER};
use self::course::{Course, Side};
use self::qemu::Qemu;
pub(in crate::bench) use self::qemu::{Ground, TAPS};
use super::load::Load;
use super::pod::Guest;
use super::{BOOTS_WITHIN, DOWNTIME_LIMIT_MS, MOVES_WITHIN, Moved};
use crate::lab::Node;
use crate::probe::now_us;

/// Where the destination listens in its namespace.
const PORT: u16 = 7790;
/// More than any link has: no limit.
const UNLIMITED: u64 = 1 << 40;
/// QEMU's default, and ours.
const MULTIFD_CHANNELS: u32 = 2;

/// A QEMU that was just started listens within this.
const SOON: Duration = Duration::from_secs(30);

/// How QEMU migrates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::bench) struct How {
    /// Pages go over several connections.
    pub(in crate::bench) multifd: bool,
    /// With certificates on both sides.
    pub(in crate::bench) tls: bool,
    /// Post-copy from the start, with a connection of its own for faults.
    pub(in crate::bench) postcopy: bool,
}

/// The guest, or nothing if it has died.
pub(in crate::bench) struct Peer {
    ground: Arc<Ground>,
    guest: Guest,
    spec: PodSpec,
    memory: Memory,
    running: Option<Qemu>,
    /// Its load.
    pub(in crate::bench) load: Load,
}

impl Peer {
    /// Boots the guest on node a, and waits until its load answers.
    ///
    /// # Errors
    /// It does not start.
    pub(in crate::bench) fn start(
        ground: &Arc<Ground>,
        guest: Guest,
        memory: Memory,
    ) -> Result<Peer> {
        let (spec, told) = guest.plan()?;
        let mut peer = Peer {
            ground: Arc::clone(ground),
            guest,
            spec,
            memory,
            running: None,
            load: Load::new(&ground.lab.client(), guest.load())?,
        };
        peer.make_disk()?;
        let mut qemu = peer.spawn(Node::A, 0, Incoming::Boot)?;
        qemu.connect()?;
        let containers = async {
            let silent = Arc::new(Silent);
            let agent = AgentClient::connect(&qemu.agent_socket(), silent, BOOTS_WITHIN).await?;
            agent.configure(told).await?;
            agent.start_pod().await?;
            anyhow::Ok(())
        };
        let started = ground.runtime.block_on(containers);
        started
            .and_then(|()| peer.load.await_ready(BOOTS_WITHIN))
            .with_context(|| qemu.last_words())?;
        peer.running = Some(qemu);
        Ok(peer)
    }

    /// The guest, if it runs and its load answers.
    pub(in crate::bench) fn well(mut self) -> Option<Peer> {
        let alive = self.running.as_mut().is_some_and(Qemu::is_alive);
        (alive && self.load.report().is_ok()).then_some(self)
    }

    /// The guest.
    pub(in crate::bench) fn guest(&self) -> Guest {
        self.guest
    }

    fn spawn(&self, node: Node, tap: usize, incoming: Incoming<'_>) -> Result<Qemu> {
        let disk_mib = self.guest.disk_mib;
        let (ground, spec) = (&self.ground, &self.spec);
        Qemu::spawn(ground, spec, node, tap, self.memory, incoming, disk_mib)
    }

    fn take(&mut self) -> Result<Qemu> {
        self.running.take().context("the peer's guest has died")
    }

    /// The guest runs there, and answers. QEMU 7.2's guests sometimes panic after a move: the process ends, or nobody answers.
    fn arrived(&mut self, mut destination: Qemu) -> Result<()> {
        self.load
            .report()
            .with_context(|| destination.last_words())?;
        ensure!(destination.is_alive(), "{}", destination.last_words());
        self.running = Some(destination);
        Ok(())
    }

    /// Moves the guest to the other node.
    ///
    /// # Errors
    /// It does not arrive, or does not answer there. The guest is gone then.
    pub(in crate::bench) fn migrate(&mut self, how: How) -> Result<Moved> {
        let source = self.take()?;
        let requested_at = now_us();
        let destination = self.destination(&source, how)?;
        let mut watch = Watch::new(&source, &destination)?;
        let begun_at = self.begin(&source, how, UNLIMITED)?;
        let deadline = Instant::now() + MOVES_WITHIN;
        let moved = watch.until(&self.ground.runtime, deadline, |course| {
            course.moved(requested_at, begun_at)
        });
        let moved = moved
            .with_context(|| format!("{}; {}", source.last_words(), destination.last_words()))?;
        drop(source);
        self.arrived(destination)?;
        Ok(moved)
    }

    /// Stops the guest for so long, and lets it go on where it is.
    ///
    /// # Errors
    /// QEMU refuses, or the guest does not answer afterwards.
    pub(in crate::bench) fn stop_and_go_on(&mut self, pause: Duration) -> Result<Moved> {
        let qemu = self.running.as_ref().context("the peer's guest has died")?;
        qemu.execute("stop", Value::Null)?;
        let (stopped_at, begun) = (now_us(), Instant::now());
        std::thread::sleep(pause);
        qemu.execute("cont", Value::Null)?;
        let downtime_ms = begun.elapsed().as_secs_f64() * 1e3;
        self.load.report().with_context(|| qemu.last_words())?;
        Ok(Moved::on_the_spot(stopped_at, downtime_ms))
    }

    /// Begins to move the guest at `bytes_per_s`, runs `during` while pages are copied, and cancels: it stays where it is.
    ///
    /// # Errors
    /// The migration does not begin, is over before `during`, or `during` fails.
    pub(in crate::bench) fn while_copied<T>(
        &mut self,
        bytes_per_s: u64,
        during: impl FnOnce(&Load) -> Result<T>,
    ) -> Result<T> {
        let how = How::default();
        let source = self.take()?;
        let destination = self.destination(&source, how)?;
        let mut watch = Watch::new(&source, &destination)?;
        self.begin(&source, how, bytes_per_s)?;
        let soon = || Instant::now() + MOVES_WITHIN;
        let runtime = &self.ground.runtime;
        watch.until(runtime, soon(), |course| course.is_active.then_some(()))?;
        let result = during(&self.load)?;
        watch.drain();
        ensure!(
            watch.course.stopped_at.is_none(),
            "the migration was over before the measurement"
        );
        source.execute("migrate_cancel", Value::Null)?;
        // It ends as cancelled, which a course takes for the failure that it is elsewhere.
        match watch.until(runtime, soon(), |_| None::<()>) {
            Err(_) if watch.course.stopped_at.is_none() => {}
            Err(error) => return Err(error),
            Ok(()) => bail!("a cancelled migration went on"),
        }
        drop(destination);
        self.load.report().with_context(|| source.last_words())?;
        self.running = Some(source);
        Ok(result)
    }

    /// A QEMU on the other node that listens for the source.
    fn destination(&self, source: &Qemu, how: How) -> Result<Qemu> {
        let mut destination = self.spawn(source.node.other(), 0, Incoming::Defer)?;
        destination.connect()?;
        self.set_up(&destination, how, UNLIMITED, TLS_SERVER)?;
        let uri = json!({ "uri": uri(destination.node) });
        destination.execute("migrate-incoming", uri)?;
        Ok(destination)
    }

    /// Begins the migration; when, in microseconds of Unix time.
    fn begin(&self, source: &Qemu, how: How, bytes_per_s: u64) -> Result<u64> {
        self.set_up(source, how, bytes_per_s, TLS_CLIENT)?;
        let begun_at = now_us();
        source.execute("migrate", json!({ "uri": uri(source.node.other()) }))?;
        if how.postcopy {
            source.execute("migrate-start-postcopy", Value::Null)?;
        }
        Ok(begun_at)
    }

    /// Sets everything that a migration before may have set otherwise.
    fn set_up(&self, qemu: &Qemu, how: How, bytes_per_s: u64, tls: &str) -> Result<()> {
        qemu.set_capabilities(&[
            ("events", true),
            ("multifd", how.multifd),
            ("postcopy-ram", how.postcopy),
            ("postcopy-preempt", how.postcopy),
        ])?;
        let (credentials, hostname) = match how.tls {
            true => (tls, format!("{}.migrator", qemu.node.other().name())),
            false => ("", String::new()),
        };
        let parameters = json!({
            "max-bandwidth": bytes_per_s,
            "downtime-limit": DOWNTIME_LIMIT_MS,
            "multifd-channels": MULTIFD_CHANNELS,
            "tls-creds": credentials,
            "tls-hostname": hostname,
        });
        qemu.execute("migrate-set-parameters", parameters).map(drop)
    }
}

fn uri(node: Node) -> String {
    format!("tcp:{}:{PORT}", node.address())
}

/// The events of both sides.
struct Watch {
    source: Receiver<QmpEvent>,
    destination: Receiver<QmpEvent>,
    course: Course,
}

impl Watch {
    fn new(source: &Qemu, destination: &Qemu) -> Result<Watch> {
        Ok(Watch {
            source: source.qmp()?.events(),
            destination: destination.qmp()?.events(),
            course: Course::default(),
        })
    }

    /// Takes events in until `found` finds what it looks for.
    fn until<T>(
        &mut self,
        runtime: &tokio::runtime::Handle,
        deadline: Instant,
        found: impl Fn(&Course) -> Option<T>,
    ) -> Result<T> {
        runtime.block_on(async {
            loop {
                if let Some(why) = self.course.failure() {
                    bail!("{why}");
                }
                if let Some(found) = found(&self.course) {
                    return Ok(found);
                }
                if timeout_at(deadline, self.step()).await.is_err() {
                    bail!("not over after {MOVES_WITHIN:?}: {:?}", self.course);
                }
            }
        })
    }

    async fn step(&mut self) {
        let (side, event) = tokio::select! {
            event = self.source.recv() => (Side::Source, event),
            event = self.destination.recv() => (Side::Destination, event),
        };
        match event {
            Ok(event) => self.course.observe(side, &event),
            Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => self.course.lost(side),
        }
    }

    /// Takes in what has come already.
    fn drain(&mut self) {
        while let Ok(event) = self.source.try_recv() {
            self.course.observe(Side::Source, &event);
        }
        while let Ok(event) = self.destination.try_recv() {
            self.course.observe(Side::Destination, &event);
        }
    }
}

/// Nobody reads what the peer's containers print.
struct Silent;

impl OutputSink for Silent {
    fn append(&self, _container: &str, _stream: Stream, _offset: u64, _data: &[u8]) {}

    fn last_offset(&self, _container: &str, _stream: Stream) -> u64 {
        0
    }
}
