//! Another QEMU in the place of the one that runs a guest: the same memory, the same TAP, and no copy of either.
//!
//! ```text
//! vm.successor()      a second QEMU is started on the same memory, with a TAP of its own, and waits for a state
//! vm.hand_over()      the device state goes from one QEMU to the other over a Unix socket; the guest stands still
//! next.take_tap()     the second one's TAP becomes the guest's
//! vm.suspend()        SIGSTOP for the first one: this is the decision, as [`Vm::find`] sees it; one system call
//! next.cont()         the guest runs on
//! next.prevail()      its record takes the place of the first one's
//! vm.kill()
//! ```
//!
//! Up to `suspend`, [`Successor::give_up`], [`Vm::wake`] and `cont` of the first one undo everything. A service that is killed
//! in the middle leaves what [`Vm::find`] needs. No file is written while the guest stands still, because a busy disk would
//! hold it up; and nobody is killed then, because the end of a process that maps a whole guest takes a processor's time.
//!
//! Why it is safe to have two on one memory: a QEMU that waits for a state writes nothing into guest RAM (`rom_reset` in
//! its hw/core/loader.c leaves out what it would load), and one that stands still writes nothing either. Both are tested.
//!
//! Why a TAP of its own: a QEMU sets a TAP's header length and offloads to its defaults when it starts, and takes a frame
//! off it though it cannot deliver it. So it gets one that nobody uses, and the guest's under another number, which
//! is put in the first one's place when the guest already stands still.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::time::timeout;

use super::process::is_suspended;
use super::record::{VmRecord, clear, free_dir};
use super::spawn::{Birth, Succession};
use super::start::start;
use super::state::{LOAD_SOCKET, STATE_DEADLINE};
use super::{
    CONSOLE, ControlError, QMP_DEADLINE, SpawnError, StateError, SuccessionError, Vm, VmResources,
};
use crate::memory::GuestMemory;
use crate::qemu::QemuBinary;
use crate::qmp::QmpEvent;
use crate::units::Bytes;

/// How long the old QEMU gets to say how large its state was, if the new one has loaded it already.
const BYTES_LIMIT: Duration = Duration::from_millis(1);
/// How long a suspended QEMU's threads may take to stop before it is gone on without a look: it takes them microseconds.
const STOPS_WITHIN: Duration = Duration::from_millis(20);

/// What a node gives a QEMU that is to replace another.
#[derive(Debug)]
pub struct SuccessorResources {
    /// The QEMU to run.
    pub qemu: QemuBinary,
    /// The kernel image.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// Where each image of the spec is served (`*.nbd`) or its file, in its order, then the sockets of its writable disks.
    pub disks: Vec<PathBuf>,
    /// A TAP with `IFF_VNET_HDR` that nobody uses.
    pub spare_tap: OwnedFd,
}

/// A state that has passed from one QEMU to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HandOver {
    /// Since when the guest stands still; `None` if it did before.
    pub stopped: Option<Instant>,
    /// Size of the state, if the QEMU that saved it counts it and says so in time.
    pub bytes: Option<Bytes>,
}

/// A QEMU that is to replace another. Dropping it leaves it running, and waiting: call [`Successor::give_up`].
#[derive(Debug)]
pub struct Successor {
    vm: Vm,
    /// Kept so that closing it there is not its end, which takes the kernel a while.
    spare_tap: OwnedFd,
}

impl Vm {
    /// Starts a QEMU that is to replace this one, in a folder of its own within the VM's. It waits for this one's state.
    ///
    /// # Errors
    /// It is not up to this VM, or does not start: nothing of it is left then.
    pub async fn successor(&self, res: SuccessorResources) -> Result<Successor, SpawnError> {
        let machine = &self.spec().machine;
        if !res.qemu.supports(machine) {
            return Err(SpawnError::Machine {
                path: res.qemu.path,
                machine: machine.clone(),
            });
        }
        // One that was given up and did not end, or that this one replaced.
        let others = self.kill_others().await;
        others.map_err(system("end what was to replace it before"))?;
        let home = self.record.home().to_owned();
        let dir = free_dir(&home, self.dir()).map_err(system("make a folder for it"))?;
        let started = self.start_successor(res, home, &dir).await;
        if started.is_err() {
            // The error is what the caller needs; the next attempt clears the folder as well.
            let _ = clear(&dir);
        }
        started
    }

