//! Chunks of one image that are in registries: asked for by ranges, several at a time, and verified.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use reqwest::header::{CONTENT_RANGE, RANGE};
use reqwest::{Method, Response, StatusCode};
use tokio::sync::Semaphore;

use super::index::ChunkIndex;
use super::queue::{Answer, Queue};
use super::ranges::{Range, Wanted};
use crate::api::error::chain;
use crate::image::manifest::Blob;
use crate::image::{Digest, ImageRecord};
use crate::registry::failure::RequestError;
use crate::registry::fetch::content_range;
use crate::registry::retry::Retries;
use crate::registry::session::Session;

/// Requests at a time for one image.
const REQUESTS: usize = 6;
/// How many of them may be for what nobody waits for: one that somebody waits for finds a place at once.
const BACKGROUND: usize = 4;

/// Times that one host may give wrong bytes for the same range: once may be the way, twice is the host.
const LIES: u32 = 2;

/// Why a chunk does not come.
#[derive(Debug, thiserror::Error)]
pub enum ChunkError {
    /// The registry.
    #[error("chunk {digest} does not come")]
    Request {
        /// The first chunk of the request.
        digest: Digest,
        /// Why.
        source: RequestError,
    },
    /// What came is not the chunk.
    #[error("chunk {digest} is damaged in the registry {host}: {what}")]
    Damaged {
        /// The chunk.
        digest: Digest,
        /// The registry.
        host: String,
        /// What is wrong with it.
        what: String,
    },
    /// Another chunk.
    #[error("the image's chunks in the registry do not have {0}")]
    Unknown(Digest),
    /// The service ends.
    #[error("chunk {0} was not waited for")]
    Ended(Digest),
}

/// The chunks of one image.
#[derive(Debug)]
pub struct RemoteChunks {
    artifact: Digest,
    index: ChunkIndex,
    /// One of the image's chunks for each stored one.
    by_digest: HashMap<Digest, u32>,
    packs: Vec<Blob>,
    /// Asked in this order.
    sessions: Vec<Arc<Session>>,
    requests: Semaphore,
    background: Semaphore,
    queue: Mutex<Queue>,
    transferred: AtomicU64,
}

/// A request that is under way: who still waits for something of it when it is dropped waits in vain.
struct Asking<'a> {
    chunks: &'a RemoteChunks,
    range: Range,
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        for chunk in &self.range.chunks {
            let digest = chunk.place.digest;
            self.chunks
                .answer(&digest, &Err(Arc::new(ChunkError::Ended(digest))));
        }
    }
}

impl RemoteChunks {
    pub(super) fn new(
        artifact: Digest,
        index: ChunkIndex,
        packs: Vec<Blob>,
        sessions: Vec<Arc<Session>>,
    ) -> Self {
        let chunks = (0u32..).zip(&index.record().chunks);
        let by_digest = chunks
            .filter(|(at, _)| index.place(*at).is_some())
            .map(|(at, digest)| (*digest, at))
            .collect();
        Self {
            artifact,
            index,
            by_digest,
            packs,
            sessions,
            requests: Semaphore::new(REQUESTS),
            background: Semaphore::new(BACKGROUND),
            queue: Mutex::default(),
            transferred: AtomicU64::new(0),
        }
    }

    /// The image.
    pub fn record(&self) -> &ImageRecord {
        self.index.record()
    }

    /// What is known of its chunks.
    pub fn index(&self) -> &ChunkIndex {
        &self.index
    }

    /// The manifest of the chunks.
    pub fn artifact(&self) -> Digest {
        self.artifact
    }

    /// The host that is asked first.
    pub fn host(&self) -> &str {
        self.sessions.first().map_or("", |session| session.host())
    }

    /// Bytes of packs that crossed the network.
    pub fn transferred(&self) -> u64 {
        self.transferred.load(Ordering::Relaxed)
    }

    /// Whether there is a stored chunk with these bytes. One of zeros is not stored.
    pub fn has(&self, digest: &Digest) -> bool {
        self.by_digest.contains_key(digest)
    }

    /// Chunks of the image whose bytes are all zero: each length once.
    pub fn zeros(&self) -> Vec<u32> {
        let record = self.record();
        let mut seen = std::collections::HashSet::new();
        let all = (0u32..).zip(&record.chunks);
        all.filter(|(index, digest)| self.index.place(*index).is_none() && seen.insert(**digest))
            .map(|(index, _)| index)
            .collect()
    }

