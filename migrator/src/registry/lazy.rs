//! `pull --lazy`: an image that is used while its chunks still come.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::chunks::{RemoteChunks, find};
use super::endpoint;
use super::progress::Meter;
use super::pull::{self, PullError, PullOptions, Registries};
use super::reference::Reference;
use super::session::{Access, Session};
use super::setup;
use crate::api::error::chain;
use crate::image::{Digest, ImageHold, ImageRecord, ImageStore, StoreError};

/// Where an image's chunks are, as it is kept beside the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Origin {
    /// As it was pulled.
    pub(super) reference: String,
    /// The manifest of its chunks.
    pub(super) artifact: Digest,
    pub(super) plain_http: bool,
    /// Credentials that were named for the pull.
    pub(super) auth_file: Option<PathBuf>,
}

impl Registries {
    /// The chunks of the image that a reference stands for; `None` if no host has them.
    ///
    /// # Errors
    /// There is no such image, or its chunks cannot be used.
    pub async fn chunks(
        &self,
        reference: &Reference,
        options: &PullOptions,
        meter: &Meter,
    ) -> Result<Option<RemoteChunks>, PullError> {
        let endpoints = endpoint::endpoints(&self.config, reference, options.plain_http);
        let auth_file = options.auth_file.as_deref();
        let sessions =
            setup::sessions(&self.config, endpoints, reference, auth_file, Access::Pull).await?;
        let (sessions, fetched, _) = pull::resolve(sessions, reference, options, meter).await?;
        let name = reference.store_name()?;
        let found = find::find(&sessions, fetched.digest, &name, meter).await;
        found.map_err(|source| PullError::Chunks {
            reference: reference.to_string(),
            source,
        })
    }

    /// Makes the image with the manifest `manifest` one of the store's, without most of its chunks; `None` if that cannot be done, which was
    /// told then: it is to be pulled whole.
    pub(super) async fn lazily(
        &self,
        sessions: &[Arc<Session>],
        manifest: Digest,
        reference: &Reference,
        options: &PullOptions,
        name: &str,
        meter: &Meter,
    ) -> Result<Option<(ImageRecord, ImageHold)>, PullError> {
        let whole = |why: String| {
            meter.note(format!("all of `{reference}` is pulled: {why}"));
            Ok(None)
        };
        let remote = match find::find(sessions, manifest, name, meter).await {
            Ok(Some(remote)) => Arc::new(remote),
            Ok(None) => {
                return whole(
                    "its chunks are not in the registry (`image push --chunks` puts them there)"
                        .to_owned(),
                );
            }
            Err(error) => return whole(chain(&error)),
        };
        // The first chunk has the file system's own description, so that it is always needed; and it shows whether the registry gives parts.
        let first = match remote.record().chunks.first() {
            Some(digest) if remote.has(digest) => match remote.chunk(digest, true).await {
                Ok(bytes) => Some(bytes),
                Err(error) => return whole(chain(&*error)),
            },
            Some(_) | None => None,
        };
        let origin = Origin {
            reference: reference.to_string(),
            artifact: remote.artifact(),
            plain_http: options.plain_http,
            auth_file: options.auth_file.clone(),
        };
        let (store, found, name) = (
            Arc::clone(&self.store),
            Arc::clone(&remote),
            name.to_owned(),
        );
        let adopt = move || adopt(&store, &found, first, &origin, &name);
        let adopted = tokio::task::spawn_blocking(adopt).await??;
        meter.transferred(remote.transferred());
        self.source.opened(remote);
        Ok(Some(adopted))
    }
}

/// Makes the image one of the store's, and keeps what is known of it: its origin, the order of its use, and the chunks that are here.
fn adopt(
    store: &ImageStore,
    remote: &RemoteChunks,
    first: Option<Bytes>,
    origin: &Origin,
    name: &str,
) -> Result<(ImageRecord, ImageHold), StoreError> {
    let (record, hold) = store.adopt(remote.record().clone())?;
    store.set_origin(&record, origin)?;
    let order = store.order(&record.erofs_digest)?;
    order.add(remote.index().first_uses(), record.chunks.len());
    // What cannot be kept now is fetched when it is read.
    if let Some(first) = first {
        drop(store.chunks().supply(&record, 0, &first));
    }
    for index in remote.zeros() {
        let zeros = Bytes::from(vec![0; record.chunk_len(index)]);
        drop(store.chunks().supply(&record, index, &zeros));
    }
    drop(hold);
    store.add_name(&record, name)
}
