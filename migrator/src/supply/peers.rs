//! Chunks from another node.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

use super::source::{ChunkSource, SourceError, Wanted};
use crate::api::error::chain;
use crate::image::Digest;
use crate::wire::bulk::Data;
use crate::wire::control;
use crate::wire::message::ChunksWanted;
use crate::wire::preamble::{Shape, VERSION_CHUNKS};
use crate::wire::session::{self, Session};
use crate::wire::tls::TlsConfig;

/// For TCP, TLS and the preambles.
const DIAL_DEADLINE: Duration = Duration::from_secs(5);
/// A session over which nothing has been asked for this long is closed.
const IDLE: Duration = Duration::from_secs(30);
/// Requests that wait for the session.
const QUEUE: usize = 256;

type Answer = Result<Option<Bytes>, SourceError>;

/// A peer's chunks, over one session that is dialed when something is wanted.
#[derive(Debug)]
pub struct PeerSource {
    name: String,
    requests: mpsc::Sender<Request>,
}

#[derive(Debug)]
struct Request {
    digest: Digest,
    answer: oneshot::Sender<Answer>,
}

impl PeerSource {
    /// For the node named `peer`. Its task ends when this is dropped.
    pub fn start(peer: &str, addr: SocketAddr, tls: TlsConfig) -> Self {
        let (requests, queue) = mpsc::channel(QUEUE);
        tokio::spawn(work(peer.to_owned(), addr, tls, queue));
        Self {
            name: format!("peer {peer}"),
            requests,
        }
    }
}

impl ChunkSource for PeerSource {
    fn address<'a>(&'a self, _wanted: &'a Wanted) -> BoxFuture<'a, String> {
        std::future::ready(self.name.clone()).boxed()
    }

    fn fetch<'a>(&'a self, wanted: &'a Wanted, _urgent: bool) -> BoxFuture<'a, Answer> {
        async move {
            let gone = || SourceError("the service is ending".to_owned());
            let (answer, come) = oneshot::channel();
            let digest = wanted.digest();
            let request = Request { digest, answer };
            self.requests.send(request).await.map_err(|_| gone())?;
            come.await.map_err(|_| gone())?
        }
        .boxed()
    }
}

async fn work(peer: String, addr: SocketAddr, tls: TlsConfig, mut queue: mpsc::Receiver<Request>) {
    while let Some(first) = queue.recv().await {
        let dialed = session::dial_shape(addr, &tls, &peer, Shape::Chunks, DIAL_DEADLINE).await;
        let reason = match dialed {
            Ok(session) if session.version < VERSION_CHUNKS => {
                let version = session.version;
                Err((
                    format!(
                        "speaks version {version} of the protocol, which has no chunks: upgrade it"
                    ),
                    vec![first],
                ))
            }
            Ok(session) => ask(session, first, &mut queue).await,
            Err(error) => Err((chain(&error), vec![first])),
        };
        if let Err((reason, waiting)) = reason {
            let mut waiting = waiting;
            while let Ok(request) = queue.try_recv() {
                waiting.push(request);
            }
            for request in waiting {
                // It may have given up.
                let _ = request.answer.send(Err(SourceError(reason.clone())));
            }
        }
    }
}

/// Until the session is idle or lost; who is left without an answer then, and why.
async fn ask(
    session: Session,
    first: Request,
    queue: &mut mpsc::Receiver<Request>,
) -> Result<(), (String, Vec<Request>)> {
    let (sender, mut receiver) = control::start(session.control);
    let Some(data) = session.data.into_iter().next() else {
        return Err(("has no data connection".to_owned(), vec![first]));
    };
    let (mut reader, _writer) = data.split();
    let mut pending: HashMap<Digest, Vec<Request>> = HashMap::new();
    let mut next = Some(first);
    let reason = loop {
        let mut digests = Vec::new();
        while let Some(request) = next.take() {
            let waiting = pending.entry(request.digest).or_default();
            if waiting.is_empty() {
                digests.push(request.digest.0);
            }
            waiting.push(request);
            if digests.len() < ChunksWanted::MAX {
                next = queue.try_recv().ok();
            }
        }
        if !digests.is_empty() && sender.send(ChunksWanted { digests }).await.is_err() {
            // The receiver has the cause.
            break receiver
                .recv()
                .await
                .err()
                .map_or_else(|| "the link is lost".to_owned(), |error| chain(&error));
        }
        let idle = Instant::now() + IDLE;
        tokio::select! {
            request = queue.recv() => match request {
                Some(request) => next = Some(request),
                None => return Ok(()),
            },
            came = reader.next() => {
                let (digest, answer) = match came {
                    // The frame is a piece of a larger buffer.
                    Ok(Data::Chunk { digest, raw }) => (Digest(digest), Some(Bytes::copy_from_slice(&raw))),
                    Ok(Data::Absent { digest }) => (Digest(digest), None),
                    Ok(_) => break "sent what was not asked for".to_owned(),
                    Err(error) => break chain(&error),
                };
                let Some(waiting) = pending.remove(&digest) else {
                    break "sent a chunk that was not asked for".to_owned();
                };
                for request in waiting {
                    let _ = request.answer.send(Ok(answer.clone()));
                }
            }
            message = receiver.recv() => break match message {
                Ok(message) => format!("said {} on a session for chunks", message.name()),
                Err(error) => chain(&error),
            },
            () = sleep_until(idle), if pending.is_empty() => return Ok(()),
        }
    };
    Err((reason, pending.into_values().flatten().collect()))
}