    /// The bytes of a stored chunk, verified. Chunks that are asked for while all requests are under way, and that are neighbours, share
    /// the next one. An urgent one goes before those that are not.
    ///
    /// # Errors
    /// No host gives it, after several tries each.
    pub async fn chunk(self: &Arc<Self>, digest: &Digest, urgent: bool) -> Answer {
        let index = self.by_digest.get(digest).copied();
        let place = index.and_then(|index| self.index.place(index));
        let (Some(index), Some(place)) = (index, place) else {
            return Err(Arc::new(ChunkError::Unknown(*digest)));
        };
        let wanted = Wanted {
            index,
            place: *place,
        };
        let (answered, new) = self.queue().add(wanted, urgent);
        if new {
            // A task of its own: others may wait for what it asks for.
            drop(tokio::spawn(Arc::clone(self).serve(urgent)));
        }
        answered
            .await
            .unwrap_or_else(|_| Err(Arc::new(ChunkError::Ended(*digest))))
    }

    /// Somebody waits now for a chunk that was asked for.
    pub fn hurry(self: &Arc<Self>, digest: &Digest) {
        if self.queue().hurry(digest) {
            drop(tokio::spawn(Arc::clone(self).serve(true)));
        }
    }

    /// Makes one request. There is a call for everything that waits.
    async fn serve(self: Arc<Self>, urgent: bool) {
        // They are never closed.
        let _background = match urgent {
            true => None,
            false => self.background.acquire().await.ok(),
        };
        let Ok(_permit) = self.requests.acquire().await else {
            return;
        };
        // What is asked for in the same breath is in the queue then.
        tokio::task::yield_now().await;
        let Some(range) = self.queue().next() else {
            // Another call took it along.
            return;
        };
        let mut asking = Asking {
            chunks: &self,
            range,
        };
        if let Err(error) = self.range(&mut asking.range).await {
            let answer = Err(Arc::new(error));
            for chunk in std::mem::take(&mut asking.range.chunks) {
                self.answer(&chunk.place.digest, &answer);
            }
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        // Each change is one call: a panic leaves it whole.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(&self, digest: &Digest, answer: &Answer) {
        self.queue().answer(digest, answer);
    }

    /// Fetches all chunks of a range, from one host after the other. Those that came are delivered, also if others do not come.
    async fn range(&self, range: &mut Range) -> Result<(), ChunkError> {
        let mut last = None;
        for session in &self.sessions {
            let error = match self.ask(session, range).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            tracing::info!(
                host = session.host(),
                error = chain(&error),
                "chunks of {} do not come",
                self.record().name
            );
            last = Some(error);
        }
        let digest = range
            .chunks
            .first()
            .map_or(self.artifact, |chunk| chunk.place.digest);
        Err(last.unwrap_or(ChunkError::Unknown(digest)))
    }

    async fn ask(&self, session: &Session, range: &mut Range) -> Result<(), ChunkError> {
        let (mut retries, mut lies) = (Retries::default(), 0);
        while let Some(first) = range.chunks.first().copied() {
            let before = range.chunks.len();
            let Err(error) = self.attempt(session, range).await else {
                continue;
            };
            let source = match error {
                Attempt::Damaged { .. } if lies + 1 < LIES => {
                    lies += 1;
                    continue;
                }
                Attempt::Damaged { digest, what } => {
                    return Err(ChunkError::Damaged {
                        digest,
                        host: session.host().to_owned(),
                        what,
                    });
                }
                Attempt::Request(source) => source,
            };
            let progress = range.chunks.len() < before;
            let Some(wait) = retries.after(source.failed(progress)) else {
                return Err(ChunkError::Request {
                    digest: first.place.digest,
                    source,
                });
            };
            tracing::info!(
                error = chain(&source),
                "chunks are asked for again in {wait:.1?}"
            );
            tokio::time::sleep(wait).await;
        }
        Ok(())
    }

    /// One request. What came in full is delivered and no longer in `range`.
    async fn attempt(&self, session: &Session, range: &mut Range) -> Result<(), Attempt> {
        let pack = self.packs.get(range.pack as usize).copied();
        // An index that was read names packs that are there.
        let pack = pack.ok_or_else(|| session.nonsense(format!("a pack {}", range.pack)))?;
        let url = session.url(&format!("blobs/{}", pack.digest))?;
        let what = format!("blob {}", pack.digest);
        let asked = range.header();
        let response = session
            .send(Method::GET, &url, &what, |request| {
                request.header(RANGE, &asked)
            })
            .await?;
        let whole = range.start == 0 && range.end == pack.size;
        match response.status() {
            StatusCode::PARTIAL_CONTENT => check_range(session, &response, range, pack)?,
            StatusCode::OK if !whole => {
                return Err(session
                    .nonsense(format!("all of {what}, where a part was asked for"))
                    .into());
            }
            _ => {}
        }
        let response = session.check(response, &what).await?;
        let length = range.end - range.start;
        if let Some(found) = response.content_length()
            && found != length
        {
            return Err(session
                .nonsense(format!(
                    "{found} bytes of {what}, where {length} were asked for"
                ))
                .into());
        }
        self.receive(session, response, range).await
    }

    async fn receive(
        &self,
        session: &Session,
        mut response: Response,
        range: &mut Range,
    ) -> Result<(), Attempt> {
        let (mut at, end) = (range.start, range.end);
        let mut held = BytesMut::new();
        while at < end {
            let piece = match response.chunk().await {
                Ok(Some(piece)) => piece,
                Ok(None) => {
                    let (came, size) = (held.len() as u64 + at - range.start, end - range.start);
                    return Err(RequestError::Short {
                        host: session.host().to_owned(),
                        came,
                        size,
                    }
                    .into());
                }
                Err(error) => return Err(RequestError::of_client(session.host(), error).into()),
            };
            self.transferred
                .fetch_add(piece.len() as u64, Ordering::Relaxed);
            held.extend_from_slice(&piece);
            if held.len() as u64 > end - at {
                return Err(session.nonsense("more bytes than it announced").into());
            }
            while let Some(chunk) = range.chunks.first().copied() {
                let skip = chunk.place.offset - at;
                let until = skip + u64::from(chunk.place.length);
                if (held.len() as u64) < until {
                    break;
                }
                let stored = held
                    .split_to(until as usize)
                    .freeze()
                    .slice(skip as usize..);
                at += until;
                let unpacked = tokio::task::spawn_blocking(move || unpack(&chunk, stored)).await;
                let unpacked =
                    unpacked.map_err(|_| session.nonsense("a chunk that cannot be unpacked"))?;
                let bytes = unpacked.map_err(|what| Attempt::Damaged {
                    digest: chunk.place.digest,
                    what,
                })?;
                self.answer(&chunk.place.digest, &Ok(bytes));
                // The next try begins behind it.
                range.chunks.remove(0);
                range.start = at;
            }
            if range.chunks.is_empty() {
                return Ok(());
            }
        }
        Ok(())
    }
}

enum Attempt {
    Request(RequestError),
    Damaged { digest: Digest, what: String },
}

impl From<RequestError> for Attempt {
    fn from(error: RequestError) -> Self {
        Self::Request(error)
    }
}

/// The plain bytes of a stored chunk, if they are its.
fn unpack(chunk: &Wanted, stored: Bytes) -> Result<Bytes, String> {
    let plain = chunk.place.plain as usize;
    let bytes = match stored.len() == plain {
        true => stored,
        // Never more than `plain` bytes are made.
        false => Bytes::from(
            zstd::bulk::decompress(&stored, plain)
                .map_err(|error| format!("it cannot be unpacked ({error})"))?,
        ),
    };
    if bytes.len() != plain {
        return Err(format!("it has {} bytes, not {plain}", bytes.len()));
    }
    match Digest::of(&bytes) {
        found if found == chunk.place.digest => Ok(bytes),
        found => Err(format!("its bytes hash to {found}")),
    }
}

/// A part must be the one that was asked for.
fn check_range(
    session: &Session,
    response: &Response,
    range: &Range,
    pack: Blob,
) -> Result<(), RequestError> {
    let header = response
        .headers()
        .get(CONTENT_RANGE)
        .and_then(|value| value.to_str().ok());
    let fits = header.and_then(content_range).is_some_and(|found| {
        found.first == range.start
            && found.last + 1 == range.end
            && found.total.is_none_or(|total| total == pack.size)
    });
    match fits {
        true => Ok(()),
        false => Err(session.nonsense(format!(
            "another part of blob {} than bytes {} to {}",
            pack.digest,
            range.start,
            range.end - 1
        ))),
    }
}
