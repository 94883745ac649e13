//! `push`: from kept layers to a registry. What the registry has already is not sent.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::future::FutureExt;
use futures::stream::{self, StreamExt, TryStreamExt};
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, LOCATION};
use reqwest::{Body, Method, StatusCode, Url};
use tokio_util::io::ReaderStream;
use tokio_util::sync::CancellationToken;

use super::endpoint;
use super::failure::RequestError;
use super::progress::Meter;
use super::pull::Registries;
use super::reference::Reference;
use super::retry::Retries;
use super::session::{Access, Session};
use super::setup::{self, SetupError};
use crate::api::error::chain;
use crate::image::manifest::Blob;
use crate::image::oci::MAX_JSON;
use crate::image::{ContentError, Digest, KeptError};

/// Blobs that are sent at a time.
const AT_A_TIME: usize = 3;

/// Bytes that are read at a time.
const PIECE: usize = 256 << 10;

/// How long nothing may go out, or come back after everything went out.
const SILENCE: Duration = Duration::from_secs(60);

/// What a push needs beside image and target.
#[derive(Clone, Debug, Default)]
pub struct PushOptions {
    /// Credentials for this push, instead of the configured file.
    pub auth_file: Option<std::path::PathBuf>,
    /// Speak to the registry without TLS.
    pub plain_http: bool,
}

/// What a push came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pushed {
    /// The manifest's digest, there as here.
    pub digest: Digest,
    /// Bytes of blobs that crossed the network.
    pub transferred_bytes: u64,
}

