//! `pull`: from a reference to an image in the node's store.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use futures::future::FutureExt;
use futures::stream::{self, StreamExt, TryStreamExt};
use tokio_util::sync::CancellationToken;

use super::chunks::OpenError;
use super::endpoint;
use super::failure::RequestError;
use super::fetch::{self, FetchError, Fetched};
use super::progress::{Meter, Phase};
use super::reference::Reference;
use super::session::{Access, Session};
use super::setup::{self, SetupError};
use super::source::RegistrySource;
use crate::api::error::chain;
use crate::config;
use crate::image::content::InUse;
use crate::image::layout::Blobs;
use crate::image::manifest::{self, Blob, Found, Image};
use crate::image::name::{self, BadName};
use crate::image::{
    ContentError, Digest, ImageHold, ImageRecord, ImageStore, ImportError, ManifestError, Platform,
    StoreError,
};

/// Layers that are fetched at a time, as docker does by default.
const AT_A_TIME: usize = 3;

/// How one image is to be pulled.
#[derive(Clone, Debug, Default)]
pub struct PullOptions {
    /// The name it gets in the store; the reference's if absent.
    pub name: Option<String>,
    /// Credentials for this pull, instead of the configured file.
    pub auth_file: Option<PathBuf>,
    /// Speak to the registry without TLS. Mirrors have their own URLs.
    pub plain_http: bool,
    /// Of several platforms, which.
    pub platform: Platform,
    /// Keep the layers, so that the image can be pushed and saved.
    pub keep_layers: bool,
    /// Be content with the image's description, if the registry has its chunks: they come when they are read.
    pub lazy: bool,
    /// How long the image is kept from being cleared away, if no earlier lease lasts longer.
    pub lease: Duration,
}

/// What a pull came to.
#[derive(Clone, Debug)]
pub struct Pulled {
    /// The image.
    pub record: ImageRecord,
    /// Whether most of it is still to come.
    pub lazy: bool,
    /// Bytes of blobs that crossed the network.
    pub transferred_bytes: u64,
}

