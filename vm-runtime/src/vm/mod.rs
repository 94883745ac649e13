//! One VM: a QEMU process that outlives this service, its guest memory, and its verbs.
//!
//! ```text
//! boot -> running <-> stop / cont
//! incoming -> load_state -> paused -> cont -> running
//! running -> stop -> save_state -> quit        the guest now lives elsewhere
//!                        \-> cont              rollback: it goes on here
//! running -> successor -> hand_over -> kill     the guest now lives in another QEMU, on the same memory
//! ```
//!
//! Dropping a [`Vm`] leaves its QEMU running; [`Vm::attach`] finds it again. Only `kill` and `quit`
//! end it. Verbs that fail say in their documentation what state the VM is left in.

mod child;
mod disks;
mod error;
mod find;
mod inject;
mod pidfd;
mod process;
mod ram;
mod record;
mod replace_fd;
mod spawn;
mod start;
mod state;
mod successor;
pub mod throttle;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::broadcast;
use tokio::time::{Instant, sleep, timeout};

pub use self::error::{AttachError, ControlError, SpawnError, StateError, SuccessionError};
pub use self::ram::VmRam;
pub use self::record::{VmRecord, VmmFds, VmmProcess};
pub use self::state::{LoadStats, SaveStats};
pub use self::successor::{HandOver, Successor, SuccessorResources};

use self::process::Process;
use self::spawn::Birth;
use self::start::start;
use crate::command_line::RbdImage;
use crate::memory::GuestMemory;
use crate::qemu::QemuBinary;
use crate::qmp::{Qmp, QmpError, QmpEvent};
use crate::spec::VmSpec;

/// QEMU's own messages, in the VM's folder.
pub const LOG: &str = "qemu.log";
/// The guest's serial console, in the VM's folder.
pub const CONSOLE: &str = "console.log";
/// The agent's port, in the VM's folder.
pub const AGENT_SOCKET: &str = "agent.sock";
/// The monitor, in the VM's folder.
pub const QMP_SOCKET: &str = "qmp.sock";

/// A plain command on a live QEMU. It answers in under a millisecond; a busy host may delay it.
const QMP_DEADLINE: Duration = Duration::from_secs(10);
/// How long a QEMU that was asked to quit may take before it is killed.
const QUIT_DEADLINE: Duration = Duration::from_secs(5);

/// What a node gives a VM.
#[derive(Debug)]
pub struct VmResources {
    /// The VM's own folder, which exists: sockets, console, log and record go there.
    pub dir: PathBuf,
    /// Guest RAM, of exactly the size that the spec says.
    pub memory: Arc<GuestMemory>,
    /// The TAP, with `IFF_VNET_HDR`.
    pub tap: OwnedFd,
    /// The park's TAP, which QEMU keeps alive while no service runs.
    pub park: Option<OwnedFd>,
    /// The QEMU to run.
    pub qemu: QemuBinary,
    /// The kernel image.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// Where each image of the spec is served (`*.nbd`) or its file, in its order, then the sockets of its writable disks.
    pub disks: Vec<PathBuf>,
    /// The writable disks that QEMU reads and writes itself, by their index; their sockets are nothing.
    pub rbd: Vec<(usize, RbdImage)>,
}

/// What QEMU says its VM is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunState {
    /// The guest runs.
    Running,
    /// Stopped, by us or before its first instruction; `cont` makes it run.
    Paused,
    /// Stopped after its state was saved; `cont` makes it run.
    Saved,
    /// A save is under way.
    Saving,
    /// It awaits a state.
    Incoming,
    /// Something else, such as `internal-error` or `guest-panicked`, in QEMU's words.
    Other(String),
}

impl RunState {
    /// From the `RunState` enumeration of QEMU's QAPI schema.
    fn parse(text: &str) -> Self {
        match text {
            "running" => Self::Running,
            "paused" | "prelaunch" => Self::Paused,
            "postmigrate" => Self::Saved,
            "finish-migrate" => Self::Saving,
            "inmigrate" => Self::Incoming,
            other => Self::Other(other.to_owned()),
        }
    }
}

/// How a VM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmExit {
    /// QEMU's reason: `guest-shutdown`, `guest-reset`, `guest-panic`, `host-qmp-quit`;
    /// `None` if it gave none, as when it was killed.
    pub reason: Option<String>,
    /// The process's end, such as `signal: 9 (SIGKILL)`, if this service was its parent.
    pub status: Option<String>,
}

