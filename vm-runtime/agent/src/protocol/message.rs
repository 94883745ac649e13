//! What is said. Each Data frame carries one [`HostMessage`] or one [`GuestMessage`], in postcard.
//!
//! Variants and fields are only ever added at the end, and with a new protocol version.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

pub use super::blob::Blob;
use super::settings::{Condition, ContainerSettings, PodSettings};

/// Identifies a request; unique in the life of a guest, so that a repeated one is answered from memory.
pub type RequestId = u64;

/// Identifies a process started by [`Request::Exec`]; chosen by the host.
pub type ExecId = u64;

/// The most bytes of stream data in one message.
pub const MAX_CHUNK: usize = 16 << 10;

/// Container output that the guest holds until the host has acknowledged it, in bytes per stream.
/// When it is full, the guest stops reading, the pipe fills, and the container blocks in write(2).
pub const OUTPUT_WINDOW: u64 = 256 << 10;

/// Bytes that may be under way in each direction of an exec before the consumer has taken them.
pub const EXEC_WINDOW: u64 = 128 << 10;

/// From the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostMessage {
    /// Something that is answered by a [`GuestMessage::Reply`] with the same id.
    Request {
        /// Its id.
        id: RequestId,
        /// What is asked.
        request: Request,
    },
    /// Bytes for an exec's standard input, within the window.
    Stdin {
        /// Which.
        exec: ExecId,
        /// The bytes; empty with `eof`.
        data: Blob,
        /// Close the input after these bytes.
        eof: bool,
    },
    /// The terminal's size has changed.
    Resize {
        /// Which.
        exec: ExecId,
        /// Rows of characters.
        rows: u16,
        /// Columns of characters.
        cols: u16,
    },
    /// Send a signal to an exec's process.
    ExecSignal {
        /// Which.
        exec: ExecId,
        /// The signal's number.
        signal: i32,
    },
    /// The consumer has taken this many bytes of the exec's output.
    OutputCredit {
        /// Which.
        exec: ExecId,
        /// Bytes.
        bytes: u32,
    },
}

/// What the host can ask.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Set up network, mounts and limits. Once; a second one is answered `Done` if it is the same.
    Configure(Box<Configuration>),
    /// Start the containers in order. `Done` when all run; again `Done` if they have been started.
    StartPod,
    /// Run a process in a container.
    Exec(ExecSpec),
    /// Send a signal to a container's first process.
    Signal {
        /// The container.
        container: String,
        /// The signal's number.
        signal: i32,
    },
    /// SIGTERM to each container in reverse order, SIGKILL after `grace_ms`; answered when all are gone.
    StopPod {
        /// Milliseconds between the two.
        grace_ms: u64,
    },
    /// Set CLOCK_REALTIME.
    SetClock {
        /// Nanoseconds since 1970.
        unix_ns: u64,
    },
    /// Uptime, memory and load.
    Stats,
    /// What has been started, and what of it runs.
    Status,
    /// Power off at once. Not answered.
    PowerOff,
    /// Give memory back that is not needed: before the guest becomes a template. Since version 3.
    Settle,
    /// Become another guest than the one that was saved, before Configure. Since version 3.
    Identify(Identity),
    /// How the containers fare. Since version 3.
    Conditions,
}

/// What a guest that was started from a template must not share with others of that template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Random bytes for the kernel's generator, which is keyed anew.
    pub entropy: Blob,
    /// CLOCK_REALTIME, in nanoseconds since 1970.
    pub unix_ns: u64,
    /// The VM's UUID, as /sys/class/dmi/id/product_uuid is to show it to containers.
    pub uuid: String,
    /// The MAC address of the template's network device.
    pub old_mac: [u8; 6],
    /// Its MAC address from now on.
    pub mac: [u8; 6],
}

/// Everything that a pod is, for its guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configuration {
    /// Host name of the guest and of its containers.
    pub hostname: String,
    /// Network interfaces, found by MAC.
    pub interfaces: Vec<Interface>,
    /// Name servers for a container without a resolv.conf.
    pub dns: Vec<IpAddr>,
    /// The containers, started in this order.
    pub containers: Vec<Container>,
    /// Extra sysctls as (`net.ipv4.tcp_syncookies`, `1`), set last.
    pub sysctls: Vec<(String, String)>,
    /// Of the containers that have disks to write to. Since version 2.
    pub storage: Vec<Storage>,
    /// Of the pod as a whole. Since version 3.
    pub settings: PodSettings,
    /// Of each container, in the order of `containers`. Since version 3.
    pub container_settings: Vec<ContainerSettings>,
    /// How many bytes of stdout and of stderr of each container came before, from an earlier guest; in the order of `containers`, zero where it
    /// ends early. Since version 3.
    pub output_offsets: Vec<(u64, u64)>,
}

/// The disks that a container writes to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Storage {
    /// The container's name.
    pub container: String,
    /// Serial of the disk with its writable layer; `None`: that is in guest memory.
    pub layer: Option<String>,
    /// Its volumes.
    pub mounts: Vec<Mount>,
}

/// A volume of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Serial of the disk.
    pub disk: String,
    /// Where the container finds it; made if absent.
    pub path: String,
    /// Whether it may not write to it.
    pub read_only: bool,
}

