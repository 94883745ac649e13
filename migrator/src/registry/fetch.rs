//! Fetching: manifests whole, blobs piece by piece into the store's content, from where an earlier try ended.

use std::sync::Arc;

use reqwest::header::{ACCEPT, CONTENT_RANGE, CONTENT_TYPE, RANGE};
use reqwest::{Method, Response, StatusCode};

use super::failure::RequestError;
use super::progress::Meter;
use super::retry::{Failed, Retries};
use super::session::Session;
use crate::api::error::chain;
use crate::image::content::Content;
use crate::image::manifest::{self, Blob};
use crate::image::oci::MAX_JSON;
use crate::image::partial::Partial;
use crate::image::{ContentError, Digest};

/// Bytes that are gathered before they are written: fewer changes of thread.
const BATCH: usize = 1 << 20;

/// Why something is not fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The registry.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// A manifest that is another than its digest says.
    #[error(
        "the registry {host} gives another manifest than {expected}: one that hashes to {found}"
    )]
    OtherManifest {
        /// The registry.
        host: String,
        /// As asked for, or as it says itself.
        expected: String,
        /// As computed.
        found: Digest,
    },
    /// A blob did not come in full.
    #[error(
        "of blob {digest} {came} of {size} bytes are here after {tries} tries; a new pull goes on from there"
    )]
    Incomplete {
        /// The blob.
        digest: Digest,
        /// Its size.
        size: u64,
        /// Bytes that are here.
        came: u64,
        /// Tries in this pull.
        tries: u32,
        /// What the last one failed with.
        source: Box<RequestError>,
    },
    /// The blob, or the disk.
    #[error(transparent)]
    Content(#[from] ContentError),
    /// A thread of ours.
    #[error("a task ended too early")]
    Task(#[from] tokio::task::JoinError),
}

/// A manifest or an index.
#[derive(Debug)]
pub(super) struct Fetched {
    pub(super) bytes: Vec<u8>,
    pub(super) digest: Digest,
    pub(super) content_type: Option<String>,
}

/// Fetches the manifest of a tag or a digest.
pub(super) async fn manifest(
    session: &Session,
    wanted: &str,
    meter: &Meter,
) -> Result<Fetched, FetchError> {
    let url = session.url(&format!("manifests/{wanted}"))?;
    let what = format!("manifest of `{wanted}`");
    let mut retries = Retries::default();
    let (bytes, content_type, says) = loop {
        let tried = async {
            let response = session
                .send(Method::GET, &url, &what, |r| {
                    r.header(ACCEPT, manifest::ACCEPT)
                })
                .await?;
            let response = session.check(response, &what).await?;
            let header = |name| {
                let value = response.headers().get(name)?;
                Some(value.to_str().ok()?.to_owned())
            };
            let content_type = header(CONTENT_TYPE.as_str());
            let says = header("docker-content-digest");
            let bytes = session
                .body(response, MAX_JSON as usize, "a manifest")
                .await?;
            Ok::<_, RequestError>((bytes, content_type, says))
        };
        match tried.await {
            Ok(found) => break found,
            Err(error) => pause(&mut retries, error, false, meter).await?,
        }
    };
    let digest = Digest::of(&bytes);
    // The header is a promise of the registry's own; one of another algorithm promises nothing to us.
    let pinned = wanted.starts_with("sha256:").then_some(wanted.to_owned());
    let promised = pinned.or(says.filter(|says| says.starts_with("sha256:")));
    match promised {
        Some(expected) if expected != digest.to_string() => Err(FetchError::OtherManifest {
            host: session.host().to_owned(),
            expected,
            found: digest,
        }),
        Some(_) | None => Ok(Fetched {
            bytes,
            digest,
            content_type,
        }),
    }
}

/// Fetches a blob that is small enough to be kept in memory, and verifies it. Its size is the caller's to judge.
pub(super) async fn small(
    session: &Session,
    blob: Blob,
    meter: &Meter,
) -> Result<Vec<u8>, FetchError> {
    let url = session.url(&format!("blobs/{}", blob.digest))?;
    let what = format!("blob {}", blob.digest);
    let mut retries = Retries::default();
    let bytes = loop {
        let tried = async {
            let response = session.send(Method::GET, &url, &what, |r| r).await?;
            let response = session.check(response, &what).await?;
            let limit = usize::try_from(blob.size).unwrap_or(usize::MAX);
            let bytes = session.body(response, limit, &what).await?;
            if (bytes.len() as u64) < blob.size {
                let (came, size) = (bytes.len() as u64, blob.size);
                let host = session.host().to_owned();
                return Err(RequestError::Short { host, came, size });
            }
            Ok(bytes)
        };
        match tried.await {
            Ok(bytes) => break bytes,
            Err(error) => pause(&mut retries, error, false, meter).await?,
        }
    };
    let found = Digest::of(&bytes);
    if found != blob.digest {
        let expected = blob.digest;
        return Err(ContentError::Tampered { expected, found }.into());
    }
    meter.transferred(blob.size);
    Ok(bytes)
}

/// Waits for the next try; gives the error back if there is none.
async fn pause(
    retries: &mut Retries,
    error: RequestError,
    progress: bool,
    meter: &Meter,
) -> Result<(), RequestError> {
    let Some(wait) = retries.after(error.failed(progress)) else {
        return Err(error);
    };
    meter.note(format!(
        "{}; next try in {:.1} s",
        chain(&error),
        wait.as_secs_f32()
    ));
    tokio::time::sleep(wait).await;
    Ok(())
}

/// Fetches a blob into the content, unless it is there; from the first host that has it.
pub(super) async fn blob(
    sessions: &[Arc<Session>],
    content: &Arc<Content>,
    blob: Blob,
    meter: &Meter,
) -> Result<(), FetchError> {
    let (own, digest, size) = (Arc::clone(content), blob.digest, blob.size);
    let partial = tokio::task::spawn_blocking(move || match own.has(digest) {
        true => Ok(None),
        false => own.begin(digest, size).map(Some),
    });
    let Some(partial) = partial.await?? else {
        meter.done(&blob, size);
        return Ok(());
    };
    meter.done(&blob, partial.length());
    let mut download = Download {
        content: Arc::clone(content),
        blob,
        meter: meter.clone(),
        partial: Some(partial),
    };
    let mut last = None;
    for session in sessions {
        match download.from(session).await {
            Ok(()) => return Ok(()),
            // Of these another host knows no better.
            Err(
                error @ (FetchError::Task(_)
                | FetchError::Content(
                    ContentError::DiskFull { .. } | ContentError::Store(_),
                )),
            ) => return Err(error),
            Err(error) => {
                if sessions.len() > 1 {
                    meter.note(chain(&error));
                }
                last = Some(error);
            }
        }
    }
    // There is always a host: the registry itself.
    Err(last.unwrap_or_else(|| {
        FetchError::Request(RequestError::Nonsense {
            host: String::new(),
            what: "no host serves it".to_owned(),
        })
    }))
}

struct Download {
    content: Arc<Content>,
    blob: Blob,
    meter: Meter,
    /// `None` while a thread writes to it, and after it was found to be damaged.
    partial: Option<Partial>,
}

impl Download {
    /// Fetches the rest from one host.
    async fn from(&mut self, session: &Session) -> Result<(), FetchError> {
        // Bytes of an earlier pull may be what is wrong: then all of it is fetched once more.
        let resumed = self.length().await? > 0;
        match self.whole(session).await {
            Err(FetchError::Content(ContentError::Tampered { .. })) if resumed => {
                self.meter.note(format!(
                    "what was here of blob {} is damaged: it is fetched anew",
                    self.blob.digest
                ));
                self.whole(session).await
            }
            result => result,
        }
    }

    async fn whole(&mut self, session: &Session) -> Result<(), FetchError> {
        let mut retries = Retries::default();
        while self.length().await? < self.blob.size {
            let before = self.length().await?;
            let Err(error) = self.attempt(session).await else {
                continue;
            };
            let source = match error {
                FetchError::Request(error) => error,
                error => return Err(error),
            };
            let progress = self.length().await? > before;
            if let Err(source) = pause(&mut retries, source, progress, &self.meter).await {
                let came = self.length().await?;
                if matches!(source.failed(false), Failed::Lasting) {
                    return Err(source.into());
                }
                return Err(FetchError::Incomplete {
                    digest: self.blob.digest,
                    size: self.blob.size,
                    came,
                    tries: retries.tries(),
                    source: Box::new(source),
                });
            }
        }
        let Some(partial) = self.partial.take() else {
            return Ok(());
        };
        Ok(tokio::task::spawn_blocking(move || partial.finish()).await??)
    }

    /// One request, and as much of its answer as comes.
    async fn attempt(&mut self, session: &Session) -> Result<(), FetchError> {
        let Blob { digest, size } = self.blob;
        let url = session.url(&format!("blobs/{digest}"))?;
        let what = format!("blob {digest}");
        let offset = self.length().await?;
        let response = session
            .send(Method::GET, &url, &what, |request| match offset {
                0 => request,
                offset => request.header(RANGE, format!("bytes={offset}-")),
            })
            .await?;
        let offset = match response.status() {
            StatusCode::PARTIAL_CONTENT if range_fits(&response, offset, size) => offset,
            StatusCode::PARTIAL_CONTENT => {
                return Err(session
                    .nonsense(format!("{what} from another byte than {offset}"))
                    .into());
            }
            // It does not know ranges, or not for this blob.
            StatusCode::OK | StatusCode::RANGE_NOT_SATISFIABLE if offset > 0 => {
                self.with(Partial::restart).await?;
                self.meter.done(&self.blob, 0);
                if response.status() == StatusCode::RANGE_NOT_SATISFIABLE {
                    return Ok(());
                }
                0
            }
            _ => offset,
        };
        let response = session.check(response, &what).await?;
        if let Some(found) = response.content_length()
            && found != size - offset
        {
            return Err(session
                .nonsense(format!(
                    "{what} with {} bytes, where its manifest says {size}",
                    offset.saturating_add(found)
                ))
                .into());
        }
        self.receive(session, response).await
    }

    async fn receive(
        &mut self,
        session: &Session,
        mut response: Response,
    ) -> Result<(), FetchError> {
        let mut batch = Vec::with_capacity(BATCH);
        let ended = loop {
            match response.chunk().await {
                Ok(Some(piece)) => {
                    self.meter.transferred(piece.len() as u64);
                    batch.extend_from_slice(&piece);
                }
                Ok(None) => break Ok(()),
                Err(error) => break Err(RequestError::of_client(session.host(), error)),
            }
            if batch.len() >= BATCH {
                self.append(std::mem::take(&mut batch)).await?;
                batch.reserve(BATCH);
            }
        };
        self.append(batch).await?;
        ended?;
        let came = self.length().await?;
        if came < self.blob.size {
            return Err(RequestError::Short {
                host: session.host().to_owned(),
                came,
                size: self.blob.size,
            }
            .into());
        }
        Ok(())
    }

    async fn append(&mut self, bytes: Vec<u8>) -> Result<(), FetchError> {
        self.with(move |partial| partial.append(&bytes)).await?;
        let length = self.length().await?;
        self.meter.done(&self.blob, length);
        Ok(())
    }

    async fn length(&mut self) -> Result<u64, FetchError> {
        if let Some(partial) = &self.partial {
            return Ok(partial.length());
        }
        self.with(|partial| Ok(partial.length())).await
    }

    /// Works on the partial blob where it may block.
    async fn with<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Partial) -> Result<T, ContentError> + Send + 'static,
    ) -> Result<T, FetchError> {
        let (content, Blob { digest, size }) = (Arc::clone(&self.content), self.blob);
        let partial = self.partial.take();
        let worked = tokio::task::spawn_blocking(move || {
            let mut partial = match partial {
                Some(partial) => partial,
                None => content.begin(digest, size)?,
            };
            let result = work(&mut partial);
            Ok::<_, ContentError>((partial, result))
        });
        let (partial, result) = worked.await??;
        self.partial = Some(partial);
        Ok(result?)
    }
}

