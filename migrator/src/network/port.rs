//! A pod's port: what the conductor holds of it.

use std::os::fd::OwnedFd;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::eventfd::EventFd;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{oneshot, watch};
use tokio::task::AbortHandle;

use super::announce::{SCHEDULE, announcement};
use super::dataplane::{Command, Stage};
use super::error::PortError;
use super::gate::SlotGate;
use super::grace;
use super::ledger::{Ledger, Tally, book};
use super::log::LogItem;
use super::node::{ExistingDevices, NodeInner, PodNetId};
use super::sys::PacketSocket;

pub(crate) struct Parts {
    pub(crate) node: Arc<NodeInner>,
    pub(crate) pod: PodNetId,
    pub(crate) gate: SlotGate,
    pub(crate) tap_name: String,
    pub(crate) park_name: String,
    pub(crate) tap_index: u32,
    pub(crate) devices: ExistingDevices,
    pub(crate) commands: Sender<Command>,
    pub(crate) wake: Arc<EventFd>,
    pub(crate) thread: JoinHandle<()>,
    pub(crate) acked: watch::Receiver<u64>,
    pub(crate) stages: watch::Receiver<Stage>,
}

struct Inner {
    node: Arc<NodeInner>,
    pod: PodNetId,
    gate: SlotGate,
    tap_name: String,
    park_name: String,
    tap_index: u32,
    commands: Sender<Command>,
    wake: Arc<EventFd>,
    acked: watch::Receiver<u64>,
    stages: watch::Receiver<Stage>,
    /// Gone once the port is released.
    devices: Mutex<Option<ExistingDevices>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    announcer: Mutex<Option<AbortHandle>>,
    base: Mutex<Ledger>,
}

impl Inner {
    /// Tells the thread; false if it has ended.
    fn tell(&self, command: Command) -> bool {
        let told = self.commands.send(command).is_ok();
        // A full counter wakes as well.
        let _ = self.wake.write(1);
        told
    }

    fn quiet(&self) {
        if let Some(announcer) = lock(&self.announcer).take() {
            announcer.abort();
        }
    }
}

