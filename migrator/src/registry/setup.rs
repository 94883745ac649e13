//! What a transfer needs before its first request: an HTTP client, and credentials.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::credentials::{AuthFile, BadCredentials, Credentials};
use super::endpoint::Endpoint;
use super::http::{self, ClientSetupError};
use super::reference::Reference;
use super::session::{Access, Session};
use crate::config;

/// Longest credentials file that is read, in bytes.
const MAX_AUTH_FILE: u64 = 1 << 20;

/// Why nothing is asked for.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The credentials file.
    #[error("cannot read the credentials file {}", path.display())]
    ReadCredentials {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The credentials file.
    #[error("the credentials file {} cannot be used", path.display())]
    Credentials {
        /// The file.
        path: PathBuf,
        /// Why.
        source: BadCredentials,
    },
    /// The HTTP client.
    #[error(transparent)]
    Client(#[from] ClientSetupError),
    /// A thread of ours.
    #[error("a task ended too early")]
    Task(#[from] tokio::task::JoinError),
}

/// A session for each host, with the credentials that there are for it.
pub(super) async fn sessions(
    config: &config::Registries,
    endpoints: Vec<Endpoint>,
    reference: &Reference,
    auth_file: Option<&Path>,
    access: Access,
) -> Result<Vec<Arc<Session>>, SetupError> {
    let path = auth_file.or(config.auth_file.as_deref());
    let (ca, path) = (config.ca.clone(), path.map(Path::to_owned));
    let read = move || {
        let client = http::client(ca.as_deref(), access)?;
        let file = match path {
            Some(path) => Some((read_auth_file(&path)?, path)),
            None => None,
        };
        Ok::<_, SetupError>((client, file))
    };
    let (client, file) = tokio::task::spawn_blocking(read).await??;
    let session = |endpoint: Endpoint| {
        let repository = reference.repository();
        let credentials = match &file {
            None => Credentials::Anonymous,
            Some((file, path)) => {
                let found = file.find(&endpoint.name, repository);
                found.map_err(|source| SetupError::Credentials {
                    path: path.clone(),
                    source,
                })?
            }
        };
        let client = client.clone();
        let session = Session::new(client, endpoint, repository, access, credentials);
        Ok(Arc::new(session))
    };
    endpoints.into_iter().map(session).collect()
}

fn read_auth_file(path: &Path) -> Result<AuthFile, SetupError> {
    let mut text = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_AUTH_FILE).read_to_end(&mut text))
        .map_err(|source| SetupError::ReadCredentials {
            path: path.to_owned(),
            source,
        })?;
    AuthFile::parse(&text).map_err(|source| SetupError::Credentials {
        path: path.to_owned(),
        source,
    })
}