/// One network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its MAC address.
    pub mac: [u8; 6],
    /// Addresses with their prefix length.
    pub addresses: Vec<(IpAddr, u8)>,
    /// Default gateways.
    pub gateways: Vec<IpAddr>,
    /// Neighbours whose MAC address is known beforehand, and never asked for.
    pub neighbours: Vec<(IpAddr, [u8; 6])>,
    /// The longest packet that it sends, in bytes, if not the device's own.
    pub mtu: Option<u32>,
}

/// One container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// Its name: a DNS label.
    pub name: String,
    /// Serial of the virtio-blk disk that holds its EROFS image, such as `img0`.
    pub disk: String,
    /// Program and arguments; the program is looked up in PATH.
    pub argv: Vec<String>,
    /// Environment, a later one of the same name winning.
    pub env: Vec<(String, String)>,
    /// Working directory; made if absent. Empty is `/`.
    pub working_dir: String,
    /// `user`, `user:group`, names or numbers as the image has them. Empty is root.
    pub user: String,
    /// memory.max of its cgroup, in bytes.
    pub memory_limit: Option<u64>,
    /// cpu.max of its cgroup, in thousandths of a CPU.
    pub cpu_limit_milli: Option<u32>,
}

/// A process to run in a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecSpec {
    /// The container's name.
    pub container: String,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Added to the container's environment.
    pub env: Vec<(String, String)>,
    /// On a terminal of this many rows and columns; without, on three pipes.
    pub tty: Option<(u16, u16)>,
    /// Whether standard input will be sent; without, it is empty.
    pub stdin: bool,
}

/// From the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GuestMessage {
    /// The answer to a request.
    Reply {
        /// The request's id.
        id: RequestId,
        /// Answer or failure.
        result: Result<Reply, Failure>,
    },
    /// Something happened.
    Event(Event),
}

/// Answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// Done; nothing to tell.
    Done,
    /// To Exec: it runs. The exec's id is the request's.
    ExecStarted,
    /// To Stats.
    Stats(Stats),
    /// To Status.
    Status(Status),
    /// To Conditions: each container, in order. Since version 3.
    Conditions(Vec<Condition>),
}

/// Why a request failed; the text says what, and what to do where there is something to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The class, for programs.
    pub kind: FailureKind,
    /// The text, for people.
    pub message: String,
}

/// Classes of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// Asked at the wrong time: not configured, already stopped, configured otherwise.
    State,
    /// No such container, or it does not run.
    NoContainer,
    /// The program is not there or cannot be executed.
    NotExecutable,
    /// The request makes no sense.
    Invalid,
    /// The guest's kernel refused something.
    System,
}

/// Figures about the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Milliseconds since boot.
    pub uptime_ms: u64,
    /// MemTotal, in bytes.
    pub memory_total: u64,
    /// MemFree, in bytes.
    pub memory_free: u64,
    /// MemAvailable, in bytes.
    pub memory_available: u64,
    /// One-minute load, in thousandths.
    pub load_milli: u32,
    /// CLOCK_REALTIME, in nanoseconds since 1970.
    pub clock_unix_ns: u64,
    /// Each container's use.
    pub containers: Vec<ContainerStats>,
}

/// Figures about one container, from its cgroup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerStats {
    /// Its name.
    pub name: String,
    /// memory.current, in bytes.
    pub memory: u64,
    /// CPU time used, in microseconds.
    pub cpu_us: u64,
}

/// What has been started, and what of it runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Configure has been done.
    pub configured: bool,
    /// StartPod has been done.
    pub started: bool,
    /// Each container, in order.
    pub containers: Vec<ContainerStatus>,
}

/// One container's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerStatus {
    /// Its name.
    pub name: String,
    /// Its state.
    pub state: ContainerState,
}

/// States of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContainerState {
    /// Not started yet.
    Waiting,
    /// Running, with this process id in the guest.
    Running {
        /// Process id.
        pid: i32,
    },
    /// Its first process has ended.
    Exited {
        /// Exit code, or 128 plus the signal's number.
        code: i32,
    },
}

/// Which of a process's outputs. A terminal has only `Stdout`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Things that happen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The agent is up. The first message of a guest's life.
    Ready {
        /// The guest's kernel release.
        kernel: String,
        /// Milliseconds from the kernel's start.
        boot_ms: u64,
    },
    /// A container's program runs.
    Started {
        /// Which.
        container: String,
        /// Its process id in the guest.
        pid: i32,
    },
    /// A container has written.
    Output {
        /// Which.
        container: String,
        /// Where.
        stream: Stream,
        /// Bytes of this stream before these, since the container's start.
        offset: u64,
        /// The bytes.
        data: Blob,
    },
    /// An exec has written.
    ExecOutput {
        /// Which.
        exec: ExecId,
        /// Where.
        stream: Stream,
        /// The bytes.
        data: Blob,
    },
    /// The exec's process has taken this many bytes of its input.
    StdinCredit {
        /// Which.
        exec: ExecId,
        /// Bytes.
        bytes: u32,
    },
    /// An exec has ended; its output came before.
    ExecExited {
        /// Which.
        exec: ExecId,
        /// Exit code, or 128 plus the signal's number.
        code: i32,
    },
    /// A container's first process has ended, and with it all of the container; its output came before.
    ContainerExited {
        /// Which.
        container: String,
        /// Exit code, or 128 plus the signal's number.
        code: i32,
    },
    /// StopPod is done: no container runs.
    Stopped,
    /// Something went wrong that nobody asked about.
    Error {
        /// What the agent was doing.
        context: String,
        /// What happened.
        message: String,
    },
    /// A container fares otherwise than before. Since version 3.
    Condition(Condition),
}