    async fn kill_others(&self) -> io::Result<()> {
        if VmRecord::load(self.record.home())?.process() != self.record.process() {
            // It could not be written when this one took over.
            self.record.decide()?;
        }
        VmRecord::kill_others(self.record.home()).await
    }

    async fn start_successor(
        &self,
        res: SuccessorResources,
        home: PathBuf,
        dir: &Path,
    ) -> Result<Successor, SpawnError> {
        // The guest's console stays one file.
        symlink(home.join(CONSOLE), dir.join(CONSOLE)).map_err(system("link the console"))?;
        let spare = res.spare_tap.try_clone();
        let succession = Succession {
            home,
            predecessor: self.record.process(),
            spare_tap: spare.map_err(system("duplicate a descriptor"))?,
        };
        let resources = VmResources {
            dir: dir.to_owned(),
            memory: self.memory(),
            tap: self.tap().map_err(system("duplicate a descriptor"))?,
            park: self.park().map_err(system("duplicate a descriptor"))?,
            qemu: res.qemu,
            kernel: res.kernel,
            initramfs: res.initramfs,
            disks: res.disks,
            rbd: Vec::new(),
        };
        let birth = Birth::Successor(succession);
        let (vm, guard) = start(self.spec(), resources, birth).await?;
        if polls_by_file(vm.pid()) {
            return Err(SpawnError::Polling {
                path: vm.record.qemu.path.clone(),
            });
        }
        let uri = json!({ "uri": format!("unix:{LOAD_SOCKET}") });
        vm.qmp
            .execute("migrate-incoming", uri, QMP_DEADLINE)
            .await?;
        guard.disarm();
        Ok(Successor {
            vm,
            spare_tap: res.spare_tap,
        })
    }

    /// Passes the device state of this VM on to its successor. QEMU itself stops the guest, when everything but the state is
    /// done. Both are paused then.
    ///
    /// # Errors
    /// One of them fails, or it takes too long. This one is paused, or goes on already, and can `cont`; the other one is of no use
    /// any more.
    pub async fn hand_over(&self, to: &Successor) -> Result<HandOver, StateError> {
        let passed = match timeout(STATE_DEADLINE, self.pass(&to.vm)).await {
            Ok(passed) => passed,
            Err(_) => Err(StateError::Slow {
                verb: "pass on",
                after: STATE_DEADLINE,
            }),
        };
        if passed.is_err()
            && let Err(error) = self.abort_save().await
        {
            tracing::warn!(vm = %self.spec().name, %error, "the failed save was not aborted");
        }
        passed
    }

    async fn pass(&self, to: &Vm) -> Result<HandOver, StateError> {
        let verb = "save";
        let (stops, mut saved, mut loaded) = (self.events(), self.events(), to.events());
        let socket = to.dir().join(LOAD_SOCKET);
        let uri = json!({ "uri": format!("unix:{}", socket.display()) });
        let begin = self.qmp.execute("migrate", uri, QMP_DEADLINE).await;
        begin.map_err(|source| StateError::Begin { verb, source })?;
        let save = async {
            self.ended(verb, &mut saved).await?;
            // The other one loads still. If not, the figure is not worth waiting for.
            let bytes = timeout(BYTES_LIMIT, self.state_bytes()).await;
            Ok(bytes.ok().flatten())
        };
        let both = async { tokio::try_join!(save, to.ended("load", &mut loaded)) };
        tokio::pin!(both);
        let (stopped, ended) = tokio::select! {
            // If both have come, the stop came first.
            biased;
            at = stop(stops) => (Some(at), both.await),
            ended = &mut both => (None, ended),
        };
        let (bytes, ()) = ended?;
        Ok(HandOver { stopped, bytes })
    }

    /// Size of the state that was saved last, if QEMU counts it: 7.2 counts the pages of ROMs only.
    async fn state_bytes(&self) -> Option<Bytes> {
        let answer = self.command("query-migrate").await.ok()?;
        let ram = answer.get("ram")?;
        let of = |key| ram.get(key).and_then(Value::as_u64);
        let all = of("transferred")?;
        let pages = of("precopy-bytes")? + of("downtime-bytes")? + of("postcopy-bytes")?;
        (all > pages).then_some(Bytes(all))
    }

