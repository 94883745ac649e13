//! `push`: from kept layers to a registry, and an image's chunks beside them. What the registry has already is not sent.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::chunks::{PackError, Published, find};
use super::endpoint;
use super::failure::RequestError;
use super::fetch::FetchError;
use super::progress::Meter;
use super::pull::Registries;
use super::reference::Reference;
use super::session::{Access, Session};
use super::setup::{self, SetupError};
use super::upload::{self, Upload, UploadError};
use crate::image::manifest::Blob;
use crate::image::oci::MAX_JSON;
use crate::image::{ContentError, Digest, KeptError};

/// What a push needs beside image and target.
#[derive(Clone, Debug, Default)]
pub struct PushOptions {
    /// Credentials for this push, instead of the configured file.
    pub auth_file: Option<std::path::PathBuf>,
    /// Speak to the registry without TLS.
    pub plain_http: bool,
    /// Push the image's chunks, too. Then its layers need not be kept, if the registry has the image.
    pub chunks: bool,
}

/// What a push came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pushed {
    /// The manifest's digest, there as here.
    pub digest: Digest,
    /// Bytes of blobs that crossed the network.
    pub transferred_bytes: u64,
    /// Its chunks, if they were pushed.
    pub chunks: Option<Published>,
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
    /// What the registry has already.
    #[error("`{target}` is not pushed")]
    Subject {
        /// Where it was to go.
        target: String,
        /// Why.
        source: FetchError,
    },
    /// The image's chunks.
    #[error(transparent)]
    Pack(#[from] PackError),
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
        let (store, name) = (Arc::clone(&self.store), image.to_owned());
        let record = tokio::task::spawn_blocking(move || store.resolve(&name)).await?;
        let record = record.map_err(KeptError::from)?;
        // Neither its name nor a pod need it any more: it stays until it is sent.
        let _hold = self.store.hold([record.erofs_digest]);
        let subject = match self.layers(session, image, target, tag, meter).await {
            Ok(subject) => subject,
            Err(PushError::Kept(not_kept @ KeptError::NotKept(_))) if options.chunks => {
                let there = find::manifest_there(session, record.manifest_digest, meter).await;
                there
                    .map_err(|error| PushError::of_fetch(target, error))?
                    .ok_or(PushError::Kept(not_kept))?
            }
            Err(error) => return Err(error),
        };
        let chunks = match options.chunks {
            true => Some(
                self.publish(session, &record, subject, target, meter)
                    .await?,
            ),
            false => None,
        };
        tracing::info!(%target, digest = %record.manifest_digest, "pushed");
        Ok(Pushed {
            digest: record.manifest_digest,
            transferred_bytes: meter.transferred_so_far(),
            chunks,
        })
    }

    /// Pushes the image as it came: its layers, its configuration, and last its manifest, which is returned with its type.
    async fn layers(
        &self,
        session: &Session,
        image: &str,
        target: &Reference,
        tag: &str,
        meter: &Meter,
    ) -> Result<(Blob, String), PushError> {
        let (store, image) = (Arc::clone(&self.store), image.to_owned());
        let find = move || {
            let kept = store.kept(&image)?;
            let hold = store.content().hold(kept.all());
            let manifest = store.content().read(kept.manifest, MAX_JSON)?;
            Ok::<_, KeptError>((kept, hold, manifest))
        };
        let (kept, _hold, manifest) = tokio::task::spawn_blocking(find).await??;
        let blobs = self.sizes(&kept.blobs).await?;
        let path = |blob: &Blob| self.store.content().path(blob.digest);
        let uploads = blobs.iter().map(|blob| Upload::file(*blob, path(blob)));
        upload::all(session, uploads.collect(), meter)
            .await
            .map_err(|error| PushError::of_upload(target, error))?;
        let subject = Blob {
            digest: kept.manifest,
            size: manifest.len() as u64,
        };
        upload::manifest(session, tag, &kept.media_type, manifest)
            .await
            .map_err(|error| PushError::of_request(target, error))?;
        Ok((subject, kept.media_type))
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
}

impl PushError {
    pub(super) fn of_request(target: &Reference, source: RequestError) -> Self {
        Self::Request {
            target: target.to_string(),
            source,
        }
    }

    pub(super) fn of_upload(target: &Reference, error: UploadError) -> Self {
        match error {
            UploadError::Request(source) => Self::of_request(target, source),
            UploadError::Read { digest, source } => Self::Read { digest, source },
        }
    }

    pub(super) fn of_fetch(target: &Reference, error: FetchError) -> Self {
        match error {
            FetchError::Request(source) => Self::of_request(target, source),
            source => Self::Subject {
                target: target.to_string(),
                source,
            },
        }
    }
}
