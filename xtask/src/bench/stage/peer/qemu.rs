//! One QEMU process that we start by hand, and its monitor. Dropping it ends the process.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tokio::runtime::Handle;
use vm_runtime::command_line::{BootMode, FdNumbers, Local};
use vm_runtime::pod::PodSpec;
use vm_runtime::qemu::QemuBinary;
use vm_runtime::qmp::Qmp;
use vm_runtime::spec::{Accel, CPU, DiskSpec, KERNEL_CMDLINE, MACHINE, VmSpec, WritableDisk};
use vm_runtime::units::Bytes;

use super::args::{self, Memory, Shape};
use crate::bench::stage::pod;
use crate::lab::{Lab, Node};
use crate::netns;

/// From exec to the monitor's greeting.
const STARTS_WITHIN: Duration = Duration::from_secs(60);
/// A monitor answers in milliseconds, unless its main loop waits for a device or for a page.
const ANSWERS_WITHIN: Duration = Duration::from_secs(30);

/// What all QEMUs of a stage have in common.
#[derive(Debug)]
pub(in crate::bench) struct Ground {
    pub(in crate::bench) lab: Lab,
    pub(in crate::bench) runtime: Handle,
    pub(in crate::bench) qemu: QemuBinary,
    pub(in crate::bench) accel: Accel,
    pub(in crate::bench) kernel: PathBuf,
    pub(in crate::bench) initramfs: PathBuf,
    /// The block device with the image.
    pub(in crate::bench) disk: PathBuf,
}

impl Ground {
    /// The folder that everything of the peer is in.
    pub(super) fn dir(&self) -> PathBuf {
        self.lab.dir().join("peer")
    }

    /// The file of the guest's writable disk on a node.
    pub(super) fn writable(&self, node: Node) -> PathBuf {
        self.dir().join(format!("disk-{}.img", node.name()))
    }

    /// A node's certificates under the names that QEMU wants.
    pub(in crate::bench) fn tls_dir(&self, node: Node) -> PathBuf {
        self.dir().join(format!("tls-{}", node.name()))
    }

    /// The VM of a pod, as migrator would make it.
    fn spec(&self, pod: &PodSpec, disk_mib: u32) -> Result<VmSpec> {
        let size = std::fs::metadata(&self.disk)
            .with_context(|| format!("cannot read {}", self.disk.display()))?
            .len();
        Ok(VmSpec {
            name: pod.name.clone(),
            uuid: "8a5e2f0c-0000-4000-8000-000000000002".to_owned(),
            machine: self.qemu.machine_or_newest(MACHINE).to_owned(),
            cpu: CPU.to_owned(),
            accel: self.accel,
            memory: pod.memory,
            vcpus: pod.vcpus,
            mac: pod.net.mac,
            disks: vec![DiskSpec {
                serial: pod::DISK.to_owned(),
                image_digest: String::new(),
                size: Bytes(size),
            }],
            writable: match disk_mib {
                0 => Vec::new(),
                mib => vec![WritableDisk {
                    serial: pod::WRITABLE.to_owned(),
                    name: "data".to_owned(),
                    size: Bytes::mib(mib.into()),
                    shared: None,
                }],
            },
            free_page_reporting: true,
            announced_images: false,
            hugepages: false,
            cmdline: KERNEL_CMDLINE.to_owned(),
            kernel_sha256: String::new(),
            initramfs_sha256: String::new(),
        })
    }
}

/// A QEMU that runs, or has ended and was not waited for.
pub(super) struct Qemu {
    child: Child,
    dir: PathBuf,
    qmp: Option<Qmp>,
    runtime: Handle,
    /// Where it runs.
    pub(super) node: Node,
    /// Which of the node's TAPs it has.
    pub(super) tap: usize,
}

/// The TAPs of a node: two, because an old and a new VMM of one guest may be there at the same time.
pub(in crate::bench) const TAPS: [&str; 2] = ["bench0", "bench1"];

/// Names of folders.
static NUMBER: AtomicU32 = AtomicU32::new(0);

