//! Slowing a running guest down, so that it writes less than a migration can carry.
//!
//! Where the kernel lets us, by a CPU limit: every virtual CPU's thread gets a control group of its own, next to
//! QEMU's other threads, so that the monitor and the devices go on at full speed. Where it does not, by stopping and
//! continuing the whole guest in slices.
//!
//! ```text
//!              Throttle::new        set(30) .. set(95)        set(OFF)            end, or drop
//!     groups   made, threads in     quota in each             no quota            threads back, groups removed
//!              5-30 ms              0.1 ms                    0.3 ms              5-30 ms
//!     slices   nothing              stop, cont, stop ...      the guest runs      nothing is left
//! ```
//!
//! The order for a freeze is `set(Percent::OFF)`, [`Vm::stop`], and [`Throttle::end`] when nobody waits any more: a stop takes as
//! long as the slowest virtual CPU needs to notice, which under a limit of 95 % is some 20 to 90 ms, and moving
//! threads between groups waits for a grace period of the kernel. A [`Vm::stop`] during a slice is right as well, only
//! late: it waits for the slice's end, and no slice continues a guest that was stopped.
//!
//! A file in the VM's folder tells what was set up, from before it is until after it is gone. [`Vm::attach`] takes
//! back what a killed service has left, and so do [`Vm::kill`], [`Vm::quit`] and
//! [`VmRecord::kill`](super::VmRecord::kill).
//!
//! Groups need the CPU controller where QEMU is: version 1 mounted writable, or version 2 with `cpu` in the
//! `cgroup.controllers` of QEMU's group (a systemd service has it with `Delegate=cpu`).
//!
//! A limit is one of processor time: a virtual CPU that needs no more than its share of it is not slowed, and one that
//! gets half a processor on a busy host anyway notices nothing of 50 %.

mod groups;
mod mark;
mod place;
mod slices;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use tokio::sync::{Mutex, OwnedMutexGuard, mpsc, oneshot};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::timeout;

use super::{ControlError, QMP_DEADLINE, RunState, Vm};
use crate::qmp::QmpError;

use self::groups::Groups;
use self::mark::Mark;
use self::slices::Slices;

/// Name of the record in the VM's folder.
pub const RECORD: &str = mark::FILE;

/// How much of a guest's time is taken away, in percent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Percent(u8);

impl Percent {
    /// The guest is not slowed.
    pub const OFF: Self = Self(0);
    /// The most that is taken: a guest that gets nothing at all is a stopped one.
    pub const MAX: Self = Self(95);

    /// At most [`Percent::MAX`].
    pub fn clamp(percent: u8) -> Self {
        Self(percent).min(Self::MAX)
    }

    /// From 0 to 95.
    pub fn get(self) -> u8 {
        self.0
    }
}

/// How a guest is slowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Means {
    /// A CPU limit on the threads of its virtual CPUs.
    Groups,
    /// All of it is stopped and continued, ten times a second.
    Slices,
}

