//! Starting QEMU: one thread a VM, which forks it, traces it for a moment, and later reaps it.
//!
//! ```text
//! fork -> setsid, die with the parent, be traced -> exec stops
//!   inject userfaultfd(2), take it by pidfd_getfd, do its handshake
//!   write the record                        <- until here the child dies with this service
//!   let it outlive us, detach               <- from here a restarted service finds it
//! wait -> exit status
//! ```
//!
//! ptrace(2) wants every call from the thread that forked, hence the thread of its own.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;

use nix::unistd::Pid;
use tokio::sync::{oneshot, watch};

use super::process::Process;
use super::record::{VmRecord, VmmFds, VmmProcess};
use super::{AGENT_SOCKET, LOG, QMP_SOCKET, SpawnError, VmResources, child, inject, pidfd};
use crate::command_line::{self, BootMode, FdNumbers, Local};
use crate::memory;
use crate::spec::VmSpec;

/// `sizeof(sun_path)` without the final zero, unix(7).
const MAX_SOCKET_PATH: usize = 107;

/// How a QEMU begins.
#[derive(Debug)]
pub(super) enum Birth {
    /// At the kernel's first instruction.
    Boot,
    /// With a state that comes from elsewhere.
    Incoming,
    /// As [`Birth::Boot`], with nothing behind its disks, and not to outlive this service.
    Template,
    /// With the state of a QEMU on this machine, whose memory and TAP it shares.
    Successor(Succession),
}

/// What a QEMU that replaces another gets in addition.
#[derive(Debug)]
pub(super) struct Succession {
    /// The VM's folder.
    pub(super) home: PathBuf,
    /// Who is replaced.
    pub(super) predecessor: VmmProcess,
    /// The TAP that it takes for its own until it gets the other.
    pub(super) spare_tap: OwnedFd,
}

pub(super) struct Spawned {
    pub(super) process: Process,
    pub(super) uffd: OwnedFd,
    pub(super) record: VmRecord,
}

/// Starts QEMU, paused; it holds all our descriptors, and its record is in the VM's folder.
pub(super) async fn spawn(
    spec: &VmSpec,
    res: &VmResources,
    birth: Birth,
) -> Result<Spawned, SpawnError> {
    let plan = Plan::new(spec, res, &birth)?;
    let (sender, receiver) = oneshot::channel();
    thread::Builder::new()
        .name(format!("vmm {}", spec.name))
        .spawn(move || run(plan, sender))
        .map_err(system("start a thread for QEMU"))?;
    match receiver.await {
        Ok(spawned) => spawned,
        Err(_) => Err(system("start QEMU")(io::Error::other(
            "its thread has ended",
        ))),
    }
}

/// Everything that the thread needs.
struct Plan {
    command: Command,
    /// Duplicates under the numbers that they have in the child.
    kept: Vec<OwnedFd>,
    memory: RawFd,
    tap: RawFd,
    netdev: RawFd,
    park: Option<RawFd>,
    spec: VmSpec,
    dir: PathBuf,
    home: Option<PathBuf>,
    predecessor: Option<VmmProcess>,
    outlives: bool,
    qemu: crate::qemu::QemuBinary,
}

impl Plan {
    fn new(spec: &VmSpec, res: &VmResources, birth: &Birth) -> Result<Self, SpawnError> {
        let given = res.memory.len().0;
        if given != spec.memory.0 {
            return Err(SpawnError::Memory {
                spec: spec.memory.0,
                given,
            });
        }
        let mut kept = Vec::new();
        let mut keep = |fd: &dyn AsFd| -> Result<RawFd, SpawnError> {
            let copy = child::numbered(fd.as_fd()).map_err(system("duplicate a descriptor"))?;
            let number = copy.as_raw_fd();
            kept.push(copy);
            Ok(number)
        };
        let memory = keep(&*res.memory)?;
        let tap = keep(&res.tap)?;
        let park = res.park.as_ref().map(|park| keep(park)).transpose()?;
        let (mode, succession) = match birth {
            Birth::Boot => (BootMode::Boot, None),
            Birth::Incoming => (BootMode::Incoming, None),
            Birth::Template => (BootMode::Template, None),
            Birth::Successor(succession) => (BootMode::Incoming, Some(succession)),
        };
        let netdev = match succession {
            Some(succession) => keep(&succession.spare_tap)?,
            None => tap,
        };
        let fds = FdNumbers {
            memory,
            tap: netdev,
            qmp: keep(&listen(&res.dir, QMP_SOCKET)?)?,
            agent: keep(&listen(&res.dir, AGENT_SOCKET)?)?,
        };
        let args = command_line::build(
            spec,
            &Local {
                mode,
                fds,
                kernel: &res.kernel,
                initramfs: &res.initramfs,
                disks: &res.disks,
                data_dirs: &res.qemu.data_dirs,
                rbd: &res.rbd,
            },
        )?;
        let log = open_log(&res.dir).map_err(system("open QEMU's log"))?;
        let errors = log.try_clone().map_err(system("open QEMU's log"))?;
        let mut command = Command::new(&res.qemu.path);
        command
            .args(args)
            .current_dir(&res.dir)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors);
        if let Some(dir) = &res.qemu.lib_dir {
            command.env("LD_LIBRARY_PATH", dir);
        }
        child::prepare(&mut command, &kept);
        Ok(Self {
            command,
            kept,
            memory,
            tap,
            netdev,
            park,
            spec: spec.clone(),
            dir: res.dir.clone(),
            home: succession.map(|succession| succession.home.clone()),
            predecessor: succession.map(|succession| succession.predecessor),
            outlives: mode != BootMode::Template,
            qemu: res.qemu.clone(),
        })
    }
}

