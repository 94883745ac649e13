//! A session: the connections of one migration, grouped by the id in their preambles. This file dials; [`Listener`] accepts.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures::future::try_join_all;
use nix::sys::socket::{setsockopt, sockopt};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use crate::wire::bulk::{Data, Urgent};
use crate::wire::codec::Message;
use crate::wire::conn::{Connection, SILENCE, STALL, Stream};
use crate::wire::fault::Fault;
use crate::wire::id::SessionId;
pub use crate::wire::listener::{Limits, Listener};
use crate::wire::message::Control;
use crate::wire::preamble::{
    MAX_DATA_CONNECTIONS, Preamble, PreambleError, REPLY_LEN, Reply, Role, Shape, Turned,
    VERSION_MAX, VERSION_MIN,
};
use crate::wire::tls::{TlsConfig, dns_name, explain};

/// All connections of one session, their preambles exchanged.
#[derive(Debug)]
pub struct Session {
    /// The session's id.
    pub id: SessionId,
    /// What it is for.
    pub shape: Shape,
    /// Name of the node at the other end, as its certificate has it.
    pub peer: String,
    /// The protocol version to speak.
    pub version: u16,
    /// The control connection; [`crate::wire::control::start`] makes a queue of it.
    pub control: Connection<Control>,
    /// The data connections, by index; as many as [`Shape::data`].
    pub data: Vec<Connection<Data>>,
    /// The urgent connection, if the shape has one.
    pub urgent: Option<Connection<Urgent>>,
    /// The fault connections, by index; as many as [`Shape::faults`].
    pub faults: Vec<Connection<Fault>>,
}

/// Why no session came about. Nothing is left open.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// No TCP connection.
    #[error(
        "{peer} does not answer at {addr}: is `migrator node` running there, and the address right?"
    )]
    Connect {
        /// The node.
        peer: String,
        /// Its address.
        addr: SocketAddr,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// TLS failed, and why is known.
    #[error("{explanation}")]
    Tls {
        /// What it means and what to do.
        explanation: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The connection broke before the session stood.
    #[error("the connection to {peer} at {addr} broke during the handshake")]
    Broken {
        /// The node.
        peer: String,
        /// Its address.
        addr: SocketAddr,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Something else than a node answered.
    #[error("{peer} at {addr} answers, but not as a migrator node")]
    Preamble {
        /// The node.
        peer: String,
        /// Its address.
        addr: SocketAddr,
        /// The cause.
        #[source]
        source: PreambleError,
    },
    /// The node turned the connection away.
    #[error("{peer} turned this node away: {}", match .why {
        Turned::Version => "no protocol version in common (upgrade the older node)",
        Turned::NotAPeer => "the name in this node's certificate is not among its peers (add this node to `peers` there)",
        Turned::Busy => "too many sessions are under way (try again)",
        Turned::Malformed => "it could not read this node's preamble (upgrade the older node)",
    })]
    Turned {
        /// The node.
        peer: String,
        /// Why.
        why: Turned,
    },
    /// Too slow.
    #[error("{peer} at {addr} did not complete the handshake within {} ms", limit.as_millis())]
    Deadline {
        /// The node.
        peer: String,
        /// Its address.
        addr: SocketAddr,
        /// The time it had.
        limit: Duration,
    },
    /// The node's name cannot be part of a DNS name.
    #[error("`{0}` cannot be a node's name: use letters, digits and hyphens")]
    Name(String),
    /// The number of data connections is out of range.
    #[error("{0} data connections: use 1 to {MAX_DATA_CONNECTIONS}")]
    DataConnections(usize),
}

/// Dials the session of a migration: control, `data_connections` of data, urgent, faults.
///
/// # Errors
///
/// See [`DialError`].
pub async fn dial(
    addr: SocketAddr,
    tls: &TlsConfig,
    peer: &str,
    data_connections: usize,
    deadline: Duration,
) -> Result<Session, DialError> {
    let data = u8::try_from(data_connections)
        .ok()
        .filter(|n| (1..=MAX_DATA_CONNECTIONS).contains(n))
        .ok_or(DialError::DataConnections(data_connections))?;
    dial_shape(addr, tls, peer, Shape::Migration { data }, deadline).await
}