/// A guest cannot be slowed, or not be let go again.
#[derive(Debug, thiserror::Error)]
pub enum ThrottleError {
    /// A guest that does not run cannot be slowed.
    #[error("the guest does not run: QEMU says {state:?}")]
    NotRunning {
        /// What it does instead.
        state: RunState,
    },
    /// QEMU refuses, is too late, or is gone.
    #[error("QEMU does not {verb}")]
    Qmp {
        /// What was asked.
        verb: &'static str,
        /// Why not.
        source: QmpError,
    },
    /// QEMU's state cannot be asked for.
    #[error("cannot ask QEMU for its state")]
    Control(#[from] ControlError),
    /// No CPU controller of the kernel's control groups can be used for QEMU's threads.
    #[error("no control group can limit QEMU's threads: {why}")]
    NoController {
        /// What is missing.
        why: &'static str,
    },
    /// The kernel refuses.
    #[error("cannot {step} {path}")]
    Group {
        /// What was tried.
        step: &'static str,
        /// The group, or a file of it.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The record of it cannot be written or removed.
    #[error("cannot {step} the record of the throttle, {path}")]
    Mark {
        /// What was tried.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Another throttle of this VM has not ended.
    #[error("the guest is throttled already")]
    Taken,
    /// It does not come to an end in time.
    #[error("the throttle did not answer within {after:?}", after = QMP_DEADLINE)]
    Slow,
    /// It has ended by itself: QEMU is gone, or the service is being stopped.
    #[error("the throttle has ended")]
    Ended,
}

/// What a VM and its throttle share.
#[derive(Debug, Default)]
pub(super) struct Slot {
    /// Held by the one throttle, until everything is as before.
    one: Arc<Mutex<()>>,
    /// Whether somebody wants the guest to stand still. Held during each slice: no slice begins in a stopped guest, and
    /// none continues it.
    pub(super) halted: Mutex<bool>,
}

/// Another percentage, and who waits for it.
struct Order {
    percent: Percent,
    done: oneshot::Sender<Result<(), ThrottleError>>,
}

/// A guest that can be slowed. Dropping it lets the guest go, a moment later; [`Throttle::end`] tells when.
#[derive(Debug)]
pub struct Throttle {
    means: Means,
    orders: mpsc::Sender<Order>,
    task: JoinHandle<Result<(), ThrottleError>>,
}

impl Throttle {
    /// Prepares to slow a guest by the best means there is; so far nothing is slowed.
    ///
    /// # Errors
    /// The guest does not run, or another throttle has hold of it. Nothing has changed then.
    pub async fn new(vm: &Vm) -> Result<Self, ThrottleError> {
        match Self::by(vm, Means::Groups).await {
            Err(
                error @ (ThrottleError::NoController { .. }
                | ThrottleError::Group { .. }
                | ThrottleError::Mark { .. }),
            ) => {
                let reason = std::error::Error::source(&error).map(ToString::to_string);
                tracing::info!(vm = %vm.spec().name, %error, reason, "throttling in slices");
                Self::by(vm, Means::Slices).await
            }
            done => done,
        }
    }

    /// As [`Throttle::new`], by these means and no other.
    ///
    /// # Errors
    /// As [`Throttle::new`], or these means are not available.
    pub async fn by(vm: &Vm, means: Means) -> Result<Self, ThrottleError> {
        let slot = Arc::clone(&vm.throttle);
        let one = match timeout(QMP_DEADLINE, Arc::clone(&slot.one).lock_owned()).await {
            Ok(one) => one,
            Err(_) => return Err(ThrottleError::Taken),
        };
        let state = vm.query_status().await?;
        if state != RunState::Running {
            return Err(ThrottleError::NotRunning { state });
        }
        let (orders, received) = mpsc::channel(1);
        let task = match means {
            Means::Groups => {
                let threads = vcpu_threads(vm).await?;
                let (dir, pid, began) = (vm.dir().to_owned(), vm.pid(), vm.record.start_time);
                let made = move || Groups::make(&dir, pid, began, &threads);
                let groups = spawn_blocking(made)
                    .await
                    .map_err(|_| ThrottleError::Ended)??;
                tokio::spawn(limit(groups, received, one))
            }
            Means::Slices => {
                let slices = Slices::new(Arc::clone(&vm.qmp), slot, Mark::new(vm.dir()));
                tokio::spawn(async move {
                    let ended = slices.run(received).await;
                    drop(one);
                    ended
                })
            }
        };
        Ok(Self {
            means,
            orders,
            task,
        })
    }

    /// Takes back what a service that was killed has left of a throttle: the limit and its groups, and a slice in
    /// which the guest stands still. [`Vm::attach`] does so; a VM whose throttle is alive must be left alone.
    ///
    /// # Errors
    /// The kernel or QEMU refuses. What is left stays recorded, for another attempt.
    pub async fn clear(vm: &Vm) -> Result<(), ThrottleError> {
        let dir = vm.dir().to_owned();
        let in_a_slice = spawn_blocking(move || mark::clear(&dir)).await;
        if !in_a_slice.unwrap_or(Err(ThrottleError::Ended))? {
            return Ok(());
        }
        // A guest that was frozen to be moved may stand still here as well: nobody else can have it before its state
        // was saved, and one whose state was saved is not `Paused` any more.
        if vm.query_status().await? == RunState::Paused {
            vm.cont().await?;
        }
        let dir = vm.dir().to_owned();
        let forgotten = spawn_blocking(move || mark::slices_cleared(&dir)).await;
        forgotten.unwrap_or(Err(ThrottleError::Ended))
    }

    /// By what means.
    pub fn means(&self) -> Means {
        self.means
    }

    /// Takes so much of the guest's time from now on. With [`Percent::OFF`] the guest runs when this returns, and no
    /// slice is under way.
    ///
    /// # Errors
    /// The kernel or QEMU refuses, or is gone. After an error of `set(Percent::OFF)` the guest may be slowed still.
    pub async fn set(&self, percent: Percent) -> Result<(), ThrottleError> {
        let (done, answer) = oneshot::channel();
        let asked = async {
            let order = Order { percent, done };
            self.orders
                .send(order)
                .await
                .map_err(|_| ThrottleError::Ended)?;
            answer.await.map_err(|_| ThrottleError::Ended)?
        };
        timeout(QMP_DEADLINE, asked)
            .await
            .unwrap_or(Err(ThrottleError::Slow))
    }

    /// Lets the guest go and puts everything back; what was slices has ended when this returns, and the guest runs,
    /// unless somebody has stopped it.
    ///
    /// # Errors
    /// Something could not be put back. [`Vm::attach`] and the VM's end try again.
    pub async fn end(self) -> Result<(), ThrottleError> {
        drop(self.orders);
        match timeout(QMP_DEADLINE, self.task).await {
            Ok(Ok(ended)) => ended,
            Ok(Err(_)) => Err(ThrottleError::Ended),
            Err(_) => Err(ThrottleError::Slow),
        }
    }
}

/// The task of a throttle by groups. What it owns removes itself, also if the runtime ends first.
async fn limit(
    mut groups: Groups,
    mut orders: mpsc::Receiver<Order>,
    one: OwnedMutexGuard<()>,
) -> Result<(), ThrottleError> {
    while let Some(Order { percent, done }) = orders.recv().await {
        let limited = move || {
            let limited = groups.limit(percent);
            (groups, limited)
        };
        let Ok((back, limited)) = spawn_blocking(limited).await else {
            return Err(ThrottleError::Ended);
        };
        groups = back;
        // Who asked may have lost patience.
        let _ = done.send(limited);
    }
    let ended = spawn_blocking(move || groups.remove()).await;
    drop(one);
    ended.unwrap_or(Err(ThrottleError::Ended))
}

/// Takes back what a killed service has left of a throttle. Without a record of one, this is one failed `open`.
pub(super) async fn clear(vm: &Vm) {
    if let Err(error) = Throttle::clear(vm).await {
        let reason = std::error::Error::source(&error).map(ToString::to_string);
        tracing::error!(vm = %vm.spec().name, %error, reason, "an earlier throttle is not taken back");
    }
}

/// Takes back what is left of a throttle of a VM that is gone, by the record in its folder. Blocks for some milliseconds
/// if there is such a record.
pub fn forget(dir: &Path) {
    if let Err(error) = mark::clear(dir).and_then(|_| mark::slices_cleared(dir)) {
        let reason = std::error::Error::source(&error).map(ToString::to_string);
        tracing::warn!(%error, reason, "a throttle's control groups stay behind");
    }
}

/// The numbers of the threads that run the guest's code.
async fn vcpu_threads(vm: &Vm) -> Result<Vec<i32>, ThrottleError> {
    let verb = "name its threads";
    let answer = vm
        .qmp
        .execute("query-cpus-fast", Value::Null, QMP_DEADLINE)
        .await
        .map_err(|source| ThrottleError::Qmp { verb, source })?;
    let cpus = answer.as_array().map_or(&[][..], Vec::as_slice);
    let mut threads: Vec<i32> = cpus
        .iter()
        .filter_map(|cpu| i32::try_from(cpu.get("thread-id")?.as_i64()?).ok())
        .collect();
    // One thread runs all of them where the emulator has no threads.
    threads.dedup();
    if threads.is_empty() {
        let why = "QEMU names no threads of virtual CPUs";
        return Err(ThrottleError::NoController { why });
    }
    Ok(threads)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_always_keeps_a_twentieth_of_its_time() {
        assert_eq!(Percent::clamp(100), Percent::MAX);
        assert_eq!(Percent::clamp(95).get(), 95);
        assert_eq!(Percent::clamp(40).get(), 40);
        assert_eq!(Percent::default(), Percent::OFF);
    }
}