    /// Suspends QEMU itself, whose guest stands still: it takes nothing off its TAP any more, and whoever looks for the VM
    /// in its folder takes the successor. [`Vm::wake`] takes that back.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn suspend(&self) -> Result<(), SuccessionError> {
        self.signal(Signal::SIGSTOP)?;
        // The signal is on its way when kill(2) returns, and its threads stop some microseconds later; a find in between would take it
        // for one that runs and is silent.
        let until = Instant::now() + STOPS_WITHIN;
        while !is_suspended(self.pid()) && Instant::now() < until {
            std::thread::sleep(Duration::from_micros(20));
        }
        Ok(())
    }

    /// Takes [`Vm::suspend`] back; without that it does nothing.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn wake(&self) -> Result<(), SuccessionError> {
        self.signal(Signal::SIGCONT)
    }

    fn signal(&self, signal: Signal) -> Result<(), SuccessionError> {
        let pid = self.pid();
        let sent = self.process.signal(signal);
        sent.map_err(|source| SuccessionError::Suspend { pid, source })
    }
}

impl Successor {
    /// What its QEMU is.
    pub fn qemu(&self) -> &QemuBinary {
        &self.vm.record.qemu
    }

    /// Its QEMU's process number.
    pub fn pid(&self) -> i32 {
        self.vm.pid()
    }

    /// The agent's socket.
    pub fn agent_socket(&self) -> PathBuf {
        self.vm.agent_socket()
    }

    /// Guest RAM.
    pub fn memory(&self) -> Arc<GuestMemory> {
        self.vm.memory()
    }

    /// Gives it the guest's TAP. Until now it has a TAP of its own; the state must be loaded.
    ///
    /// # Errors
    /// Its process cannot be told; it is of no use any more.
    pub async fn take_tap(&self) -> Result<(), SuccessionError> {
        let pid = self.vm.pid();
        let taken = self.vm.take_tap().await;
        taken.map_err(|source| SuccessionError::Tap { pid, source })
    }

    /// Makes the guest run, which it never has here. The one before must be suspended.
    ///
    /// # Errors
    /// QEMU refuses, is gone or silent.
    pub async fn cont(&self) -> Result<(), ControlError> {
        self.vm.cont().await
    }

    /// Puts its record in the place of that of the one before.
    ///
    /// # Errors
    /// The record cannot be written. A service that starts finds it all the same, as long as the one before has its record.
    pub async fn prevail(&self) -> Result<(), SuccessionError> {
        let record = self.vm.record();
        let decided = tokio::task::spawn_blocking(move || record.decide()).await;
        decided
            .unwrap_or_else(|error| Err(io::Error::other(error)))
            .map_err(SuccessionError::Record)
    }

    /// It runs the guest. Call it outside of whatever is in a hurry.
    pub async fn into_vm(self) -> Vm {
        close(self.spare_tap).await;
        self.vm
    }

    /// Ends it; the guest must never have run here.
    ///
    /// # Errors
    /// It does not end. That harms nobody: nobody will tell it to run.
    pub async fn give_up(self) -> Result<(), SuccessionError> {
        let pid = self.vm.pid();
        let killed = self.vm.process.kill().await;
        close(self.spare_tap).await;
        killed.map_err(|source| SuccessionError::Kill { pid, source })?;
        // What is left in it does no harm, and the next attempt clears it.
        let _ = clear(self.vm.dir());
        Ok(())
    }
}

/// When QEMU says that the guest stands still.
async fn stop(mut events: broadcast::Receiver<QmpEvent>) -> Instant {
    loop {
        match events.recv().await {
            Ok(event) if event.name == "STOP" => return Instant::now(),
            Ok(_) | Err(RecvError::Lagged(_)) => {}
            // The other waiters tell why.
            Err(RecvError::Closed) => std::future::pending().await,
        }
    }
}

/// Closes a TAP that nobody else has: the device ends with it, which takes the kernel some milliseconds.
async fn close(tap: OwnedFd) {
    // It neither fails nor panics.
    let _ = tokio::task::spawn_blocking(move || drop(tap)).await;
}

/// Whether a QEMU has its main loop wait by io_uring (10.2 does): that holds the file behind a number, and would not see another one
/// in its place.
fn polls_by_file(pid: i32) -> bool {
    let Ok(fds) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
        return false;
    };
    fds.flatten()
        .filter_map(|fd| std::fs::read_link(fd.path()).ok())
        .any(|target| target.as_os_str() == "anon_inode:[io_uring]")
}

fn system(step: &'static str) -> impl Fn(io::Error) -> SpawnError {
    move |source| SpawnError::System { step, source }
}