impl Drop for Inner {
    /// The last handle is gone without a release: the service ends. The pod keeps its gate.
    fn drop(&mut self) {
        self.quiet();
        self.tell(Command::Detach);
        if let Some(thread) = lock(&self.thread).take() {
            // It flushes for 200 ms at most; a panic in it has been reported.
            let _ = thread.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A pod's port on this node. Cheap to clone. Dropping the last clone leaves the pod on the network,
/// for the next service to [`attach`](super::NodeNetwork::attach) again; [`release`](Self::release) or
/// [`discard`](Self::discard) take it away.
#[derive(Clone)]
pub struct Port {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Port")
            .field("pod", &self.inner.pod.name)
            .field("slot", &self.slot())
            .field("stage", &self.stage())
            .finish()
    }
}

impl Port {
    pub(crate) fn new(parts: Parts) -> Self {
        let inner = Inner {
            node: parts.node,
            pod: parts.pod,
            gate: parts.gate,
            tap_name: parts.tap_name,
            park_name: parts.park_name,
            tap_index: parts.tap_index,
            commands: parts.commands,
            wake: parts.wake,
            acked: parts.acked,
            stages: parts.stages,
            devices: Mutex::new(Some(parts.devices)),
            thread: Mutex::new(Some(parts.thread)),
            announcer: Mutex::new(None),
            base: Mutex::new(Ledger::default()),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    fn gone(&self) -> PortError {
        PortError::Gone(self.inner.pod.name.clone())
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, PortError> {
        let (reply, answer) = oneshot::channel();
        if !self.inner.tell(command(reply)) {
            return Err(self.gone());
        }
        answer.await.map_err(|_| self.gone())
    }

    fn descriptor(
        &self,
        which: impl FnOnce(&ExistingDevices) -> &OwnedFd,
    ) -> Result<OwnedFd, PortError> {
        let devices = lock(&self.inner.devices);
        let fd = which(devices.as_ref().ok_or_else(|| self.gone())?);
        fd.try_clone().map_err(|source| PortError::Tap {
            pod: self.inner.pod.name.clone(),
            source,
        })
    }

    /// A new descriptor of the pod's TAP, for the VMM.
    ///
    /// # Errors
    /// The port is gone, or the process has no descriptor left.
    pub fn tap_fd(&self) -> Result<OwnedFd, PortError> {
        self.descriptor(|devices| &devices.tap)
    }

    /// A new descriptor of the pod's park, for the VMM to hold while no service runs.
    ///
    /// # Errors
    /// The port is gone, or the process has no descriptor left.
    pub fn park_fd(&self) -> Result<OwnedFd, PortError> {
        self.descriptor(|devices| &devices.park)
    }

    /// The slot on this node.
    pub fn slot(&self) -> u16 {
        self.inner.gate.slot()
    }

    /// Where the port stands.
    pub fn stage(&self) -> Stage {
        *self.inner.stages.borrow()
    }

    /// Waits until the port stands at `stage`.
    ///
    /// # Errors
    /// The port is gone.
    pub async fn reached(&self, stage: Stage) -> Result<(), PortError> {
        let mut stages = self.inner.stages.clone();
        match stages.wait_for(|now| *now == stage).await {
            Ok(_) => Ok(()),
            Err(_) => Err(self.gone()),
        }
    }

    // The source.

    /// Parks every frame for the pod from now on, and streams what is parked to `sink`, numbered. When
    /// this returns, no frame is on its way into the TAP any more. The log is kept until it is
    /// acknowledged, and at least until [`forward`](Self::forward).
    ///
    /// On a port that a former service left holding: attaches the sink, and sends it what is kept.
    ///
    /// # Errors
    /// The pod does not live here, or the kernel has no grace period: then the gate holds all the
    /// same, and [`rollback`](Self::rollback) opens it.
    pub async fn hold(&self, sink: UnboundedSender<LogItem>) -> Result<(), PortError> {
        self.inner.quiet();
        self.ask(|reply| Command::Hold(sink, reply)).await??;
        match tokio::task::spawn_blocking(grace::grace_period).await {
            Ok(result) => result.map_err(PortError::GracePeriod),
            Err(_) => Err(self.gone()),
        }
    }

    /// Sends everything that is not acknowledged to another sink: the connection was made anew.
    ///
    /// # Errors
    /// The port neither holds nor forwards.
    pub async fn resend(&self, sink: UnboundedSender<LogItem>) -> Result<(), PortError> {
        self.ask(|reply| Command::Resend(sink, reply)).await?
    }

    /// Waits until the guest has drained its TAP, so that little is left as residue. False: it has not
    /// within `limit`.
    pub async fn drain_tap(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        self.ask(|reply| Command::DrainTap(until, reply))
            .await
            .unwrap_or(false)
    }

    /// After the VM has stopped: reads what is left in its TAP into the log, before everything that
    /// was parked, and closes that part with [`LogKind::ResidueEnd`](super::LogKind::ResidueEnd). From
    /// here on nothing leaves the guest on this node. Returns the number of frames.
    ///
    /// # Errors
    /// The port does not hold, or the TAP cannot be read.
    pub async fn residue(&self) -> Result<u64, PortError> {
        self.ask(Command::Residue).await?
    }

    /// The destination has injected everything up to `seq`.
    pub fn ack(&self, seq: u64) {
        self.inner.tell(Command::Ack(seq));
    }

    /// Gives the migration up: residue and log go back into the pod's own TAP, in order and before
    /// anything newer, then the gate opens. Returns as soon as the guest may send again; the rest
    /// happens by itself as the guest reads (wait for it with [`reached`](Self::reached) `Local`).
    ///
    /// # Errors
    /// The port does not hold.
    pub async fn rollback(&self) -> Result<(), PortError> {
        self.ask(Command::Rollback).await?
    }

    /// The guest runs at the destination: from now on acknowledged frames are freed, and late ones
    /// relayed.
    ///
    /// # Errors
    /// The port does not hold.
    pub async fn forward(&self) -> Result<(), PortError> {
        self.ask(Command::Forward).await?
    }

    /// Takes the pod off this node's network. After [`forward`](Self::forward), what is still parked
    /// goes to the sink first; the caller keeps the wire open until it is acknowledged. Returns the
    /// final ledger.
    ///
    /// # Errors
    /// A device or pin could not be removed; calling again tries again.
    pub async fn release(&self) -> Result<Ledger, PortError> {
        self.inner.quiet();
        let netlink = &self.inner.node.netlink;
        let tap = self.inner.tap_index;
        // First the entry: frames for the pod alone then take the way that the bridge has learned. When
        // the last one is through, only group frames come, whose copy counts at the other node.
        netlink
            .disown_address(&self.inner.tap_name, tap, self.inner.pod.mac)
            .await?;
        wait_for_frames().await;
        match self.ask(Command::Shut).await {
            Ok(()) | Err(PortError::Gone(_)) => wait_for_frames().await,
            Err(error) => return Err(error),
        }
        let ledger = match self.ask(Command::Drain).await {
            Ok(tally) => Some(self.book(tally).await?),
            Err(PortError::Gone(_)) => None,
            Err(error) => return Err(error),
        };
        self.remove().await?;
        Ok(ledger.unwrap_or_default())
    }

    // The destination.

    /// An item of the log came from the wire. It is injected as soon as its turn comes.
    ///
    /// # Errors
    /// The port is gone.
    pub fn log_input(&self, item: LogItem) -> Result<(), PortError> {
        if self.inner.tell(Command::Input(item)) {
            Ok(())
        } else {
            Err(self.gone())
        }
    }

    /// The highest number that was injected, to acknowledge; stays 0 until [`open`](Self::open).
    pub fn acked(&self) -> watch::Receiver<u64> {
        self.inner.acked.clone()
    }

    /// At the grant, before the guest runs: the pod lives here. Its frames are parked behind the log,
    /// the bridge sends them here, the guest may send, and the network is told.
    ///
    /// # Errors
    /// The port is not incoming; or the bridge or uplink refused.
    pub async fn open(&self) -> Result<(), PortError> {
        self.ask(Command::Open).await??;
        self.reopen().await
    }

    /// As [`open`](Self::open), for a port that a former service has opened: it may have been killed before it told anybody.
    ///
    /// # Errors
    /// The bridge or uplink refused.
    pub async fn reopen(&self) -> Result<(), PortError> {
        self.own().await?;
        self.announce().await
    }

    async fn own(&self) -> Result<(), PortError> {
        let Inner {
            node,
            pod,
            tap_name,
            tap_index,
            ..
        } = &*self.inner;
        Ok(node
            .netlink
            .own_address(tap_name, *tap_index, pod.mac)
            .await?)
    }

    async fn announce(&self) -> Result<(), PortError> {
        let pod = &self.inner.pod;
        let uplink = self.inner.node.config.uplink.clone();
        let index = self.inner.node.netlink.require(&uplink).await?.index;
        let socket = PacketSocket::open(index).map_err(|source| PortError::Announce {
            pod: pod.name.clone(),
            uplink,
            source,
        })?;
        let frames = announcement(pod.mac, pod.v4, pod.v6);
        let send = move || {
            for frame in &frames {
                // A full uplink loses this one; the schedule has more.
                socket.send(frame);
            }
        };
        send();
        let began = tokio::time::Instant::now();
        let task = tokio::spawn(async move {
            for at in &SCHEDULE[1..] {
                tokio::time::sleep_until(began + *at).await;
                send();
            }
        });
        *lock(&self.inner.announcer) = Some(task.abort_handle());
        Ok(())
    }

    /// After the guest runs: waits for the end of the log (50 ms at most, counted if it does not
    /// come), queues the frames that came here directly behind it, and opens the gate.
    ///
    /// # Errors
    /// The port was not opened.
    pub async fn settle(&self) -> Result<(), PortError> {
        self.ask(Command::Settle).await??;
        let park = &self.inner.park_name;
        if self.inner.node.netlink.require(park).await?.tx_dropped > 0 {
            // Buckets that wait for a lost frame would keep their flows on the slow way.
            self.resync(false);
        }
        Ok(())
    }

    /// Gives the migration up before the grant: nothing is left on this node.
    ///
    /// # Errors
    /// A device or pin could not be removed; calling again tries again.
    pub async fn discard(&self) -> Result<(), PortError> {
        self.inner.quiet();
        self.remove().await
    }

    // Both.

    pub(crate) fn resync(&self, crashed: bool) {
        self.inner.tell(Command::Resync(crashed));
    }

    async fn remove(&self) -> Result<(), PortError> {
        let inner = &self.inner;
        inner
            .node
            .gates
            .detach(self.slot(), Some(inner.tap_index))?;
        inner.tell(Command::Detach);
        let thread = lock(&inner.thread).take();
        if let Some(thread) = thread {
            // A panic in it has been reported.
            let _ = tokio::task::spawn_blocking(move || thread.join()).await;
        }
        drop(lock(&inner.devices).take());
        // The VMM may hold them still.
        inner.node.netlink.delete(&inner.tap_name).await?;
        inner.node.netlink.delete(&inner.park_name).await?;
        Ok(())
    }

    async fn book(&self, tally: Tally) -> Result<Ledger, PortError> {
        let netlink = &self.inner.node.netlink;
        let park = netlink.require(&self.inner.park_name).await?;
        let tap = netlink.require(&self.inner.tap_name).await?;
        let counters = self.inner.gate.counters()?;
        let ledger = book(&counters, &tally, park.tx_dropped, tap.tx_dropped);
        Ok(ledger.since(&lock(&self.inner.base)))
    }

    /// What this node did with the pod's frames since the last [`reset_ledger`](Self::reset_ledger).
    /// Exact when the network is at rest; under traffic the parts are read one after the other.
    ///
    /// # Errors
    /// The port is gone.
    pub async fn ledger(&self) -> Result<Ledger, PortError> {
        let tally = self.ask(Command::Tally).await?;
        self.book(tally).await
    }

    /// Starts the ledger anew; frames held at this moment are seen again.
    ///
    /// # Errors
    /// The port is gone.
    pub async fn reset_ledger(&self) -> Result<(), PortError> {
        *lock(&self.inner.base) = Ledger::default();
        let now = self.ledger().await?;
        *lock(&self.inner.base) = now;
        Ok(())
    }
}

/// Until no frame is on its way that saw the network as it was.
async fn wait_for_frames() {
    if let Ok(Err(error)) = tokio::task::spawn_blocking(grace::grace_period).await {
        tracing::warn!(%error, "no grace period: a frame on its way may be lost");
    }
}