/// Dials a session of any shape: [`Shape::Resume`] or [`Shape::Query`] after a lost link.
///
/// # Errors
///
/// See [`DialError`].
pub async fn dial_shape(
    addr: SocketAddr,
    tls: &TlsConfig,
    peer: &str,
    shape: Shape,
    deadline: Duration,
) -> Result<Session, DialError> {
    let dialer = Dialer {
        addr,
        tls,
        peer,
        shape,
        session: SessionId::random(),
    };
    timeout_at(Instant::now() + deadline, dialer.session())
        .await
        .unwrap_or_else(|_| {
            Err(DialError::Deadline {
                peer: peer.to_owned(),
                addr,
                limit: deadline,
            })
        })
}

struct Dialer<'a> {
    addr: SocketAddr,
    tls: &'a TlsConfig,
    peer: &'a str,
    shape: Shape,
    session: SessionId,
}

impl Dialer<'_> {
    async fn session(&self) -> Result<Session, DialError> {
        // Control first and alone: what is wrong with the pair of nodes shows here, once.
        let (control, version) = self.connection::<Control>(Role::Control).await?;
        let data = (0..self.shape.data()).map(|i| self.connection::<Data>(Role::Data(i)));
        let urgent = self
            .shape
            .urgent()
            .then(|| self.connection::<Urgent>(Role::Urgent));
        let faults = (0..self.shape.faults()).map(|i| self.connection::<Fault>(Role::Fault(i)));
        let (data, urgent, faults) = futures::try_join!(
            try_join_all(data),
            try_join_all(urgent),
            try_join_all(faults)
        )?;
        Ok(Session {
            id: self.session,
            shape: self.shape,
            peer: self.peer.to_owned(),
            version,
            control,
            data: data.into_iter().map(|(c, _)| c).collect(),
            urgent: urgent.into_iter().map(|(c, _)| c).next(),
            faults: faults.into_iter().map(|(c, _)| c).collect(),
        })
    }

    async fn connection<M: Message>(&self, role: Role) -> Result<(Connection<M>, u16), DialError> {
        let (peer, addr) = (self.peer, self.addr);
        let name =
            ServerName::try_from(dns_name(peer)).map_err(|_| DialError::Name(peer.to_owned()))?;
        let connect = |source| DialError::Connect {
            peer: peer.to_owned(),
            addr,
            source,
        };
        let tcp = TcpStream::connect(addr).await.map_err(connect)?;
        tune(&tcp, role).map_err(connect)?;
        let mut stream = self
            .tls
            .connector
            .connect(name, tcp)
            .await
            .map_err(|e| self.failed(e))?;
        let preamble = Preamble {
            version_min: VERSION_MIN,
            version_max: VERSION_MAX,
            role,
            shape: self.shape,
            session: self.session,
        };
        // In TLS 1.3 the client is done before the server has looked at its certificate: a rejection
        // comes as an alert in the place of the reply.
        let mut reply = [0; REPLY_LEN];
        let exchange = async {
            stream.write_all(&preamble.encode()).await?;
            stream.flush().await?;
            stream.read_exact(&mut reply).await
        };
        exchange.await.map_err(|e| self.failed(e))?;
        match Reply::decode(&reply) {
            Ok(Reply::Welcome(version)) if (VERSION_MIN..=VERSION_MAX).contains(&version) => {
                Ok((Connection::new(Stream::Client(stream)), version))
            }
            Ok(Reply::Welcome(_)) => Err(DialError::Turned {
                peer: peer.to_owned(),
                why: Turned::Version,
            }),
            Ok(Reply::Turned(why)) => Err(DialError::Turned {
                peer: peer.to_owned(),
                why,
            }),
            Err(source) => Err(DialError::Preamble {
                peer: peer.to_owned(),
                addr,
                source,
            }),
        }
    }

    fn failed(&self, source: io::Error) -> DialError {
        match explain(&source, self.peer) {
            Some(explanation) => DialError::Tls {
                explanation,
                source,
            },
            None => DialError::Broken {
                peer: self.peer.to_owned(),
                addr: self.addr,
                source,
            },
        }
    }
}

/// Socket options of every connection. The buffers are left to the kernel, which grows them with the path's
/// bandwidth and delay (tcp(7): `tcp_rmem`, `tcp_wmem`); a fixed size would switch that off.
pub(crate) fn tune(tcp: &TcpStream, role: Role) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    let limit = match role {
        Role::Control => SILENCE,
        Role::Data(_) | Role::Urgent | Role::Fault(_) => STALL,
    };
    setsockopt(tcp, sockopt::TcpUserTimeout, &(limit.as_millis() as u32))?;
    Ok(())
}
