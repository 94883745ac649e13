//! Bytes over TLS and nothing else: what rustls itself does with the same certificates, versions and suites.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::{Args, connect, listening, settle};

/// One write, as large as a full frame of pages; and one read.
const WRITE: usize = 1 << 20;
const READ: usize = 256 << 10;

pub(super) async fn send(args: &Args, side: TcpStream) -> Result<(u64, Duration)> {
    let connector = TlsConnector::from(Arc::new(client(args)?));
    let mut streams = Vec::new();
    for _ in 0..args.connections {
        let tcp = connect(args.address).await?;
        let name = ServerName::try_from("b.migrator")?;
        streams.push(connector.connect(name, tcp).await?);
    }
    let (begun, seconds) = (Instant::now(), args.seconds);
    let mut tasks = JoinSet::new();
    for mut stream in streams {
        tasks.spawn(async move {
            let (buffer, mut sent) = (vec![0x5a; WRITE], 0);
            while begun.elapsed().as_secs_f64() < seconds {
                stream.write_all(&buffer).await?;
                sent += WRITE as u64;
            }
            stream.shutdown().await?;
            std::io::Result::Ok(sent)
        });
    }
    let mut bytes = 0;
    while let Some(sent) = tasks.join_next().await {
        bytes += sent??;
    }
    settle(side, bytes).await?;
    Ok((bytes, begun.elapsed()))
}

pub(super) async fn listen(args: &Args, side: SocketAddr) -> Result<()> {
    let acceptor = TlsAcceptor::from(Arc::new(server(args)?));
    let listener = TcpListener::bind(args.address).await?;
    let side = listening(side).await?;
    let (mut side, mut tasks) = (side.accept().await?.0, JoinSet::new());
    for _ in 0..args.connections {
        let (tcp, _) = listener.accept().await?;
        let acceptor = acceptor.clone();
        tasks.spawn(async move {
            let mut stream = acceptor.accept(tcp).await?;
            let (mut buffer, mut came) = (vec![0; READ], 0);
            loop {
                match stream.read(&mut buffer).await? {
                    0 => return std::io::Result::Ok(came),
                    length => came += length as u64,
                }
            }
        });
    }
    let mut bytes = 0;
    while let Some(came) = tasks.join_next().await {
        bytes += came??;
    }
    let sent = side.read_u64_le().await?;
    anyhow::ensure!(bytes == sent, "{bytes} bytes of {sent} have come");
    side.write_all(&[1]).await?;
    Ok(())
}

type Identity = (
    Vec<CertificateDer<'static>>,
    PrivateKeyDer<'static>,
    Arc<RootCertStore>,
);

fn identity(args: &Args) -> Result<Identity> {
    let chain = CertificateDer::pem_file_iter(args.certificates.join("cert.pem"))?
        .collect::<Result<_, _>>()?;
    let key = PrivateKeyDer::from_pem_file(args.certificates.join("key.pem"))?;
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_file_iter(args.certificates.join("ca.pem"))? {
        roots.add(root?)?;
    }
    Ok((chain, key, Arc::new(roots)))
}

fn client(args: &Args) -> Result<ClientConfig> {
    let (chain, key, roots) = identity(args)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    Ok(ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)?)
}

fn server(args: &Args) -> Result<ServerConfig> {
    let (chain, key, roots) = identity(args)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
        .build()
        .context("the authority verifies nobody")?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    // Nobody reads a ticket, and a socket that is closed with unread bytes resets the connection.
    config.send_tls13_tickets = 0;
    Ok(config)
}