/// A VM whose QEMU runs. See the module's documentation for its life.
#[derive(Debug)]
pub struct Vm {
    record: VmRecord,
    process: Arc<Process>,
    memory: Arc<GuestMemory>,
    uffd: OwnedFd,
    tap: OwnedFd,
    park: Option<OwnedFd>,
    qmp: Arc<Qmp>,
    throttle: Arc<throttle::Slot>,
}

impl Vm {
    /// Starts a VM from its kernel; its guest runs when this returns.
    ///
    /// # Errors
    /// The spec is wrong, the system refuses, or QEMU ends; nothing is left running.
    pub async fn boot(spec: &VmSpec, res: VmResources) -> Result<Self, SpawnError> {
        let (vm, guard) = start(spec, res, Birth::Boot).await?;
        vm.qmp.execute("cont", Value::Null, QMP_DEADLINE).await?;
        guard.disarm();
        Ok(vm)
    }

    /// Starts a VM that is to be saved as a template; its guest runs when this returns. It has no disks to look at, and ends with this
    /// service at the latest.
    ///
    /// # Errors
    /// As [`Vm::boot`].
    pub async fn template(spec: &VmSpec, res: VmResources) -> Result<Self, SpawnError> {
        let (vm, guard) = start(spec, res, Birth::Template).await?;
        vm.qmp.execute("cont", Value::Null, QMP_DEADLINE).await?;
        guard.disarm();
        Ok(vm)
    }

    /// Starts a VM that awaits a state, see [`Vm::load_state`].
    ///
    /// QEMU may have written to guest memory when this returns: make it equal to the source's
    /// from here on, holes included.
    ///
    /// # Errors
    /// The spec is wrong, the system refuses, or QEMU ends; nothing is left running.
    pub async fn incoming(spec: &VmSpec, res: VmResources) -> Result<Self, SpawnError> {
        let (vm, guard) = start(spec, res, Birth::Incoming).await?;
        guard.disarm();
        Ok(vm)
    }