impl Qemu {
    /// Starts it; its monitor is not connected yet.
    ///
    /// # Errors
    /// The command line cannot be built, or the program cannot be executed.
    pub(super) fn spawn(
        ground: &Ground,
        pod: &PodSpec,
        node: Node,
        tap: usize,
        memory: Memory,
        incoming: args::Incoming<'_>,
        disk_mib: u32,
    ) -> Result<Qemu> {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let dir = ground.dir().join(number.to_string());
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let (qmp, agent) = (listener(&dir, QMP)?, listener(&dir, AGENT)?);
        let writable = (disk_mib > 0).then(|| ground.writable(node));
        let disks: Vec<PathBuf> = std::iter::once(ground.disk.clone())
            .chain(writable.clone())
            .collect();
        let args = args::build(
            &ground.spec(pod, disk_mib)?,
            &Local {
                mode: BootMode::Boot,
                fds: FdNumbers {
                    // Neither is inherited: see `args`.
                    memory: -1,
                    tap: -1,
                    qmp: qmp.as_raw_fd(),
                    agent: agent.as_raw_fd(),
                },
                kernel: &ground.kernel,
                initramfs: &ground.initramfs,
                disks: &disks,
                data_dirs: &ground.qemu.data_dirs,
                rbd: &[],
            },
            Shape {
                memory,
                incoming,
                tap: TAPS[tap],
                tls: &ground.tls_dir(node),
                writable: writable.as_deref(),
            },
        )?;
        let log = File::create(dir.join(LOG)).context("cannot make QEMU's log")?;
        let mut command = Command::new(&ground.qemu.path);
        command
            .args(args)
            .current_dir(&dir)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        if let Some(libraries) = &ground.qemu.lib_dir {
            command.env("LD_LIBRARY_PATH", libraries);
        }
        let child = netns::spawn(&ground.lab.netns(node.name()), &mut command)?;
        Ok(Qemu {
            child,
            dir,
            qmp: None,
            runtime: ground.runtime.clone(),
            node,
            tap,
        })
    }

    /// Connects to its monitor, and has it tell of migrations.
    ///
    /// # Errors
    /// It ended, or does not answer.
    pub(super) fn connect(&mut self) -> Result<()> {
        let qmp = self
            .runtime
            .block_on(Qmp::connect(&self.monitor(), STARTS_WITHIN))
            .with_context(|| self.last_words())?;
        self.qmp = Some(qmp);
        Ok(())
    }

    /// The monitor's socket.
    pub(super) fn monitor(&self) -> PathBuf {
        self.dir.join(QMP)
    }

    /// Takes a monitor that was connected to elsewhere.
    pub(super) fn adopt(&mut self, monitor: Qmp) {
        self.qmp = Some(monitor);
    }

    /// Its monitor.
    ///
    /// # Errors
    /// It is not connected.
    pub(super) fn qmp(&self) -> Result<&Qmp> {
        self.qmp.as_ref().context("the monitor is not connected")
    }

    /// One command; arguments are an object, or null.
    ///
    /// # Errors
    /// QEMU refuses, or is gone.
    pub(super) fn execute(&self, command: &str, arguments: Value) -> Result<Value> {
        let answer = self.qmp()?.execute(command, arguments, ANSWERS_WITHIN);
        self.runtime
            .block_on(answer)
            .with_context(|| self.last_words())
    }

    /// Sets migration capabilities, each to on or off.
    ///
    /// # Errors
    /// As [`Qemu::execute`].
    pub(super) fn set_capabilities(&self, capabilities: &[(&str, bool)]) -> Result<()> {
        let list: Vec<Value> = capabilities
            .iter()
            .map(|(name, state)| json!({ "capability": name, "state": state }))
            .collect();
        let arguments = json!({ "capabilities": list });
        self.execute("migrate-set-capabilities", arguments)
            .map(drop)
    }

    /// The socket of the guest's agent.
    pub(super) fn agent_socket(&self) -> PathBuf {
        self.dir.join(AGENT)
    }

    /// Whether it runs.
    pub(super) fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// The end of what QEMU and the guest's kernel said.
    pub(super) fn last_words(&self) -> String {
        let mut text = format!("QEMU at node {}", self.node.name());
        for file in [LOG, CONSOLE] {
            let said = std::fs::read(self.dir.join(file)).unwrap_or_default();
            let said = String::from_utf8_lossy(&said);
            let lines: Vec<&str> = said.lines().filter(|line| !line.is_empty()).collect();
            let tail = &lines[lines.len().saturating_sub(3)..];
            if !tail.is_empty() {
                text += &format!(", {file} ends with: {}", tail.join(" | "));
            }
        }
        text
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Gone already is fine; and a folder that stays is in the lab's.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

const QMP: &str = "qmp.sock";
const AGENT: &str = "agent.sock";
const LOG: &str = "qemu.log";
const CONSOLE: &str = "console.log";

/// A listening socket that a child inherits under the same number: it can be connected to before the child is even there.
/// Ours must be closed when the child has been started, so that its death ends whoever connects.
fn listener(dir: &Path, name: &str) -> Result<OwnedFd> {
    let path = dir.join(name);
    let socket = UnixListener::bind(&path)
        .with_context(|| format!("cannot listen at {}", path.display()))?;
    // A duplicate is not closed on exec, dup(2).
    nix::unistd::dup(&socket).context("cannot duplicate a socket")
}
