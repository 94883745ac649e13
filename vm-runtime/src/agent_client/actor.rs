//! The task that owns the connection, the link and everything that waits for an answer.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use guest_agent::protocol::CONDITIONS;
use guest_agent::protocol::frame::Decoder;
use guest_agent::protocol::link::HostLink;
use guest_agent::protocol::message::{
    Event, ExecId, ExecSpec, HostMessage, Reply, Request, RequestId, Stream,
};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until};

use super::exec::Ends;
use super::unread::unread;
use super::{AgentError, AgentState, ConnectError, OutputSink};

/// How often an Attach is repeated until the guest answers: it may not have opened its port yet.
const ATTACH_EVERY: Duration = Duration::from_millis(250);

/// How often a socket that does not accept is tried.
const CONNECT_EVERY: Duration = Duration::from_millis(20);

/// A lost connection that cannot be made again for so long means that the VM is gone.
const GIVE_UP: Duration = Duration::from_secs(5);

/// How long the VMM gets to read what was written before a freeze, and how often it is looked whether it has.
const TAKEN_WITHIN: Duration = Duration::from_millis(50);
const LOOK_AGAIN: Duration = Duration::from_micros(500);

/// Frames are taken from the link only while fewer bytes than this wait for the socket.
const LOW_WATER: usize = 64 << 10;

/// An answer, with the id that the request was given.
pub(super) type Answer = oneshot::Sender<Result<(RequestId, Reply), AgentError>>;

/// What handles ask of the task.
#[derive(Debug)]
pub(super) enum Command {
    Request {
        request: Request,
        reply: Answer,
    },
    Exec {
        spec: ExecSpec,
        ends: Ends,
        reply: Answer,
    },
    Tell(HostMessage),
    Close,
    Detach {
        reply: oneshot::Sender<()>,
    },
    State {
        reply: oneshot::Sender<AgentState>,
    },
    Unread {
        reply: oneshot::Sender<u32>,
    },
    Reattach {
        reconnect: bool,
        /// Where to connect from now on, if not where until now.
        socket: Option<PathBuf>,
    },
}

/// How far the client has gone on the way to a freeze.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Everything flows.
    Open,
    /// No new requests.
    Detached,
    /// Nothing is read or written.
    Frozen,
}

pub(super) struct Actor {
    socket: PathBuf,
    pub(super) sink: Arc<dyn OutputSink>,
    inbox: mpsc::UnboundedReceiver<Command>,
    pub(super) events: broadcast::Sender<Event>,
    pub(super) link: HostLink,
    decoder: Decoder,
    out: Vec<u8>,
    mode: Mode,
    nonce: u64,
    next_request: RequestId,
    pub(super) waiting: HashMap<RequestId, Answer>,
    pub(super) execs: HashMap<ExecId, Ends>,
    pub(super) offsets: BTreeMap<(String, Stream), u64>,
    settling: Vec<oneshot::Sender<()>>,
    pub(super) attached: Option<oneshot::Sender<Result<(), ConnectError>>>,
    stream: Option<UnixStream>,
    /// When to connect or attach again.
    retry: Instant,
    lost_since: Option<Instant>,
}

/// Random bytes from the kernel: a session must not be guessed from another, nor an id come twice.
pub(super) fn random<const N: usize>() -> [u8; N] {
    use std::io::Read;
    let mut bytes = [0; N];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes));
    if let Err(error) = read {
        tracing::error!(%error, "/dev/urandom cannot be read; the agent's session is not random");
    }
    bytes
}