/// The thread: from fork to the exit status.
fn run(mut plan: Plan, sender: oneshot::Sender<Result<Spawned, SpawnError>>) {
    let mut child = match plan.command.spawn() {
        Ok(child) => child,
        Err(source) => {
            // Nobody may wait any more; there is nothing to undo.
            let _ = sender.send(Err(system("execute QEMU")(source)));
            return;
        }
    };
    let (exit, status) = watch::channel(None);
    let sent = match adopt(&plan, &child, status) {
        Ok(spawned) => sender.send(Ok(spawned)),
        Err(error) => {
            end(&mut child);
            sender.send(Err(error))
        }
    };
    if let Err(Ok(spawned)) = sent {
        // The caller has gone away, and with it the only owner.
        end(&mut child);
        spawned.record.remove();
    }
    // The listening sockets must be QEMU's alone, so that its death ends whoever connects.
    drop(plan);
    // Not wait(2) from here on: it would take the stops of a traced child away from whoever traces it.
    if let Err(error) = pidfd::await_exit(child.id()) {
        tracing::warn!(%error, "QEMU's end cannot be awaited");
        return;
    }
    publish(child.wait(), &exit);
}

fn adopt(
    plan: &Plan,
    child: &Child,
    status: watch::Receiver<Option<ExitStatus>>,
) -> Result<Spawned, SpawnError> {
    let pid = i32::try_from(child.id()).map_err(|e| system("name QEMU")(io::Error::other(e)))?;
    let traced = Pid::from_raw(pid);
    inject::await_exec(traced).map_err(system("trace QEMU at its start"))?;
    let process = Process::child(pid, status).map_err(system("watch QEMU"))?;
    let number = inject::userfaultfd(traced).map_err(system(
        "create a userfaultfd in QEMU (needs CONFIG_USERFAULTFD and root)",
    ))?;
    let uffd = process
        .get_fd(number)
        .map_err(system("take QEMU's userfaultfd"))?;
    memory::handshake(uffd.as_fd())
        .map_err(system("set up the userfaultfd (needs Linux 6.7 or later)"))?;
    let record = VmRecord {
        pid,
        start_time: process.start_time,
        qemu: plan.qemu.clone(),
        dir: plan.dir.clone(),
        home: plan.home.clone(),
        predecessor: plan.predecessor,
        fds: VmmFds {
            memory: plan.memory,
            tap: plan.tap,
            netdev: (plan.netdev != plan.tap).then_some(plan.netdev),
            park: plan.park,
            uffd: number,
        },
        spec: plan.spec.clone(),
    };
    record.store().map_err(system("write the VM's record"))?;
    if plan.outlives {
        inject::survive_parent(traced).map_err(system("let QEMU outlive the service"))?;
    }
    inject::detach(traced).map_err(system("let QEMU run"))?;
    tracing::debug!(pid, vm = %plan.spec.name, kept = plan.kept.len(), "QEMU started");
    Ok(Spawned {
        process,
        uffd,
        record,
    })
}

fn end(child: &mut Child) {
    if let Err(error) = child.kill() {
        tracing::warn!(%error, "a QEMU that failed to start was not killed");
    }
}

fn publish(status: io::Result<ExitStatus>, exit: &watch::Sender<Option<ExitStatus>>) {
    match status {
        Ok(status) => {
            tracing::debug!(%status, "QEMU ended");
            exit.send_replace(Some(status));
        }
        Err(error) => tracing::warn!(%error, "QEMU cannot be waited for"),
    }
}

/// A listening socket that QEMU inherits: it can be connected to before QEMU is even there.
fn listen(dir: &Path, name: &str) -> Result<UnixListener, SpawnError> {
    let path = dir.join(name);
    if path.as_os_str().len() > MAX_SOCKET_PATH {
        return Err(SpawnError::PathTooLong { path });
    }
    match std::fs::remove_file(&path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(system("remove an old socket")(source)),
    }
    UnixListener::bind(&path).map_err(system("make a socket in the VM's folder"))
}

fn open_log(dir: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(dir.join(LOG))
}

fn system(step: &'static str) -> impl FnOnce(io::Error) -> SpawnError {
    move |source| SpawnError::System { step, source }
}