/// Why an image is not pushed. The tag is set last: the registry has no half image under it.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// The image, or its layers.
    #[error(transparent)]
    Kept(#[from] KeptError),
    /// A digest cannot be pushed to.
    #[error("`{0}` names a digest: push to a tag, such as {1}:1")]
    Pinned(String, String),
    /// The credentials file, or the HTTP client.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The registry.
    #[error("`{target}` is not pushed")]
    Request {
        /// Where it was to go.
        target: String,
        /// Why.
        source: RequestError,
    },
    /// A blob here.
    #[error(transparent)]
    Content(#[from] ContentError),
    /// A blob here.
    #[error("cannot read blob {digest}")]
    Read {
        /// Which.
        digest: Digest,
        /// Why.
        source: std::io::Error,
    },
    /// A thread of ours.
    #[error("a task ended too early")]
    Task(#[from] tokio::task::JoinError),
    /// Nobody waits for it any more, or the service ends.
    #[error("the push was ended")]
    Ended,
}

impl Registries {
    /// Pushes `image`, whose layers must be kept, to `target`.
    ///
    /// # Errors
    /// See [`PushError`].
    pub async fn push(
        &self,
        image: &str,
        target: &Reference,
        options: &PushOptions,
        meter: &Meter,
        ended: &CancellationToken,
    ) -> Result<Pushed, PushError> {
        tokio::select! {
            pushed = self.send(image, target, options, meter) => pushed,
            () = ended.cancelled() => Err(PushError::Ended),
        }
    }

    async fn send(
        &self,
        image: &str,
        target: &Reference,
        options: &PushOptions,
        meter: &Meter,
    ) -> Result<Pushed, PushError> {
        let Some(tag) = target.tag() else {
            let repository = format!("{}/{}", target.registry(), target.repository());
            return Err(PushError::Pinned(target.to_string(), repository));
        };
        let (store, image) = (Arc::clone(&self.store), image.to_owned());
        let find = move || {
            let kept = store.kept(&image)?;
            let hold = store.content().hold(kept.all());
            let manifest = store.content().read(kept.manifest, MAX_JSON)?;
            Ok::<_, KeptError>((kept, hold, manifest))
        };
        let (kept, _hold, manifest) = tokio::task::spawn_blocking(find).await??;
        let own = endpoint::own(&self.config, target, options.plain_http);
        let auth_file = options.auth_file.as_deref();
        let sessions = setup::sessions(
            &self.config,
            own.into_iter().collect(),
            target,
            auth_file,
            Access::Push,
        )
        .await?;
        // A reference always has a registry.
        let Some(session) = sessions.first() else {
            return Err(PushError::Ended);
        };
        let blobs = self.sizes(&kept.blobs).await?;
        meter.blobs(&blobs);
        let sends: Vec<_> = blobs
            .iter()
            .map(|blob| self.blob_out(session, *blob, target, meter).boxed())
            .collect();
        stream::iter(sends)
            .buffer_unordered(AT_A_TIME)
            .try_collect::<()>()
            .await?;
        self.tag(session, target, tag, &kept.media_type, manifest)
            .await?;
        tracing::info!(%target, digest = %kept.manifest, "pushed");
        Ok(Pushed {
            digest: kept.manifest,
            transferred_bytes: meter.transferred_so_far(),
        })
    }

    async fn sizes(&self, digests: &[Digest]) -> Result<Vec<Blob>, PushError> {
        let mut blobs = Vec::with_capacity(digests.len());
        for digest in digests.iter().copied() {
            let found = tokio::fs::metadata(self.store.content().path(digest)).await;
            let found = found.map_err(|source| PushError::Read { digest, source })?;
            blobs.push(Blob {
                digest,
                size: found.len(),
            });
        }
        Ok(blobs)
    }

    /// Sends a blob, unless it is there.
    async fn blob_out(
        &self,
        session: &Session,
        blob: Blob,
        target: &Reference,
        meter: &Meter,
    ) -> Result<(), PushError> {
        let failed = |source| PushError::Request {
            target: target.to_string(),
            source,
        };
        let url = session
            .url(&format!("blobs/{}", blob.digest))
            .map_err(failed)?;
        let what = format!("blob {}", blob.digest);
        let mut retries = Retries::default();
        loop {
            let tried = async {
                let there = session.send(Method::HEAD, &url, &what, |r| r).await?;
                if there.status().is_success() {
                    return Ok(Ok(()));
                }
                if there.status() != StatusCode::NOT_FOUND {
                    session.check(there, &what).await?;
                }
                self.upload(session, blob, &what, meter).await
            };
            let error = match tried.await {
                Ok(sent) => {
                    sent?;
                    meter.done(&blob, blob.size);
                    return Ok(());
                }
                Err(error) => error,
            };
            let Some(wait) = retries.after(error.failed(false)) else {
                return Err(failed(error));
            };
            meter.note(format!("{}; next try in {wait:.1?}", chain(&error)));
            tokio::time::sleep(wait).await;
        }
    }

    /// A session for the blob, and its bytes in one request (distribution-spec, "POST then PUT"). The outer error is the
    /// registry's and may pass, the inner one is ours.
    async fn upload(
        &self,
        session: &Session,
        blob: Blob,
        what: &str,
        meter: &Meter,
    ) -> Result<Result<(), PushError>, RequestError> {
        let begin = session.url("blobs/uploads/")?;
        let begun = session
            .send(Method::POST, &begin, what, |r| r.header(CONTENT_LENGTH, 0))
            .await?;
        let begun = session.check(begun, what).await?;
        let location = begun.headers().get(LOCATION).and_then(|l| l.to_str().ok());
        let location = location.ok_or_else(|| session.nonsense("an upload without a location"))?;
        let mut url: Url = session.location(&begin, location)?;
        url.query_pairs_mut()
            .append_pair("digest", &blob.digest.to_string());
        let file = match tokio::fs::File::open(self.store.content().path(blob.digest)).await {
            Ok(file) => file,
            Err(source) => {
                let digest = blob.digest;
                return Ok(Err(PushError::Read { digest, source }));
            }
        };
        let sent = Arc::new(AtomicU64::new(0));
        let (counter, told) = (Arc::clone(&sent), meter.clone());
        let pieces = ReaderStream::with_capacity(file, PIECE).inspect_ok(move |piece| {
            let length = piece.len() as u64;
            let done = counter.fetch_add(length, Ordering::Relaxed) + length;
            told.transferred(length);
            told.done(&blob, done);
        });
        let request = session.send_once(Method::PUT, &url, |request| {
            request
                .header(CONTENT_TYPE, "application/octet-stream")
                .header(CONTENT_LENGTH, blob.size)
                .body(Body::wrap_stream(pieces))
        });
        let response = tokio::select! {
            response = request => response?,
            () = silence(&sent) => {
                return Err(RequestError::Short {
                    host: session.host().to_owned(),
                    came: sent.load(Ordering::Relaxed),
                    size: blob.size,
                });
            }
        };
        session.check(response, what).await?;
        Ok(Ok(()))
    }

    async fn tag(
        &self,
        session: &Session,
        target: &Reference,
        tag: &str,
        media_type: &str,
        manifest: Vec<u8>,
    ) -> Result<(), PushError> {
        let failed = |source| PushError::Request {
            target: target.to_string(),
            source,
        };
        let url = session.url(&format!("manifests/{tag}")).map_err(failed)?;
        let what = format!("manifest of `{tag}`");
        let response = session
            .send(Method::PUT, &url, &what, |request| {
                request
                    .header(CONTENT_TYPE, media_type)
                    .body(manifest.clone())
            })
            .await
            .map_err(failed)?;
        session.check(response, &what).await.map_err(failed)?;
        Ok(())
    }
}

/// Ends when nothing more was sent for a while.
async fn silence(sent: &AtomicU64) {
    let mut before = sent.load(Ordering::Relaxed);
    loop {
        tokio::time::sleep(SILENCE).await;
        let now = sent.load(Ordering::Relaxed);
        if now == before {
            return;
        }
        before = now;
    }
}
