//! Registries as a source of chunks: for each image the artifact that it was pulled by, or, where that is not known, the one that the
//! image's name leads to.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::OnceCell;

use super::chunks::{ChunkError, OpenError, RemoteChunks, find};
use super::endpoint;
use super::failure::RequestError;
use super::fetch::FetchError;
use super::lazy::Origin;
use super::progress::Meter;
use super::reference::{DOCKER_HUB, Reference};
use super::session::Access;
use super::setup::{self, SetupError};
use crate::api::error::chain;
use crate::config;
use crate::image::{Digest, ImageRecord, ImageStore};
use crate::supply::{ChunkSource, SourceError, Wanted};

/// How long an image is not looked for again of which no registry has chunks.
const NOT_THERE: Duration = Duration::from_secs(60);

/// The registries that images of this node came from.
#[derive(Debug)]
pub struct RegistrySource {
    config: config::Registries,
    store: Arc<ImageStore>,
    images: Mutex<HashMap<Digest, Arc<Found>>>,
    /// What is asked for the chunks of an image, for people.
    addresses: Mutex<HashMap<Digest, String>>,
}

/// What became of looking for the chunks of an image.
#[derive(Debug)]
struct Found {
    remote: OnceCell<Option<Arc<RemoteChunks>>>,
    since: Instant,
}

