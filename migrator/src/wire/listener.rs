//! Accepts connections and hands out complete sessions. Peers are hostile until proven otherwise: handshakes, waiting sessions
//! and the time for either are bounded.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_rustls::server::TlsStream;
use tracing::{debug, warn};

use crate::wire::conn::{Connection, Stream};
use crate::wire::id::SessionId;
use crate::wire::preamble::{
    FAULT_CONNECTIONS, MAX_DATA_CONNECTIONS, PREAMBLE_LEN, Preamble, Reply, Role, Shape, Turned,
};
use crate::wire::session::{Session, tune};
use crate::wire::tls::{TlsConfig, explain, name_of};

/// How much a listener puts up with.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections whose TLS handshake or preamble is under way; more are closed at once.
    pub handshakes: usize,
    /// Time for TLS and the preamble of one connection.
    pub handshake_deadline: Duration,
    /// Incomplete sessions of one peer; more are turned away.
    pub pending_per_peer: usize,
    /// Time from a session's first connection to its last.
    pub session_deadline: Duration,
    /// Complete sessions that nobody has taken yet; more are dropped.
    pub backlog: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // Two peers that dial the widest session at the same time: its data connections come all at once.
            handshakes: 2 * (2 + MAX_DATA_CONNECTIONS as usize + FAULT_CONNECTIONS as usize),
            handshake_deadline: Duration::from_secs(5),
            pending_per_peer: 8,
            session_deadline: Duration::from_secs(10),
            backlog: 16,
        }
    }
}

/// Hands out the sessions that peers dial. Dropping it closes the socket and forgets what is incomplete.
#[derive(Debug)]
pub struct Listener {
    addr: SocketAddr,
    sessions: mpsc::Receiver<Session>,
    accepting: JoinHandle<()>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Listener {
    /// Listens at `addr` for the nodes named in `peers`.
    ///
    /// # Errors
    ///
    /// When the address cannot be bound.
    pub async fn bind(
        addr: SocketAddr,
        tls: TlsConfig,
        peers: Vec<String>,
        limits: Limits,
    ) -> io::Result<Self> {
        let socket = TcpListener::bind(addr).await?;
        let addr = socket.local_addr()?;
        let (complete, sessions) = mpsc::channel(limits.backlog);
        let shared = Arc::new(Shared {
            tls,
            peers,
            limits,
            pending: Mutex::default(),
            complete,
        });
        Ok(Self {
            addr,
            sessions,
            accepting: tokio::spawn(accept_all(socket, shared)),
        })
    }

    /// Where it listens; tells the port when 0 was asked for.
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// The next complete session. Cancel safe.
    pub async fn accept(&mut self) -> Session {
        match self.sessions.recv().await {
            Some(session) => session,
            // The accepting task holds a sender until it is aborted by our drop.
            None => std::future::pending().await,
        }
    }
}

type Key = (String, SessionId);

struct Shared {
    tls: TlsConfig,
    peers: Vec<String>,
    limits: Limits,
    pending: Mutex<HashMap<Key, Pending>>,
    complete: mpsc::Sender<Session>,
}

struct Pending {
    shape: Shape,
    version: u16,
    control: Option<Stream>,
    data: Vec<Option<Stream>>,
    urgent: Option<Stream>,
    faults: Vec<Option<Stream>>,
}

/// What to do with a connection whose preamble has been read.
enum Place {
    Waiting { first: bool },
    Complete(Box<Session>),
}

impl Shared {
    fn pending(&self) -> MutexGuard<'_, HashMap<Key, Pending>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this connection would find its place; asked before the welcome is sent.
    fn admits(&self, key: &Key, preamble: &Preamble) -> Result<u16, Turned> {
        let version = preamble.common_version().ok_or(Turned::Version)?;
        let pending = self.pending();
        let Some(session) = pending.get(key) else {
            let of_peer = pending.keys().filter(|(peer, _)| *peer == key.0).count();
            return match of_peer < self.limits.pending_per_peer {
                true => Ok(version),
                false => Err(Turned::Busy),
            };
        };
        let free = match preamble.role {
            Role::Control => session.control.is_none(),
            Role::Data(index) => matches!(session.data.get(usize::from(index)), Some(None)),
            Role::Urgent => session.urgent.is_none(),
            Role::Fault(index) => matches!(session.faults.get(usize::from(index)), Some(None)),
        };
        match session.shape == preamble.shape && session.version == version && free {
            true => Ok(version),
            false => Err(Turned::Malformed),
        }
    }

