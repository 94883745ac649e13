//! `pull --lazy`: an image that is used while its chunks still come.

use super::chunks::{RemoteChunks, find};
use super::endpoint;
use super::progress::Meter;
use super::pull::{self, PullError, PullOptions, Registries};
use super::reference::Reference;
use super::session::Access;
use super::setup;

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
}