/// Why an image's chunks are not found.
#[derive(Debug, thiserror::Error)]
enum LookError {
    #[error(transparent)]
    Setup(#[from] SetupError),
    #[error(transparent)]
    Open(#[from] OpenError),
}

impl RegistrySource {
    pub(super) fn new(config: config::Registries, store: Arc<ImageStore>) -> Self {
        Self {
            config,
            store,
            images: Mutex::default(),
            addresses: Mutex::default(),
        }
    }

    /// The chunks of an image were found.
    pub(super) fn opened(&self, remote: Arc<RemoteChunks>) {
        let digest = remote.record().erofs_digest;
        let found = Found {
            remote: OnceCell::new_with(Some(Some(remote))),
            since: Instant::now(),
        };
        let mut images = self.images();
        images.retain(|image, _| self.store.record(image).is_ok());
        images.insert(digest, Arc::new(found));
        drop(images);
        // It may have been pulled from elsewhere before.
        let mut addresses = self.addresses();
        addresses.retain(|image, _| self.store.record(image).is_ok());
        addresses.remove(&digest);
    }

    fn addresses(&self) -> MutexGuard<'_, HashMap<Digest, String>> {
        // As below.
        self.addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Where an image was pulled from; `None`: what its name says.
    async fn origin(&self, image: Digest) -> Result<Option<Origin>, LookError> {
        let store = Arc::clone(&self.store);
        let read = tokio::task::spawn_blocking(move || store.origin::<Origin>(&image)).await;
        Ok(read.map_err(|error| OpenError::Fetch(FetchError::Task(error)))?)
    }

    async fn find_address(&self, record: &ImageRecord) -> String {
        let image = record.erofs_digest;
        if let Some(address) = self.addresses().get(&image) {
            return address.clone();
        }
        let origin = self.origin(image).await.ok().flatten();
        let name = origin.map_or_else(|| record.name.clone(), |origin| origin.reference);
        let address = match name.parse::<Reference>() {
            Ok(reference) => format!(
                "registry {}/{}",
                reference.registry(),
                reference.repository()
            ),
            Err(_) => format!("registry of {name}"),
        };
        self.addresses().insert(image, address.clone());
        address
    }

    /// The image's chunks, if they were found.
    fn opened_before(&self, image: &Digest) -> Option<Arc<RemoteChunks>> {
        let found = Arc::clone(self.images().get(image)?);
        found.remote.get().cloned().flatten()
    }

    fn images(&self) -> MutexGuard<'_, HashMap<Digest, Arc<Found>>> {
        // Each change is one call: a panic leaves it whole.
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn of(&self, record: &ImageRecord) -> Result<Option<Arc<RemoteChunks>>, LookError> {
        let found = {
            let mut images = self.images();
            let old = images.get(&record.erofs_digest);
            let over = |found: &Found| {
                matches!(found.remote.get(), Some(None)) && found.since.elapsed() > NOT_THERE
            };
            match old.filter(|found| !over(found)) {
                Some(found) => Arc::clone(found),
                None => {
                    let found = Arc::new(Found {
                        remote: OnceCell::new(),
                        since: Instant::now(),
                    });
                    images.insert(record.erofs_digest, Arc::clone(&found));
                    found
                }
            }
        };
        let looked = found.remote.get_or_try_init(|| self.look(record)).await?;
        Ok(looked.clone())
    }

    async fn look(&self, record: &ImageRecord) -> Result<Option<Arc<RemoteChunks>>, LookError> {
        let origin = self.origin(record.erofs_digest).await?;
        let name = match &origin {
            Some(origin) => &origin.reference,
            None => &record.name,
        };
        let Ok(reference) = name.parse::<Reference>() else {
            return Ok(None);
        };
        // A name without a host says nothing of where the image came from.
        if origin.is_none() && reference.registry() == DOCKER_HUB {
            return Ok(None);
        }
        let plain_http = origin.as_ref().is_some_and(|origin| origin.plain_http);
        let auth_file = origin
            .as_ref()
            .and_then(|origin| origin.auth_file.as_deref());
        let endpoints = endpoint::endpoints(&self.config, &reference, plain_http);
        let sessions =
            setup::sessions(&self.config, endpoints, &reference, auth_file, Access::Pull).await?;
        let (meter, _progress) = Meter::new();
        let manifest = record.manifest_digest;
        if let Some(origin) = &origin {
            let opened = find::open(
                &sessions,
                0,
                origin.artifact,
                manifest,
                &record.name,
                &meter,
            );
            match opened.await {
                Ok(remote) => return Ok(Some(Arc::new(remote))),
                // The chunks may have been pushed again.
                Err(OpenError::Fetch(FetchError::Request(RequestError::Missing { .. }))) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let found = find::find(&sessions, manifest, &record.name, &meter).await?;
        Ok(found.map(Arc::new))
    }

    /// After an error that a new look at files and registry may do away with.
    fn forget(&self, image: &Digest, error: &ChunkError) {
        let stale = match error {
            ChunkError::Request { source, .. } => matches!(
                source,
                RequestError::Unauthorized { .. }
                    | RequestError::Forbidden { .. }
                    | RequestError::Missing { .. }
            ),
            ChunkError::Damaged { .. } | ChunkError::Unknown(_) | ChunkError::Ended(_) => false,
        };
        if stale {
            self.images().remove(image);
        }
    }

    async fn get(&self, wanted: &Wanted, urgent: bool) -> Result<Option<Bytes>, SourceError> {
        let remote = self.of(&wanted.record).await;
        let remote = remote.map_err(|error| SourceError(chain(&error)))?;
        let (Some(remote), digest) = (remote, wanted.digest()) else {
            return Ok(None);
        };
        if !remote.has(&digest) {
            // Zeros are not stored; whether it is that is checked as for any other chunk.
            let zeros = remote.record().chunks.contains(&digest);
            return Ok(zeros.then(|| Bytes::from(vec![0; wanted.len()])));
        }
        match remote.chunk(&digest, urgent).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) => {
                self.forget(&wanted.record.erofs_digest, &error);
                Err(SourceError(chain(&*error)))
            }
        }
    }
}

impl ChunkSource for RegistrySource {
    fn address<'a>(&'a self, wanted: &'a Wanted) -> BoxFuture<'a, String> {
        self.find_address(&wanted.record).boxed()
    }

    fn fetch<'a>(
        &'a self,
        wanted: &'a Wanted,
        urgent: bool,
    ) -> BoxFuture<'a, Result<Option<Bytes>, SourceError>> {
        self.get(wanted, urgent).boxed()
    }

    fn hurry(&self, wanted: &Wanted) {
        if let Some(remote) = self.opened_before(&wanted.record.erofs_digest) {
            remote.hurry(&wanted.digest());
        }
    }
}
