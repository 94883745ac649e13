//! A pod's port: what the conductor holds of it. [`source`] and [`destination`] are its parts in a migration,
//! [`replace`] is the one in an upgrade.

mod destination;
mod onward;
mod overflow;
mod register;
mod replace;
mod routed;
mod source;

use std::os::fd::OwnedFd;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use nix::sys::eventfd::EventFd;
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::AbortHandle;
use vm_runtime::units::{Epoch, MacAddress};

use super::conntrack::{Homeward, Made};
use super::dataplane::{Command, Stage};
use super::error::PortError;
use super::gate::SlotGate;
use super::ledger::{Ledger, Tally, book};
use super::node::{ExistingDevices, NodeInner, PodNetId};

pub(super) use register::Ports;
pub use replace::idle_tap;

pub(crate) struct Parts {
    pub(crate) node: Arc<NodeInner>,
    pub(crate) pod: PodNetId,
    pub(crate) gate: SlotGate,
    pub(crate) tap_name: String,
    pub(crate) park_name: String,
    pub(crate) tap_index: u32,
    /// From when on no frame comes that the uplink's program has not counted.
    pub(crate) counted_from: tokio::time::Instant,
    pub(crate) devices: ExistingDevices,
    pub(crate) commands: Sender<Command>,
    pub(crate) wake: Arc<EventFd>,
    pub(crate) thread: JoinHandle<()>,
    pub(crate) acked: watch::Receiver<u64>,
    pub(crate) stages: watch::Receiver<Stage>,
    pub(crate) echoed: Arc<Notify>,
    pub(crate) full: watch::Receiver<bool>,
}

pub(crate) struct Inner {
    pub(super) node: Arc<NodeInner>,
    pub(super) pod: PodNetId,
    pub(super) gate: SlotGate,
    pub(super) tap_name: String,
    pub(super) park_name: String,
    tap_index: u32,
    counted_from: tokio::time::Instant,
    commands: Sender<Command>,
    wake: Arc<EventFd>,
    acked: watch::Receiver<u64>,
    stages: watch::Receiver<Stage>,
    /// More has come in this hold than may be kept.
    full: watch::Receiver<bool>,
    /// Gone once the port is released.
    devices: Mutex<Option<ExistingDevices>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    announcer: Mutex<Option<AbortHandle>>,
    echoed: Arc<Notify>,
    /// Gives the pod's address up once the network knows the new place.
    leaver: Mutex<Option<AbortHandle>>,
    base: Mutex<Ledger>,
    /// Entries of connection tracking that were made for it.
    pub(super) made: Made,
    /// Where its flows go that another node translates.
    pub(super) homeward: Homeward,
    /// In a routed cluster: the epoch in which this node has the pod, as other nodes are told.
    claimed: Mutex<Option<Epoch>>,
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
        for task in [&self.announcer, &self.leaver] {
            if let Some(task) = lock(task).take() {
                task.abort();
            }
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
    pub(super) inner: Arc<Inner>,
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
        let ports = Arc::clone(&parts.node.ports);
        let inner = Inner {
            node: parts.node,
            pod: parts.pod,
            gate: parts.gate,
            tap_name: parts.tap_name,
            park_name: parts.park_name,
            tap_index: parts.tap_index,
            counted_from: parts.counted_from,
            commands: parts.commands,
            wake: parts.wake,
            acked: parts.acked,
            stages: parts.stages,
            full: parts.full,
            devices: Mutex::new(Some(parts.devices)),
            thread: Mutex::new(Some(parts.thread)),
            announcer: Mutex::new(None),
            echoed: parts.echoed,
            leaver: Mutex::new(None),
            base: Mutex::new(Ledger::default()),
            made: Made::default(),
            homeward: Homeward::default(),
            claimed: Mutex::new(None),
        };
        let inner = Arc::new(inner);
        ports.enter(&inner);
        Self { inner }
    }

    fn gone(&self) -> PortError {
        PortError::Gone(self.inner.pod.name.clone())
    }

    pub(super) async fn ask<T>(
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

    /// The pod's MAC address.
    pub fn mac(&self) -> MacAddress {
        self.inner.pod.mac
    }

    /// Where the port stands.
    pub fn stage(&self) -> Stage {
        *self.inner.stages.borrow()
    }

    /// Where the port stands once it has done all that it was asked until now. Who drops [`hold`](Self::hold) or another call has asked all the same,
    /// and [`stage`](Self::stage) may not say so yet.
    ///
    /// # Errors
    /// The port is gone.
    pub async fn stage_by_now(&self) -> Result<Stage, PortError> {
        // The thread takes one after the other.
        self.ask(Command::Tally).await?;
        Ok(self.stage())
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

    pub(crate) fn resync(&self, crashed: bool) {
        self.inner.tell(Command::Resync(crashed));
    }

    /// The node sends the pod's frames here.
    async fn own(&self) -> Result<(), PortError> {
        let Inner {
            node,
            pod,
            tap_name,
            tap_index,
            counted_from,
            ..
        } = &*self.inner;
        // Long past in a migration.
        tokio::time::sleep_until(*counted_from).await;
        node.tunnel
            .land(&node.gates, pod.mac, self.slot(), *tap_index)?;
        Ok(node.own(tap_name, *tap_index, pod).await?)
    }

    async fn remove(&self) -> Result<(), PortError> {
        let inner = &self.inner;
        self.withdraw()?;
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
        inner.node.forget_packets(self.slot());
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
        Ok(self.since_base(ledger))
    }

    pub(super) fn since_base(&self, ledger: Ledger) -> Ledger {
        ledger.since(&lock(&self.inner.base))
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
