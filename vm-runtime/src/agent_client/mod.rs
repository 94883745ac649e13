//! The host's end of the agent's link: requests, events, container output and exec streams.
//!
//! One task owns the connection and the link's state (`actor.rs`); an [`AgentClient`] is a cheap handle
//! on it. What the link promises, and how it survives a move, is told in [`guest_agent::protocol`].
//!
//! A migration uses it like this:
//!
//! ```text
//!   source       detach(limit)     refuse new requests, wait until the guest has acknowledged the old
//!                state()           what moves with the pod; nothing is read or written any more
//!                (VM stops)
//!   rollback     reattach()        as if nothing had happened
//!   other VMM    reattach_at()     the same on the node itself, where another VMM has taken the guest over
//!   destination  resume(state)     may be called before the VM runs: the answer comes when it does
//! ```
//!
//! What is absent: any policy. Logs are an [`OutputSink`]'s business, restarts the pod's.

mod actor;
mod begin;
mod error;
mod exec;
mod inbound;
mod pod;
mod unread;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub use begin::Beginning;
pub use error::{AgentError, ConnectError};
pub use exec::{Exec, ExecControl, ExecInput, ExecOutput};
use guest_agent::protocol::link::HostLinkState;
pub use guest_agent::protocol::message::{
    Blob, Configuration, Container, ContainerState, ContainerStatus, Event, ExecId, ExecSpec,
    Failure, FailureKind, Identity, Interface, Mount, Stats, Status, Storage, Stream,
};
use guest_agent::protocol::message::{Reply, Request, RequestId};
pub use guest_agent::protocol::settings::{
    Check, Condition, ContainerSettings, HostAlias, MemoryMount, MemoryVolume, PodSettings, Probe,
    Reason, Resolver, Restart,
};
pub use pod::{ImageSettings, configuration};
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, oneshot};

use actor::{Actor, Command};

/// How long a guest may take to answer a request, beyond what the request itself allows. A stopped or
/// crowded VM under TCG answers late; a dead one never.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Events kept for a receiver that is slow.
const EVENT_BACKLOG: usize = 256;

/// Where container output goes. Called from the client's task, in order: it should write to a file's
/// page cache and return, and deal with its own errors. When it returns, the output is acknowledged and
/// the guest forgets it.
///
/// Container names come from the guest: take only those that the pod has.
pub trait OutputSink: Send + Sync + 'static {
    /// `data` follows the first `offset` bytes of this stream. After a gap (output of before a
    /// move whose log did not move along), `offset` is greater than [`Self::last_offset`].
    fn append(&self, container: &str, stream: Stream, offset: u64, data: &[u8]);

    /// The offset after the last byte stored, 0 if there is none. What the guest sends again from
    /// before it is dropped.
    fn last_offset(&self, container: &str, stream: Stream) -> u64;
}

/// What moves with the pod: the link's numbers and unacknowledged messages. Take it with [`AgentClient::state`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentState {
    link: HostLinkState,
    next_request: RequestId,
    offsets: Vec<(String, Stream, u64)>,
}

impl AgentState {
    /// For each container and stream that has written: the offset after the last byte given to the sink.
    pub fn offsets(&self) -> &[(String, Stream, u64)] {
        &self.offsets
    }
}

/// A handle on the connection to one guest's agent. The connection ends with its last handle.
#[derive(Clone, Debug)]
pub struct AgentClient {
    commands: mpsc::UnboundedSender<Command>,
    events: broadcast::Sender<Event>,
}

impl AgentClient {
    /// Attaches with a fresh session: at boot, or when the service has been restarted. The socket is
    /// tried until it is there; returns when the guest's agent has answered.
    ///
    /// # Errors
    /// [`ConnectError`] when `limit` is over; nothing is left running then.
    pub async fn connect(
        socket: &Path,
        sink: Arc<dyn OutputSink>,
        limit: Duration,
    ) -> Result<Self, ConnectError> {
        Self::attach(socket, sink, None, limit).await
    }