    /// Finds the VM again that an earlier service started, in whatever state it is; but not slowed down.
    ///
    /// # Errors
    /// Its process is gone, its descriptors cannot be taken, or its monitor is silent. The VM,
    /// if there is one, is left as it was.
    pub async fn attach(record: &VmRecord) -> Result<Self, AttachError> {
        let pid = record.pid;
        let failed = |what| move |source| AttachError::Descriptor { what, pid, source };
        let process = match Process::find(pid, record.start_time) {
            Ok(process) => process,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                throttle::forget(&record.dir);
                return Err(AttachError::Gone { pid });
            }
            Err(source) => return Err(failed("process")(source)),
        };
        let take = |what, number| process.get_fd(number).map_err(failed(what));
        let memory = take("guest memory", record.fds.memory)?;
        let memory = GuestMemory::from_fd(memory).map_err(failed("guest memory"))?;
        let tap = take("TAP", record.fds.tap)?;
        let park = record.fds.park.map(|fd| take("park", fd)).transpose()?;
        let uffd = take("userfaultfd", record.fds.uffd)?;
        let qmp = Qmp::connect(&record.dir.join(QMP_SOCKET), QMP_DEADLINE).await?;
        let vm = Self {
            record: record.clone(),
            process: Arc::new(process),
            memory: Arc::new(memory),
            uffd,
            tap,
            park,
            qmp: Arc::new(qmp),
            throttle: Arc::default(),
        };
        throttle::clear(&vm).await;
        Ok(vm)
    }

    /// What a later service needs for [`Vm::attach`]; also in the VM's folder, see
    /// [`VmRecord::load`].
    pub fn record(&self) -> VmRecord {
        self.record.clone()
    }

    /// What the VM was built from.
    pub fn spec(&self) -> &VmSpec {
        &self.record.spec
    }

    /// QEMU's process number.
    pub fn pid(&self) -> i32 {
        self.record.pid
    }

    /// The VM's folder.
    pub fn dir(&self) -> &Path {
        &self.record.dir
    }

    /// The agent's socket. QEMU serves one client at a time.
    pub fn agent_socket(&self) -> PathBuf {
        self.record.dir.join(AGENT_SOCKET)
    }

    /// Guest RAM.
    pub fn memory(&self) -> Arc<GuestMemory> {
        Arc::clone(&self.memory)
    }

    /// The userfaultfd of QEMU's address space, past its handshake: for
    /// [`crate::memory::DirtyTracker::start`].
    pub fn uffd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }

    /// A duplicate of the TAP: what the guest has not taken can still be read from it.
    ///
    /// # Errors
    /// This process has too many descriptors.
    pub fn tap(&self) -> io::Result<OwnedFd> {
        self.tap.try_clone()
    }

    /// A duplicate of the park's TAP, if the VM was given one.
    ///
    /// # Errors
    /// This process has too many descriptors.
    pub fn park(&self) -> io::Result<Option<OwnedFd>> {
        self.park.as_ref().map(OwnedFd::try_clone).transpose()
    }

    /// QEMU's events from now on.
    pub fn events(&self) -> broadcast::Receiver<QmpEvent> {
        self.qmp.events()
    }

    /// Stops the guest. When this returns, no virtual CPU runs and no device writes guest memory.
    ///
    /// # Errors
    /// QEMU is gone or silent; in the latter case the guest may run or not.
    pub async fn stop(&self) -> Result<(), ControlError> {
        let mut halted = self.throttle.halted.lock().await;
        *halted = true;
        self.command("stop").await.map(drop)
    }

    /// Makes the guest run: after `stop`, after a save (rollback), after a load.
    ///
    /// # Errors
    /// QEMU refuses, is gone or silent.
    pub async fn cont(&self) -> Result<(), ControlError> {
        let mut halted = self.throttle.halted.lock().await;
        let until = Instant::now() + QMP_DEADLINE;
        let mut settled = false;
        loop {
            match self.command("cont").await {
                Err(ControlError::Qmp { source, .. })
                    if source.is_refusal() && !settled && Instant::now() < until =>
                {
                    // QEMU says that a save is done a moment before it would go on.
                    settled = self.query_status().await? != RunState::Saving;
                    sleep(state::SETTLE_PERIOD).await;
                }
                result => {
                    *halted &= result.is_err();
                    return result.map(drop);
                }
            }
        }
    }

    /// What the VM is doing.
    ///
    /// # Errors
    /// QEMU is gone or silent.
    pub async fn query_status(&self) -> Result<RunState, ControlError> {
        let command = "query-status";
        let answer = self.command(command).await?;
        match answer.get("status").and_then(Value::as_str) {
            Some(text) => Ok(RunState::parse(text)),
            None => Err(ControlError::Strange { command }),
        }
    }

    /// Ends when the VM has ended, for whatever reason.
    ///
    /// # Errors
    /// The process cannot be watched.
    pub async fn wait_exit(&self) -> Result<VmExit, ControlError> {
        self.process
            .exited()
            .await
            .map_err(|source| self.cannot_end(source))?;
        Ok(VmExit {
            reason: self.qmp.shutdown_reason(),
            status: self.process.status().await.map(|s| s.to_string()),
        })
    }

    /// Asks QEMU to quit, and kills it if it does not: the guest is not asked, its devices are
    /// flushed.
    ///
    /// # Errors
    /// It could not even be killed.
    pub async fn quit(&self) -> Result<(), ControlError> {
        let asked = self.qmp.execute("quit", Value::Null, QUIT_DEADLINE).await;
        if !matches!(asked, Err(QmpError::Timeout { .. }))
            && let Ok(Ok(())) = timeout(QUIT_DEADLINE, self.process.exited()).await
        {
            self.record.remove();
            return Ok(());
        }
        self.kill().await
    }

    /// Kills QEMU at once, and waits until it is gone.
    ///
    /// # Errors
    /// The kernel refuses, or the process does not end in time.
    pub async fn kill(&self) -> Result<(), ControlError> {
        self.process
            .kill()
            .await
            .map_err(|source| self.cannot_end(source))?;
        self.record.remove();
        Ok(())
    }

    fn cannot_end(&self, source: io::Error) -> ControlError {
        ControlError::Process {
            pid: self.record.pid,
            source,
        }
    }

    async fn command(&self, verb: &'static str) -> Result<Value, ControlError> {
        self.qmp
            .execute(verb, Value::Null, QMP_DEADLINE)
            .await
            .map_err(|source| ControlError::Qmp { verb, source })
    }
}