/// Whether a partial answer begins where it was asked to, in a blob of the right size.
fn range_fits(response: &Response, offset: u64, size: u64) -> bool {
    let header = response.headers().get(CONTENT_RANGE);
    let text = header.and_then(|value| value.to_str().ok());
    text.and_then(content_range)
        .is_some_and(|found| found.first == offset && found.total.is_none_or(|total| total == size))
}

/// Which part of a blob an answer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) first: u64,
    pub(super) last: u64,
    /// Size of the blob, if the answer says it.
    pub(super) total: Option<u64>,
}

/// Reads `bytes FIRST-LAST/TOTAL` (RFC 9110, 14.4).
pub(super) fn content_range(text: &str) -> Option<Part> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
    let total = match total {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    (first <= last && last < u64::MAX).then_some(Part { first, last, total })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read() {
        let part = |total| {
            let (first, last) = (5, 9);
            Some(Part { first, last, total })
        };
        assert_eq!(content_range("bytes 5-9/10"), part(Some(10)));
        assert_eq!(content_range("bytes 5-9/*"), part(None));
        for text in [
            "bytes */10",
            "5-9/10",
            "bytes 5-/10",
            "bytes a-9/10",
            "bytes 9-5/10",
        ] {
            assert_eq!(content_range(text), None, "{text}");
        }
    }
}