/// Why an image is not pulled. What came of its blobs stays, and a new pull goes on with it.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The name to give it.
    #[error(transparent)]
    Name(#[from] BadName),
    /// The credentials file, or the HTTP client.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The registry, or what came from it.
    #[error("`{reference}`")]
    Fetch {
        /// What was asked for.
        reference: String,
        /// Why.
        source: FetchError,
    },
    /// What it is.
    #[error("`{reference}` cannot be used")]
    Manifest {
        /// What was asked for.
        reference: String,
        /// Why.
        source: ManifestError,
    },
    /// Its chunks.
    #[error("the chunks of `{reference}` cannot be used")]
    Chunks {
        /// What was asked for.
        reference: String,
        /// Why.
        source: OpenError,
    },
    /// The blobs of the store.
    #[error(transparent)]
    Content(#[from] ContentError),
    /// The image.
    #[error("`{reference}` is fetched, and cannot be imported")]
    Import {
        /// What was asked for.
        reference: String,
        /// Why.
        source: Box<ImportError>,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A thread of ours.
    #[error("a task ended too early")]
    Task(#[from] tokio::task::JoinError),
    /// Nobody waits for it any more, or the service ends.
    #[error("the pull was ended; a new one goes on where it was")]
    Ended,
}

/// The registries as a node knows them.
#[derive(Debug)]
pub struct Registries {
    pub(super) config: config::Registries,
    pub(super) store: Arc<ImageStore>,
    pub(super) source: Arc<RegistrySource>,
    /// One pull at a time fetches a blob; the others wait, and find it.
    locks: Mutex<HashMap<Digest, Weak<tokio::sync::Mutex<()>>>>,
}

impl Registries {
    /// Nothing is connected, and no file read, before a pull.
    pub fn new(config: config::Registries, store: Arc<ImageStore>) -> Self {
        let source = RegistrySource::new(config.clone(), Arc::clone(&store));
        Self {
            config,
            store,
            source: Arc::new(source),
            locks: Mutex::default(),
        }
    }

    /// The chunks of images that come from registries.
    pub fn source(&self) -> Arc<RegistrySource> {
        Arc::clone(&self.source)
    }

    /// Pulls an image.
    ///
    /// `ended` stops it while it fetches; an import that has begun is brought to its end.
    ///
    /// # Errors
    /// See [`PullError`]; the store has no part of the image.
    pub async fn pull(
        &self,
        reference: &Reference,
        options: &PullOptions,
        meter: &Meter,
        ended: &CancellationToken,
    ) -> Result<Pulled, PullError> {
        let name = match &options.name {
            Some(name) => name::normalize(name)?,
            None => reference.store_name()?,
        };
        let keep = options.keep_layers || self.config.keep_layers;
        let fetched = tokio::select! {
            fetched = self.fetch(reference, options, keep, &name, meter) => fetched?,
            () = ended.cancelled() => return Err(PullError::Ended),
        };
        let lazy = matches!(fetched, Outcome::Adopted(_));
        let (record, hold) = match fetched {
            Outcome::Known(known) | Outcome::Adopted(known) => *known,
            Outcome::Fetched(blobs, in_use) => {
                meter.phase(Phase::Import);
                let store = Arc::clone(&self.store);
                let import = move || {
                    let record = store.import_blobs(&blobs, &name);
                    if !keep || record.is_err() {
                        drop(in_use);
                        store.forget(&blobs)?;
                    }
                    Ok::<_, StoreError>(record)
                };
                let imported = tokio::task::spawn_blocking(import).await??;
                imported.map_err(|source| PullError::Import {
                    reference: reference.to_string(),
                    source: Box::new(source),
                })?
            }
        };
        self.lease(&record, options.lease).await?;
        drop(hold);
        tracing::info!(%reference, name = record.name, digest = %record.manifest_digest, "pulled");
        Ok(Pulled {
            record,
            lazy,
            transferred_bytes: meter.transferred_so_far(),
        })
    }

    async fn lease(&self, record: &ImageRecord, time: Duration) -> Result<(), PullError> {
        let (store, record) = (Arc::clone(&self.store), record.clone());
        let lease = move || store.lease_at_least(&record, SystemTime::now(), time);
        Ok(tokio::task::spawn_blocking(lease).await??)
    }

    async fn fetch(
        &self,
        reference: &Reference,
        options: &PullOptions,
        keep: bool,
        name: &str,
        meter: &Meter,
    ) -> Result<Outcome, PullError> {
        let endpoints = endpoint::endpoints(&self.config, reference, options.plain_http);
        let auth_file = options.auth_file.as_deref();
        let sessions =
            setup::sessions(&self.config, endpoints, reference, auth_file, Access::Pull).await?;
        let (sessions, fetched, image) = resolve(sessions, reference, options, meter).await?;
        if let Some(known) = self.store.by_manifest(&fetched.digest)
            && (!keep || self.store.content().has(fetched.digest))
        {
            let (store, name) = (Arc::clone(&self.store), name.to_owned());
            let named = tokio::task::spawn_blocking(move || store.add_name(&known, &name));
            return Ok(Outcome::Known(Box::new(named.await??)));
        }
        // Layers can only be kept if they come.
        if options.lazy && !keep {
            let lazily = self.lazily(&sessions, fetched.digest, reference, options, name, meter);
            if let Some(adopted) = lazily.await? {
                return Ok(Outcome::Adopted(Box::new(adopted)));
            }
        }
        let blobs = image.blobs();
        self.check_sizes(reference, &blobs)?;
        meter.blobs(&blobs);
        let needed = Blobs {
            manifest: fetched.digest,
            manifest_size: fetched.bytes.len() as u64,
            media_type: image.media_type,
            blobs: blobs.iter().map(|blob| blob.digest).collect(),
        };
        let hold = self.store.content().hold(needed.all());
        let fetches: Vec<_> = blobs
            .iter()
            .map(|blob| self.blob(&sessions, *blob, meter).boxed())
            .collect();
        stream::iter(fetches)
            .buffer_unordered(AT_A_TIME)
            .try_collect::<()>()
            .await
            .map_err(|source| PullError::Fetch {
                reference: reference.to_string(),
                source,
            })?;
        // Last of all: where it is, everything is that it names.
        let content = Arc::clone(self.store.content());
        let put = move || {
            let size = fetched.bytes.len() as u64;
            content.put(fetched.digest, size, &fetched.bytes[..])
        };
        tokio::task::spawn_blocking(put).await??;
        Ok(Outcome::Fetched(needed, hold))
    }

    async fn blob(
        &self,
        sessions: &[Arc<Session>],
        blob: Blob,
        meter: &Meter,
    ) -> Result<(), FetchError> {
        let lock = {
            let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| lock.strong_count() > 0);
            let known = locks.get(&blob.digest).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                let lock = Arc::default();
                locks.insert(blob.digest, Arc::downgrade(&lock));
                lock
            })
        };
        let _alone = lock.lock().await;
        fetch::blob(sessions, self.store.content(), blob, meter).await
    }

    /// Before anything is fetched: not more than an import would take.
    fn check_sizes(&self, reference: &Reference, blobs: &[Blob]) -> Result<(), PullError> {
        let limit = self.store.limits().max_unpacked;
        let size = blobs
            .iter()
            .fold(0u64, |sum, blob| sum.saturating_add(blob.size));
        if size <= limit {
            return Ok(());
        }
        Err(PullError::Manifest {
            reference: reference.to_string(),
            source: ManifestError::TooLarge { size, limit },
        })
    }
}

