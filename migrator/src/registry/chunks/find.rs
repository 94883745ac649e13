//! Finds the chunks of an image: what refers to its manifest, of that the artifact, of that the index.

use std::sync::Arc;

use reqwest::header::ACCEPT;
use reqwest::{Method, StatusCode};

use super::artifact::{self, ARTIFACT, Artifact, BadArtifact, OCI_INDEX};
use super::index::{BadIndex, ChunkIndex};
use super::remote::RemoteChunks;
use crate::api::error::chain;
use crate::image::Digest;
use crate::image::manifest::Blob;
use crate::image::oci::MAX_JSON;
use crate::registry::failure::RequestError;
use crate::registry::fetch::{self, FetchError};
use crate::registry::progress::Meter;
use crate::registry::session::Session;

/// Artifacts of one image that are tried.
const TRIED: usize = 4;

/// Why the chunks of an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The registry.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// What refers to the image.
    #[error(transparent)]
    Artifact(#[from] BadArtifact),
    /// The index.
    #[error("the index of its chunks in {host} cannot be used")]
    Index {
        /// The registry.
        host: String,
        /// Why.
        source: BadIndex,
    },
}

impl From<RequestError> for OpenError {
    fn from(error: RequestError) -> Self {
        Self::Fetch(error.into())
    }
}

/// The chunks of the image with the manifest `subject`, from the first host that has them; `None` if none has. The record gets the
/// name `name`.
///
/// # Errors
/// What there is cannot be used, or no host can be asked.
pub(in crate::registry) async fn find(
    sessions: &[Arc<Session>],
    subject: Digest,
    name: &str,
    meter: &Meter,
) -> Result<Option<RemoteChunks>, OpenError> {
    let mut last = None;
    for at in 0..sessions.len() {
        match of_host(sessions, at, subject, name, meter).await {
            Ok(Some(found)) => return Ok(Some(found)),
            Ok(None) => {}
            Err(error) => {
                if sessions.len() > 1 {
                    meter.note(chain(&error));
                }
                last = Some(error);
            }
        }
    }
    last.map_or(Ok(None), Err)
}

async fn of_host(
    sessions: &[Arc<Session>],
    at: usize,
    subject: Digest,
    name: &str,
    meter: &Meter,
) -> Result<Option<RemoteChunks>, OpenError> {
    let mut last = None;
    for digest in candidates(&sessions[at], subject, meter)
        .await?
        .into_iter()
        .take(TRIED)
    {
        match open(sessions, at, digest, subject, name, meter).await {
            Ok(found) => return Ok(Some(found)),
            Err(error) => last = Some(error),
        }
    }
    last.map_or(Ok(None), Err)
}

/// Opens the artifact with the manifest `digest`, asking host `at` first.
///
/// # Errors
/// It cannot be fetched, or is not what it must be.
pub(in crate::registry) async fn open(
    sessions: &[Arc<Session>],
    at: usize,
    digest: Digest,
    subject: Digest,
    name: &str,
    meter: &Meter,
) -> Result<RemoteChunks, OpenError> {
    let mut order = sessions.to_vec();
    order.rotate_left(at);
    let mut last = None;
    for session in &order {
        let opened =
            async {
                let manifest = fetch::manifest(session, &digest.to_string(), meter).await?;
                let artifact = Artifact::read(&manifest.bytes, subject)?;
                let bytes = fetch::small(session, artifact.index, meter).await?;
                let packs: Vec<u64> = artifact.packs.iter().map(|pack| pack.size).collect();
                let decoded = tokio::task::spawn_blocking({
                    let name = name.to_owned();
                    move || ChunkIndex::decode(&bytes, subject, &name, &packs)
                });
                let index = decoded.await.map_err(FetchError::Task)?.map_err(|source| {
                    OpenError::Index {
                        host: session.host().to_owned(),
                        source,
                    }
                })?;
                Ok((index, artifact))
            };
        match opened.await {
            Ok((index, artifact)) => {
                return Ok(RemoteChunks::new(digest, index, artifact.packs, order));
            }
            Err(error) => last = Some(error),
        }
    }
    // There is always a host: the registry itself.
    Err(last.unwrap_or_else(|| BadArtifact::Layers(0).into()))
}

/// Manifests of chunks that refer to `subject`.
async fn candidates(
    session: &Session,
    subject: Digest,
    meter: &Meter,
) -> Result<Vec<Digest>, OpenError> {
    Ok(match referrers(session, subject).await? {
        Some(list) => artifact::chunk_manifests(&list)?,
        None => match tagged(session, subject, meter).await? {
            Some(list) => artifact::chunk_manifests(&list)?,
            None => Vec::new(),
        },
    })
}

/// What the registry lists by its referrers API; `None` if it has none.
pub(super) async fn referrers(
    session: &Session,
    subject: Digest,
) -> Result<Option<Vec<u8>>, RequestError> {
    let mut url = session.url(&format!("referrers/{subject}"))?;
    url.query_pairs_mut().append_pair("artifactType", ARTIFACT);
    let what = format!("list of what refers to {subject}");
    let response = session
        .send(Method::GET, &url, &what, |r| r.header(ACCEPT, OCI_INDEX))
        .await?;
    match response.status() {
        // A registry that does not know the API says 404 by the specification, and others of these in practice. That it has it shows in
        // an index, also where there is no referrer.
        StatusCode::NOT_FOUND
        | StatusCode::METHOD_NOT_ALLOWED
        | StatusCode::BAD_REQUEST
        | StatusCode::NOT_IMPLEMENTED => return Ok(None),
        _ => {}
    }
    let response = session.check(response, &what).await?;
    session
        .body(response, MAX_JSON as usize, "a list of referrers")
        .await
        .map(Some)
}

/// What is under the tag that stands for the API where that is missing.
pub(super) async fn tagged(
    session: &Session,
    subject: Digest,
    meter: &Meter,
) -> Result<Option<Vec<u8>>, FetchError> {
    match fetch::manifest(session, &artifact::referrers_tag(subject), meter).await {
        Ok(found) => Ok(Some(found.bytes)),
        Err(FetchError::Request(RequestError::Missing { .. })) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The size of a manifest that the registry has; `None` if it has it not.
pub(in crate::registry) async fn manifest_there(
    session: &Session,
    digest: Digest,
    meter: &Meter,
) -> Result<Option<(Blob, String)>, FetchError> {
    match fetch::manifest(session, &digest.to_string(), meter).await {
        Ok(found) => {
            let kind = crate::image::manifest::own_type(&found.bytes).unwrap_or_default();
            Ok(Some((
                Blob {
                    digest,
                    size: found.bytes.len() as u64,
                },
                kind,
            )))
        }
        Err(FetchError::Request(RequestError::Missing { .. })) => Ok(None),
        Err(error) => Err(error),
    }
}
