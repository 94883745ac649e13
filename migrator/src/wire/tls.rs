//! TLS 1.3 with certificates on both sides, and errors that say what to do.
//!
//! A node's certificate carries the DNS name `<node>.migrator`, is signed by the cluster's CA, and is good for both ends
//! of a connection (extended key usage `serverAuth` and `clientAuth`, or none).

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::verify_server_name;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{AlertDescription, CertificateError, ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// What follows a node's name in its certificate's DNS name.
pub const DOMAIN: &str = "migrator";

/// The DNS name in the certificate of the node `node`.
pub fn dns_name(node: &str) -> String {
    format!("{node}.{DOMAIN}")
}

/// A file that does not give a working TLS configuration.
#[derive(Debug, thiserror::Error)]
pub enum TlsLoadError {
    /// The file cannot be read or holds no PEM of the kind.
    #[error("{} holds no readable {what} in PEM form: check the path and the file", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
        /// The cause.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// A CA certificate that cannot be a trust anchor.
    #[error("{} holds a certificate that cannot serve as CA: make it again with CA:TRUE", path.display())]
    Ca {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: rustls::Error,
    },
    /// No certificate in the file.
    #[error("{} holds no certificate", .0.display())]
    Empty(PathBuf),
    /// Certificate and key do not go together.
    #[error("{} and {} do not go together, or are of a kind that is not supported (use ECDSA P-256, Ed25519 or RSA)", cert.display(), key.display())]
    Pair {
        /// The certificate.
        cert: PathBuf,
        /// The key.
        key: PathBuf,
        /// The cause.
        #[source]
        source: rustls::Error,
    },
    /// The CA file gives no verifier.
    #[error("no peer can be verified with {}", path.display())]
    Verifier {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: rustls::server::VerifierBuilderError,
    },
}

/// This node's identity and the CA it trusts. Cheap to clone.
#[derive(Clone)]
pub struct TlsConfig {
    pub(crate) connector: TlsConnector,
    pub(crate) acceptor: TlsAcceptor,
}

impl std::fmt::Debug for TlsConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TlsConfig")
    }
}

impl TlsConfig {
    /// Reads the node's certificate chain, its private key and the CA, all PEM.
    ///
    /// # Errors
    ///
    /// See [`TlsLoadError`]; each names the file.
    pub fn load(cert: &Path, key: &Path, ca: &Path) -> Result<Self, TlsLoadError> {
        let chain = certificates(cert)?;
        let mut roots = RootCertStore::empty();
        for root in certificates(ca)? {
            roots.add(root).map_err(|source| TlsLoadError::Ca {
                path: ca.to_owned(),
                source,
            })?;
        }
        let roots = Arc::new(roots);
        let private = PrivateKeyDer::from_pem_file(key).map_err(|source| TlsLoadError::Pem {
            path: key.to_owned(),
            what: "private key",
            source,
        })?;
        let pair = |source| TlsLoadError::Pair {
            cert: cert.to_owned(),
            key: key.to_owned(),
            source,
        };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
                .build()
                .map_err(|source| TlsLoadError::Verifier {
                    path: ca.to_owned(),
                    source,
                })?;
        let tls13: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];
        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(tls13)
            .map_err(pair)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain.clone(), private.clone_key())
            .map_err(pair)?;
        client.resumption = rustls::client::Resumption::disabled();
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(tls13)
            .map_err(pair)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, private)
            .map_err(pair)?;
        // Nothing is resumed, and a ticket would be the one thing a server sends unasked.
        server.send_tls13_tickets = 0;
        Ok(Self {
            connector: TlsConnector::from(Arc::new(client)),
            acceptor: TlsAcceptor::from(Arc::new(server)),
        })
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsLoadError> {
    let pem = |source| TlsLoadError::Pem {
        path: path.to_owned(),
        what: "certificate",
        source,
    };
    let chain: Vec<_> = CertificateDer::pem_file_iter(path)
        .map_err(pem)?
        .collect::<Result<_, _>>()
        .map_err(pem)?;
    if chain.is_empty() {
        return Err(TlsLoadError::Empty(path.to_owned()));
    }
    Ok(chain)
}

/// The one of `peers` that the certificate is made out to.
pub(crate) fn name_of(certificate: &CertificateDer<'_>, peers: &[String]) -> Option<String> {
    let parsed = ParsedCertificate::try_from(certificate).ok()?;
    let matches = |peer: &&String| {
        ServerName::try_from(dns_name(peer))
            .is_ok_and(|name| verify_server_name(&parsed, &name).is_ok())
    };
    peers.iter().find(matches).cloned()
}

/// What a failed handshake means, and what to do, in the words of the side that sees `error`; `None` when it is not TLS's doing.
pub(crate) fn explain(error: &io::Error, peer: &str) -> Option<String> {
    let tls = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    let theirs = match tls {
        rustls::Error::InvalidCertificate(why) => match why {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "has expired: renew it (and check both clocks)".to_owned()
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "is not valid yet: check both clocks".to_owned()
            }
            // A CA that was made anew under its old name shows as a bad signature.
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                "is not signed by this node's CA: both nodes need certificates of the same CA".to_owned()
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                format!("is not made out to `{}`: check the peer's name and address, or issue its certificate for that DNS name", dns_name(peer))
            }
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
                "is not meant for this use: its extended key usage must have both serverAuth and clientAuth".to_owned()
            }
            CertificateError::Revoked => "has been revoked: issue a new one".to_owned(),
            other => format!("was refused ({other}): issue a new one"),
        },
        rustls::Error::NoCertificatesPresented => {
            return Some(format!("{peer} presented no certificate: every node needs one of the cluster's CA"));
        }
        rustls::Error::AlertReceived(alert) => return Some(explain_alert(*alert, peer)),
        rustls::Error::PeerIncompatible(why) => {
            return Some(format!("{peer} does not speak TLS 1.3 as this node does ({why:?}): is it a migrator node?"));
        }
        rustls::Error::InvalidMessage(_) => {
            return Some(format!("{peer} does not speak TLS: check the address and port"));
        }
        other => return Some(format!("TLS with {peer} failed: {other}")),
    };
    Some(format!("the certificate of {peer} {theirs}"))
}

fn explain_alert(alert: AlertDescription, peer: &str) -> String {
    let ours = match alert {
        AlertDescription::CertificateRequired | AlertDescription::NoCertificate => {
            "wants a certificate and this node presented none: configure tls.cert and tls.key"
        }
        AlertDescription::UnknownCA | AlertDescription::DecryptError => {
            "does not trust the CA of this node's certificate: both nodes need certificates of the same CA"
        }
        AlertDescription::CertificateExpired => {
            "says that this node's certificate has expired: renew it (and check both clocks)"
        }
        AlertDescription::CertificateRevoked => {
            "says that this node's certificate has been revoked: issue a new one"
        }
        AlertDescription::BadCertificate
        | AlertDescription::CertificateUnknown
        | AlertDescription::UnsupportedCertificate => {
            "does not accept this node's certificate: issue one with serverAuth and clientAuth, signed by the cluster's CA"
        }
        AlertDescription::ProtocolVersion | AlertDescription::HandshakeFailure => {
            "does not speak TLS 1.3 as this node does: is it a migrator node?"
        }
        other => return format!("{peer} ended the TLS handshake: {other:?}"),
    };
    format!("{peer} {ours}")
}