enum Outcome {
    /// The image is here.
    Known(Box<(ImageRecord, ImageHold)>),
    /// It is here, but for most of its chunks.
    Adopted(Box<(ImageRecord, ImageHold)>),
    /// Its blobs are.
    Fetched(Blobs, InUse),
}

/// Asks one host after the other for the image's manifest. That host is asked first for the blobs, too.
pub(super) async fn resolve(
    mut sessions: Vec<Arc<Session>>,
    reference: &Reference,
    options: &PullOptions,
    meter: &Meter,
) -> Result<(Vec<Arc<Session>>, Fetched, Image), PullError> {
    let mut at = 0;
    loop {
        let found = resolve_at(&sessions[at], reference, options, meter).await;
        at += 1;
        match found {
            Ok((fetched, image)) => {
                sessions.rotate_left(at - 1);
                return Ok((sessions, fetched, image));
            }
            Err(error) if at == sessions.len() => return Err(error),
            Err(error) => meter.note(format!("{}; asking the next", chain(&error))),
        }
    }
}

async fn resolve_at(
    session: &Session,
    reference: &Reference,
    options: &PullOptions,
    meter: &Meter,
) -> Result<(Fetched, Image), PullError> {
    let failed = |source| PullError::Fetch {
        reference: reference.to_string(),
        source,
    };
    let unfit = |source| PullError::Manifest {
        reference: reference.to_string(),
        source,
    };
    let read = |fetched: &Fetched| {
        let content_type = fetched.content_type.as_deref();
        manifest::read(&fetched.bytes, content_type, &options.platform).map_err(unfit)
    };
    let first = fetch::manifest(session, &reference.wanted(), meter)
        .await
        .map_err(failed)?;
    let chosen = match read(&first)? {
        Found::Image(image) => return Ok((first, image)),
        Found::Choice(blob) => blob,
    };
    let second = fetch::manifest(session, &chosen.digest.to_string(), meter)
        .await
        .map_err(failed)?;
    match read(&second)? {
        Found::Image(image) => Ok((second, image)),
        Found::Choice(_) => Err(unfit(ManifestError::Nested)),
    }
}

impl PullError {
    /// What the registry failed with, if it is that.
    pub fn request(&self) -> Option<&RequestError> {
        let (Self::Fetch { source, .. }
        | Self::Chunks {
            source: OpenError::Fetch(source),
            ..
        }) = self
        else {
            return None;
        };
        match source {
            FetchError::Request(error) => Some(error),
            FetchError::Incomplete { source, .. } => Some(source),
            FetchError::OtherManifest { .. } | FetchError::Content(_) | FetchError::Task(_) => None,
        }
    }
}