impl Actor {
    pub(super) fn new(
        socket: &Path,
        sink: Arc<dyn OutputSink>,
        state: Option<AgentState>,
        inbox: mpsc::UnboundedReceiver<Command>,
        events: broadcast::Sender<Event>,
    ) -> Self {
        let (link, next_request, offsets) = match state {
            Some(state) => (
                HostLink::resume(state.link),
                state.next_request,
                state
                    .offsets
                    .into_iter()
                    .map(|(c, s, o)| ((c, s), o))
                    .collect(),
            ),
            // Ids of different sessions must not meet in the guest's memory of answers.
            None => (
                HostLink::fresh(random()),
                u64::from_le_bytes(random()) & !0xff_ffff,
                BTreeMap::new(),
            ),
        };
        Self {
            socket: socket.to_owned(),
            sink,
            inbox,
            events,
            link,
            decoder: Decoder::new(),
            out: Vec::new(),
            mode: Mode::Open,
            nonce: u64::from_le_bytes(random()),
            next_request,
            waiting: HashMap::new(),
            execs: HashMap::new(),
            offsets,
            settling: Vec::new(),
            attached: None,
            stream: None,
            retry: Instant::now(),
            lost_since: None,
        }
    }

    /// Runs until the last handle is gone, or the VM. `attached` learns of the first answer.
    pub(super) async fn run(mut self, attached: oneshot::Sender<Result<(), ConnectError>>) {
        self.attached = Some(attached);
        loop {
            self.fill();
            let open = self.mode != Mode::Frozen;
            let interest = match self.out.is_empty() {
                true => Interest::READABLE,
                false => Interest::READABLE | Interest::WRITABLE,
            };
            let stream = self.stream.as_ref().filter(|_| open);
            let ready = async {
                match stream {
                    Some(stream) => stream.ready(interest).await.map(drop),
                    None => std::future::pending().await,
                }
            };
            let impatient = open && !self.link.attached();
            tokio::select! {
                command = self.inbox.recv() => match command {
                    Some(command) => self.obey(command).await,
                    None => return,
                },
                result = ready => {
                    if let Err(error) = result.and_then(|()| self.transfer()) {
                        self.lose(&error);
                    }
                }
                () = sleep_until(self.retry), if impatient => {
                    if !self.try_again().await {
                        return;
                    }
                }
            }
        }
    }

    /// Takes from the link what may be written.
    fn fill(&mut self) {
        if self.stream.is_none() || self.mode == Mode::Frozen {
            return;
        }
        while self.out.len() < LOW_WATER && self.link.pull(&mut self.out) {}
        if self.mode == Mode::Detached && self.link.settled() {
            for reply in self.settling.drain(..) {
                // Whoever waited may have given up.
                reply.send(()).ok();
            }
        }
    }