    fn place(&self, key: &Key, preamble: &Preamble, version: u16, stream: Stream) -> Place {
        let mut pending = self.pending();
        let first = !pending.contains_key(key);
        let session = pending.entry(key.clone()).or_insert_with(|| Pending {
            shape: preamble.shape,
            version,
            control: None,
            data: (0..preamble.shape.data()).map(|_| None).collect(),
            urgent: None,
            faults: (0..preamble.shape.faults()).map(|_| None).collect(),
        });
        match preamble.role {
            Role::Control => session.control = Some(stream),
            Role::Data(index) => {
                if let Some(slot) = session.data.get_mut(usize::from(index)) {
                    *slot = Some(stream);
                }
            }
            Role::Urgent => session.urgent = Some(stream),
            Role::Fault(index) => {
                if let Some(slot) = session.faults.get_mut(usize::from(index)) {
                    *slot = Some(stream);
                }
            }
        }
        let complete = session.control.is_some()
            && session.data.iter().all(Option::is_some)
            && session.faults.iter().all(Option::is_some)
            && session.urgent.is_some() == session.shape.urgent();
        match complete.then(|| pending.remove(key)).flatten() {
            Some(Pending {
                shape,
                version,
                control: Some(control),
                data,
                urgent,
                faults,
            }) => Place::Complete(Box::new(Session {
                id: key.1,
                shape,
                peer: key.0.clone(),
                version,
                control: Connection::new(control),
                data: data.into_iter().flatten().map(Connection::new).collect(),
                urgent: urgent.map(Connection::new),
                faults: faults.into_iter().flatten().map(Connection::new).collect(),
            })),
            _ => Place::Waiting { first },
        }
    }
}

async fn accept_all(socket: TcpListener, shared: Arc<Shared>) {
    let handshakes = Arc::new(Semaphore::new(shared.limits.handshakes));
    loop {
        let (tcp, from) = match socket.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, usually: others must end before one can be had.
                warn!(%error, "cannot accept a connection");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&handshakes).try_acquire_owned() else {
            warn!(%from, "too many handshakes under way, connection closed");
            continue;
        };
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let deadline = shared.limits.handshake_deadline;
            match timeout(deadline, greet(tcp, from, &shared)).await {
                Ok(Some((key, place))) => {
                    drop(permit);
                    settle(shared, key, place).await;
                }
                Ok(None) => {}
                Err(_) => warn!(%from, "the handshake took too long, connection closed"),
            }
        });
    }
}

/// TLS, name, preamble, reply. `None`: turned away, and the log says why.
async fn greet(tcp: TcpStream, from: SocketAddr, shared: &Shared) -> Option<(Key, Place)> {
    let mut stream = match shared.tls.acceptor.accept(tcp).into_fallible().await {
        Ok(stream) => stream,
        Err((error, tcp)) => {
            let why = explain(&error, &format!("the node at {from}"));
            warn!(%from, "connection refused: {}", why.unwrap_or_else(|| error.to_string()));
            linger(tcp).await;
            return None;
        }
    };
    let mut bytes = [0; PREAMBLE_LEN];
    if let Err(error) = stream.read_exact(&mut bytes).await {
        warn!(%from, "connection ended before its preamble: {error}");
        return None;
    }
    let peer = peer_name(&stream, shared);
    let verdict = match (peer, Preamble::decode(&bytes)) {
        (None, _) => Err(Turned::NotAPeer),
        (_, Err(_)) => Err(Turned::Malformed),
        (Some(peer), Ok(preamble)) => {
            let key = (peer, preamble.session);
            shared
                .admits(&key, &preamble)
                .map(|version| (key, preamble, version))
        }
    };
    let reply = match &verdict {
        Ok((_, _, version)) => Reply::Welcome(*version),
        Err(why) => Reply::Turned(*why),
    };
    let answered = async {
        stream.write_all(&reply.encode()).await?;
        stream.flush().await
    };
    if let Err(error) = answered.await {
        warn!(%from, "connection ended before its reply: {error}");
        return None;
    }
    match verdict {
        Ok((key, preamble, version)) => {
            if let Err(error) = tune(stream.get_ref().0, preamble.role) {
                debug!(%from, "socket options not set: {error}");
            }
            let place = shared.place(&key, &preamble, version, Stream::Server(stream));
            Some((key, place))
        }
        Err(why) => {
            warn!(%from, "connection turned away: {why:?}");
            let _ = stream.shutdown().await;
            linger(stream.into_inner().0).await;
            None
        }
    }
}

fn peer_name(stream: &TlsStream<TcpStream>, shared: &Shared) -> Option<String> {
    let certificate = stream.get_ref().1.peer_certificates()?.first()?;
    name_of(certificate, &shared.peers)
}

/// Closing a socket with unread bytes resets the connection, and the reset may overtake our alert or refusal. So read until
/// the peer has closed; the handshake deadline bounds it.
async fn linger(mut tcp: TcpStream) {
    let _ = tcp.shutdown().await;
    let mut sink = [0; 1024];
    for _ in 0..64 {
        if !matches!(tcp.read(&mut sink).await, Ok(1..)) {
            break;
        }
    }
}

/// Hands a complete session on; gives an incomplete one its time.
async fn settle(shared: Arc<Shared>, key: Key, place: Place) {
    match place {
        Place::Complete(session) => {
            if shared.complete.try_send(*session).is_err() {
                warn!(
                    peer = key.0,
                    "too many sessions wait to be taken, one was dropped"
                );
            }
        }
        Place::Waiting { first: true } => {
            sleep(shared.limits.session_deadline).await;
            if shared.pending().remove(&key).is_some() {
                warn!(peer = key.0, session = %key.1, "the session stayed incomplete and was dropped");
            }
        }
        Place::Waiting { first: false } => {}
    }
}
