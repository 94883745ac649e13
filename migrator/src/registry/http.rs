//! The HTTP client: which certificates it trusts, where it lets itself be led, how long it waits.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::{Client, redirect};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::failure::NoHost;
use super::session::Access;

/// How long a registry may take to accept a connection.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// How long nothing may come of an answer that was begun.
const SILENCE: Duration = Duration::from_secs(30);

/// Redirects that are followed: registries hand blobs out of other stores.
const MAX_REDIRECTS: usize = 5;

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ClientSetupError {
    /// The authority's file.
    #[error("cannot read the certificates in {}", path.display())]
    Ca {
        /// The file.
        path: PathBuf,
        /// Why.
        source: rustls::pki_types::pem::Error,
    },
    /// A file without certificates.
    #[error("there is no certificate in {}: it must be PEM", .0.display())]
    NoCa(PathBuf),
    /// A certificate that is none.
    #[error("a certificate in {} cannot be used", path.display())]
    BadCa {
        /// The file.
        path: PathBuf,
        /// Why.
        source: rustls::Error,
    },
    /// TLS.
    #[error("cannot set up TLS")]
    Tls(#[from] rustls::Error),
    /// The client.
    #[error("cannot set up the HTTP client")]
    Http(#[from] reqwest::Error),
}

/// Makes a client that trusts the machine's authorities and those in `ca`. Blocks on the disk.
///
/// One for pushes waits for the end of its own sending, which the client would count as silence: there the push looks after it.
pub(super) fn client(ca: Option<&Path>, access: Access) -> Result<Client, ClientSetupError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots(ca)?)
        .with_no_client_auth();
    let builder = match access {
        Access::Pull => Client::builder().read_timeout(SILENCE),
        Access::Push => Client::builder(),
    };
    Ok(builder
        .tls_backend_preconfigured(tls)
        .user_agent(concat!("migrator/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_WITHIN)
        .redirect(redirect::Policy::custom(follow))
        .dns_resolver(Arc::new(Resolver))
        .build()?)
}

fn roots(ca: Option<&Path>) -> Result<rustls::RootCertStore, ClientSetupError> {
    let mut roots = rustls::RootCertStore::empty();
    // A machine without authorities, or with one that is damaged, still has those that it is told.
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::debug!(%error, "an authority of this machine is left out");
    }
    roots.add_parsable_certificates(found.certs);
    let Some(path) = ca else {
        return Ok(roots);
    };
    let own = || path.to_owned();
    let mut any = false;
    let failed = |source| ClientSetupError::Ca {
        path: own(),
        source,
    };
    for certificate in CertificateDer::pem_file_iter(path).map_err(failed)? {
        let certificate = certificate.map_err(failed)?;
        roots
            .add(certificate)
            .map_err(|source| ClientSetupError::BadCa {
                path: own(),
                source,
            })?;
        any = true;
    }
    if any {
        Ok(roots)
    } else {
        Err(ClientSetupError::NoCa(own()))
    }
}

/// Follows a few redirects, and none that leaves TLS. To another host the client sends no credentials.
fn follow(attempt: redirect::Attempt<'_>) -> redirect::Action {
    let left_tls = attempt.url().scheme() != "https"
        && attempt.previous().iter().any(|url| url.scheme() == "https");
    if left_tls {
        attempt.error("the registry leads from https to http")
    } else if attempt.previous().len() > MAX_REDIRECTS {
        attempt.error("the registry leads on and on")
    } else {
        attempt.follow()
    }
}

/// The system's resolver, with an error of its own type: a name that is not known gets another message than a host
/// that does not answer.
struct Resolver;

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let host = name.as_str();
            let found = tokio::net::lookup_host((host, 0)).await;
            let found: Vec<SocketAddr> = found
                .map_err(|source| NoHost {
                    host: host.to_owned(),
                    source,
                })?
                .collect();
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}
