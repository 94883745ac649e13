//! Uploads: blobs that the registry does not have, from files or from memory, and manifests.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::future::FutureExt;
use futures::stream::{self, StreamExt, TryStreamExt};
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, LOCATION};
use reqwest::{Body, Method, StatusCode, Url};
use tokio_util::io::ReaderStream;

use super::failure::RequestError;
use super::progress::Meter;
use super::retry::Retries;
use super::session::Session;
use crate::api::error::chain;
use crate::image::Digest;
use crate::image::manifest::Blob;

/// Blobs that are sent at a time.
const AT_A_TIME: usize = 3;

/// Bytes that are read at a time.
const PIECE: usize = 256 << 10;

/// How long nothing may go out, or come back after everything went out.
const SILENCE: Duration = Duration::from_secs(60);

/// Why a blob is not sent.
#[derive(Debug, thiserror::Error)]
pub(super) enum UploadError {
    /// The registry.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// A file here.
    #[error("cannot read blob {digest}")]
    Read {
        /// Which.
        digest: Digest,
        /// Why.
        source: std::io::Error,
    },
}

/// A blob that is to be sent.
#[derive(Clone, Debug)]
pub(super) struct Upload {
    blob: Blob,
    from: From,
}

#[derive(Clone, Debug)]
enum From {
    File(PathBuf),
    Memory(Bytes),
}

impl Upload {
    /// One that is a file.
    pub(super) fn file(blob: Blob, path: PathBuf) -> Self {
        let from = From::File(path);
        Self { blob, from }
    }

    /// A small one.
    pub(super) fn bytes(blob: Blob, bytes: Vec<u8>) -> Self {
        let from = From::Memory(bytes.into());
        Self { blob, from }
    }

    async fn body(&self, sent: Arc<AtomicU64>, meter: Meter) -> Result<Body, UploadError> {
        let blob = self.blob;
        let told = move |length: usize| {
            let length = length as u64;
            let done = sent.fetch_add(length, Ordering::Relaxed) + length;
            meter.transferred(length);
            meter.done(&blob, done);
        };
        match &self.from {
            From::Memory(bytes) => {
                told(bytes.len());
                Ok(Body::from(bytes.clone()))
            }
            From::File(path) => {
                let digest = blob.digest;
                let file = tokio::fs::File::open(path).await;
                let file = file.map_err(|source| UploadError::Read { digest, source })?;
                let pieces = ReaderStream::with_capacity(file, PIECE);
                Ok(Body::wrap_stream(
                    pieces.inspect_ok(move |piece| told(piece.len())),
                ))
            }
        }
    }
}

/// Sends the blobs that are not there yet, several at a time.
pub(super) async fn all(
    session: &Session,
    uploads: Vec<Upload>,
    meter: &Meter,
) -> Result<(), UploadError> {
    let blobs: Vec<Blob> = uploads.iter().map(|upload| upload.blob).collect();
    meter.more_blobs(&blobs);
    let sends: Vec<_> = uploads
        .iter()
        .map(|upload| blob(session, upload, meter).boxed())
        .collect();
    stream::iter(sends)
        .buffer_unordered(AT_A_TIME)
        .try_collect()
        .await
}

/// Sends a blob, unless it is there.
async fn blob(session: &Session, upload: &Upload, meter: &Meter) -> Result<(), UploadError> {
    let blob = upload.blob;
    let url = session.url(&format!("blobs/{}", blob.digest))?;
    let what = format!("blob {}", blob.digest);
    let mut retries = Retries::default();
    loop {
        let tried = async {
            let there = session.send(Method::HEAD, &url, &what, |r| r).await?;
            if there.status().is_success() {
                return Ok(());
            }
            if there.status() != StatusCode::NOT_FOUND {
                session.check(there, &what).await?;
            }
            send(session, upload, &what, meter).await
        };
        let error = match tried.await {
            Ok(()) => {
                meter.done(&blob, blob.size);
                return Ok(());
            }
            Err(UploadError::Request(error)) => error,
            Err(error) => return Err(error),
        };
        let Some(wait) = retries.after(error.failed(false)) else {
            return Err(error.into());
        };
        meter.note(format!("{}; next try in {wait:.1?}", chain(&error)));
        tokio::time::sleep(wait).await;
    }
}

/// A session for the blob, and its bytes in one request (distribution-spec, "POST then PUT").
async fn send(
    session: &Session,
    upload: &Upload,
    what: &str,
    meter: &Meter,
) -> Result<(), UploadError> {
    let blob = upload.blob;
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
    let sent = Arc::new(AtomicU64::new(0));
    let body = upload.body(Arc::clone(&sent), meter.clone()).await?;
    let request = session.send_once(Method::PUT, &url, |request| {
        request
            .header(CONTENT_TYPE, "application/octet-stream")
            .header(CONTENT_LENGTH, blob.size)
            .body(body)
    });
    let response = tokio::select! {
        response = request => response?,
        () = silence(&sent) => {
            return Err(RequestError::Short {
                host: session.host().to_owned(),
                came: sent.load(Ordering::Relaxed),
                size: blob.size,
            }
            .into());
        }
    };
    session.check(response, what).await?;
    Ok(())
}

/// Stores a manifest under a tag or its digest; gives the answer's headers.
pub(super) async fn manifest(
    session: &Session,
    under: &str,
    media_type: &str,
    manifest: Vec<u8>,
) -> Result<HeaderMap, RequestError> {
    let url = session.url(&format!("manifests/{under}"))?;
    let what = format!("manifest of `{under}`");
    let response = session
        .send(Method::PUT, &url, &what, |request| {
            request
                .header(CONTENT_TYPE, media_type)
                .body(manifest.clone())
        })
        .await?;
    let response = session.check(response, &what).await?;
    Ok(response.headers().clone())
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