    /// Goes on where another client stopped, on the other side of a migration or here. If the guest does
    /// not know the session, begins a fresh one.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn resume(
        socket: &Path,
        sink: Arc<dyn OutputSink>,
        state: AgentState,
        limit: Duration,
    ) -> Result<Self, ConnectError> {
        Self::attach(socket, sink, Some(state), limit).await
    }

    async fn attach(
        socket: &Path,
        sink: Arc<dyn OutputSink>,
        state: Option<AgentState>,
        limit: Duration,
    ) -> Result<Self, ConnectError> {
        let (commands, inbox) = mpsc::unbounded_channel();
        let (events, _) = broadcast::channel(EVENT_BACKLOG);
        let (attached, answer) = oneshot::channel();
        let actor = Actor::new(socket, sink, state, inbox, events.clone());
        // The task ends when `commands` is dropped.
        tokio::spawn(actor.run(attached));
        match tokio::time::timeout(limit, answer).await {
            Ok(Ok(outcome)) => outcome.map(|()| Self { commands, events }),
            Ok(Err(_)) => Err(ConnectError::NoAnswer { limit }),
            // The task retries both a socket that does not accept and a guest that does not answer.
            Err(_) => match UnixStream::connect(socket).await {
                Ok(_) => Err(ConnectError::NoAnswer { limit }),
                Err(source) => Err(ConnectError::Socket {
                    path: socket.to_owned(),
                    source,
                }),
            },
        }
    }

    /// Gives back what memory the guest does not need, before it becomes a template.
    ///
    /// # Errors
    /// [`AgentError`]; `NoAnswer` from an agent that is too old for it.
    pub async fn settle(&self) -> Result<(), AgentError> {
        self.done(Request::Settle, ANSWER_LIMIT).await
    }

    /// Sets up network, mounts and limits. Once per guest; the same again is no error.
    ///
    /// # Errors
    /// [`AgentError`]; `Refused` when the guest is configured otherwise or its kernel refuses something.
    pub async fn configure(&self, configuration: Configuration) -> Result<(), AgentError> {
        self.done(Request::Configure(Box::new(configuration)), ANSWER_LIMIT)
            .await
    }

    /// Starts the containers in order; returns when each one's program runs. Again is no error.
    ///
    /// # Errors
    /// [`AgentError`]; `Refused` names the container that did not start. Those before it run.
    pub async fn start_pod(&self) -> Result<(), AgentError> {
        self.done(Request::StartPod, ANSWER_LIMIT).await
    }

    /// Runs a program in a container.
    ///
    /// # Errors
    /// [`AgentError`]; `Refused` when the container does not run or the program cannot be executed.
    pub async fn exec(&self, spec: ExecSpec) -> Result<Exec, AgentError> {
        let (reply, answer) = oneshot::channel();
        let stdin = spec.stdin || spec.tty.is_some();
        let (exec, ends) = exec::channel(self.commands.clone(), stdin);
        self.send(Command::Exec { spec, ends, reply })?;
        match wait(answer, ANSWER_LIMIT).await? {
            (id, Reply::ExecStarted) => Ok(exec.named(id)),
            (_, Reply::Done | Reply::Stats(_) | Reply::Status(_) | Reply::Conditions(_)) => {
                Err(AgentError::Confused)
            }
        }
    }

    /// Sends a signal, by number, to a container's first process.
    ///
    /// # Errors
    /// [`AgentError`]; `Refused` when the container does not run.
    pub async fn signal(&self, container: &str, signal: i32) -> Result<(), AgentError> {
        let container = container.to_owned();
        self.done(Request::Signal { container, signal }, ANSWER_LIMIT)
            .await
    }

    /// SIGTERM to each container, the last one first; SIGKILL after `grace`; returns when all are gone.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn stop_pod(&self, grace: Duration) -> Result<(), AgentError> {
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        let limit = grace.saturating_add(ANSWER_LIMIT);
        self.done(Request::StopPod { grace_ms }, limit).await
    }

    /// Sets the guest's wall clock, as after a move.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn set_clock(&self, now: SystemTime) -> Result<(), AgentError> {
        let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let unix_ns = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
        self.done(Request::SetClock { unix_ns }, ANSWER_LIMIT).await
    }

    /// Uptime, memory, load, and each container's use.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn stats(&self) -> Result<Stats, AgentError> {
        match self.ask(Request::Stats, ANSWER_LIMIT).await? {
            Reply::Stats(stats) => Ok(stats),
            Reply::Done | Reply::ExecStarted | Reply::Status(_) | Reply::Conditions(_) => {
                Err(AgentError::Confused)
            }
        }
    }

    /// Which containers run, and how the others ended: what a restarted service asks first.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn status(&self) -> Result<Status, AgentError> {
        match self.ask(Request::Status, ANSWER_LIMIT).await? {
            Reply::Status(status) => Ok(status),
            Reply::Done | Reply::ExecStarted | Reply::Stats(_) | Reply::Conditions(_) => {
                Err(AgentError::Confused)
            }
        }
    }

    /// How each container fares; nothing from a guest of an earlier build, which does not tell.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn conditions(&self) -> Result<Vec<Condition>, AgentError> {
        match self.ask(Request::Conditions, ANSWER_LIMIT).await? {
            Reply::Conditions(conditions) => Ok(conditions),
            Reply::Done | Reply::ExecStarted | Reply::Stats(_) | Reply::Status(_) => {
                Err(AgentError::Confused)
            }
        }
    }

    /// Powers the guest off at once. The VM's end is the answer.
    ///
    /// # Errors
    /// [`AgentError::Gone`] or [`AgentError::Detached`] when it cannot be asked.
    pub fn power_off(&self) -> Result<(), AgentError> {
        let (reply, _) = oneshot::channel();
        let request = Request::PowerOff;
        self.send(Command::Request { request, reply })
    }

    /// Everything that happens in the guest from now on, except output. Ends with the connection.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Before a freeze: refuses new requests, and waits until the guest has acknowledged the old ones.
    /// Output goes on to be read. False if `limit` was over first: then [`Self::state`] carries what is left.
    pub async fn detach(&self, limit: Duration) -> bool {
        let (reply, settled) = oneshot::channel();
        if self.send(Command::Detach { reply }).is_err() {
            return false;
        }
        tokio::time::timeout(limit, settled)
            .await
            .is_ok_and(|r| r.is_ok())
    }

    /// Before the VM stops: what has to move with it. From here nothing is read or written and the sink is not called, until
    /// [`Self::reattach`]. Returns when the VMM has taken what was written before, which it would else put into the memory of a guest that
    /// stands still; or after 50 ms: see [`Self::unread`].
    ///
    /// # Errors
    /// [`AgentError::Gone`].
    pub async fn state(&self) -> Result<AgentState, AgentError> {
        let (reply, state) = oneshot::channel();
        self.send(Command::State { reply })?;
        state.await.map_err(|_| AgentError::Gone)
    }

    /// Bytes that were written and that the VMM has not read yet; it may, as long as the guest has room for them.
    ///
    /// # Errors
    /// [`AgentError::Gone`].
    pub async fn unread(&self) -> Result<u32, AgentError> {
        let (reply, unread) = oneshot::channel();
        self.send(Command::Unread { reply })?;
        unread.await.map_err(|_| AgentError::Gone)
    }

    /// After a migration that was called off: goes on as if it had not begun.
    ///
    /// # Errors
    /// [`AgentError::Gone`].
    pub fn reattach(&self) -> Result<(), AgentError> {
        self.send(Command::Reattach {
            reconnect: false,
            socket: None,
        })
    }

    /// The guest runs under another VMM on this node, which serves its port at `socket`: goes on there. Commands in
    /// the guest keep their clients.
    ///
    /// # Errors
    /// [`AgentError::Gone`].
    pub fn reattach_at(&self, socket: PathBuf) -> Result<(), AgentError> {
        self.send(Command::Reattach {
            reconnect: true,
            socket: Some(socket),
        })
    }

    /// Drops the connection and makes a new one. Nothing is lost; for tests, and for a link that hangs.
    ///
    /// # Errors
    /// [`AgentError::Gone`].
    pub fn reconnect(&self) -> Result<(), AgentError> {
        self.send(Command::Reattach {
            reconnect: true,
            socket: None,
        })
    }

    /// Ends the connection for all handles: requests and execs that wait get [`AgentError::Gone`]. For a
    /// source whose pod has moved away.
    pub fn close(&self) {
        // If the task has ended already, so much the better.
        self.send(Command::Close).ok();
    }

    async fn done(&self, request: Request, limit: Duration) -> Result<(), AgentError> {
        match self.ask(request, limit).await? {
            Reply::Done => Ok(()),
            Reply::ExecStarted | Reply::Stats(_) | Reply::Status(_) | Reply::Conditions(_) => {
                Err(AgentError::Confused)
            }
        }
    }

    async fn ask(&self, request: Request, limit: Duration) -> Result<Reply, AgentError> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Request { request, reply })?;
        wait(answer, limit).await.map(|(_, reply)| reply)
    }

    fn send(&self, command: Command) -> Result<(), AgentError> {
        self.commands.send(command).map_err(|_| AgentError::Gone)
    }
}

async fn wait<T>(
    answer: oneshot::Receiver<Result<T, AgentError>>,
    limit: Duration,
) -> Result<T, AgentError> {
    match tokio::time::timeout(limit, answer).await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => Err(AgentError::Gone),
        Err(_) => Err(AgentError::NoAnswer(limit)),
    }
}