    /// Moves what the socket takes and gives.
    fn transfer(&mut self) -> io::Result<()> {
        let Some(stream) = &self.stream else {
            return Ok(());
        };
        while !self.out.is_empty() {
            match stream.try_write(&self.out) {
                Ok(n) => drop(self.out.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            }
        }
        let mut buffer = vec![0; 64 << 10];
        let length = match stream.try_read(&mut buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(e) => return Err(e),
        };
        let mut frames = Vec::new();
        self.decoder.push(&buffer[..length], |f| frames.push(f));
        for frame in frames {
            self.hear(frame);
        }
        Ok(())
    }

    /// Connects if there is no connection, attaches if the guest has not answered. False to give up.
    async fn try_again(&mut self) -> bool {
        if self.stream.is_some() {
            self.link.attach(self.nonce);
            self.retry = Instant::now() + ATTACH_EVERY;
            return true;
        }
        match UnixStream::connect(&self.socket).await {
            Ok(stream) => {
                self.stream = Some(stream);
                self.lost_since = None;
                self.begin();
            }
            Err(source) => {
                let known = self.attached.is_none();
                let since = *self.lost_since.get_or_insert_with(Instant::now);
                if known && since.elapsed() > GIVE_UP {
                    tracing::info!(socket = %self.socket.display(), "the agent's socket is gone");
                    return false;
                }
                tracing::trace!(error = %source, "the agent's socket does not accept yet");
                self.retry = Instant::now() + CONNECT_EVERY;
            }
        }
        true
    }

    /// Begins on this connection: what was cut belongs to the past.
    pub(super) fn begin(&mut self) {
        self.nonce = self.nonce.wrapping_add(1);
        self.decoder = Decoder::new();
        self.out.clear();
        self.link.attach(self.nonce);
        self.retry = Instant::now() + ATTACH_EVERY;
    }

    fn lose(&mut self, error: &io::Error) {
        tracing::debug!(%error, "the connection to the guest's agent broke");
        self.stream = None;
        self.begin();
        self.retry = Instant::now();
    }

    async fn obey(&mut self, command: Command) {
        match command {
            Command::Request { request, reply } => {
                self.request(request, reply);
            }
            Command::Exec { spec, ends, reply } => {
                if let Some(id) = self.request(Request::Exec(spec), reply) {
                    self.execs.insert(id, ends);
                }
            }
            Command::Tell(message) => {
                if let HostMessage::OutputCredit { exec, bytes } = &message
                    && let Some(ends) = self.execs.get_mut(exec)
                {
                    ends.owed = ends.owed.saturating_sub(u64::from(*bytes));
                }
                // While detached as well: a credit that is lost would stop an exec after a rollback.
                self.tell(&message);
            }
            Command::Close => self.inbox.close(),
            Command::Detach { reply } => {
                if self.mode == Mode::Open {
                    self.mode = Mode::Detached;
                }
                self.settling.push(reply);
            }
            Command::State { reply } => {
                self.mode = Mode::Frozen;
                self.taken().await;
                let offsets = self.offsets.iter();
                let state = AgentState {
                    link: self.link.state(),
                    next_request: self.next_request,
                    offsets: offsets.map(|((c, s), o)| (c.clone(), *s, *o)).collect(),
                };
                reply.send(state).ok();
            }
            Command::Unread { reply } => {
                let unread = self.stream.as_ref().map(unread);
                // What is not known is not waited for.
                reply.send(unread.and_then(Result::ok).unwrap_or(0)).ok();
            }
            Command::Reattach { reconnect, socket } => {
                self.mode = Mode::Open;
                if let Some(socket) = socket {
                    self.socket = socket;
                }
                self.settling.clear();
                if reconnect {
                    self.stream = None;
                }
                self.begin();
                self.retry = Instant::now();
            }
        }
    }

    /// Waits a while until the VMM has read what was written. It takes what the guest has room for.
    async fn taken(&self) {
        let until = Instant::now() + TAKEN_WITHIN;
        while let Some(stream) = &self.stream
            && Instant::now() < until
        {
            match unread(stream) {
                Ok(0) => return,
                Ok(_) => sleep(LOOK_AGAIN).await,
                Err(error) => return tracing::debug!(%error, "what the VMM has read is not known"),
            }
        }
    }

    fn request(&mut self, request: Request, reply: Answer) -> Option<RequestId> {
        if self.mode != Mode::Open {
            reply.send(Err(AgentError::Detached)).ok();
            return None;
        }
        if matches!(request, Request::Conditions) && self.link.version() < CONDITIONS {
            // A guest of an earlier build: what it does not know it would not answer.
            reply.send(Ok((0, Reply::Conditions(Vec::new())))).ok();
            return None;
        }
        let id = self.next_request;
        self.next_request = self.next_request.wrapping_add(1);
        if let Err(error) = self.push(&HostMessage::Request { id, request }) {
            reply.send(Err(error)).ok();
            return None;
        }
        self.waiting.insert(id, reply);
        Some(id)
    }

    pub(super) fn tell(&mut self, message: &HostMessage) {
        if let Err(error) = self.push(message) {
            tracing::warn!(%error, "a message to the guest was dropped");
        }
    }

    fn push(&mut self, message: &HostMessage) -> Result<(), AgentError> {
        // Messages are plain data: only the allocator could refuse to encode one.
        let bytes = postcard::to_allocvec(message).map_err(|_| AgentError::Confused)?;
        let sent = self.link.send(bytes);
        sent.map(drop).map_err(|e| AgentError::TooLong(e.0))
    }
}
