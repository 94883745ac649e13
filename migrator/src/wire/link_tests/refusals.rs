//! Sessions that do not come about, and what the dialer is told.

use super::*;
use crate::wire::SessionId;
use crate::wire::preamble::{Preamble, REPLY_LEN, Reply, Role};

fn expired(params: &mut CertificateParams) {
    params.not_before = date_time_ymd(2001, 1, 1);
    params.not_after = date_time_ymd(2002, 1, 1);
}

async fn dial_error(server: TlsConfig, client: TlsConfig, name: &str) -> String {
    let listener = listen(server, Limits::default()).await;
    let error = dial(listener.local_addr(), &client, name, 2, LIMIT)
        .await
        .unwrap_err();
    error.to_string()
}

#[tokio::test]
async fn an_expired_certificate_is_named_on_either_side() {
    let ca = Authority::new();
    let error = dial_error(ca.node_with("b", expired), ca.node("a"), "b").await;
    assert!(error.contains("certificate of b has expired"), "{error}");
    let error = dial_error(ca.node("b"), ca.node_with("a", expired), "b").await;
    assert!(
        error.contains("this node's certificate has expired"),
        "{error}"
    );
}

#[tokio::test]
async fn an_unknown_ca_is_named_on_either_side() {
    let (ca, other) = (Authority::new(), Authority::new());
    let error = dial_error(other.node("b"), ca.node("a"), "b").await;
    assert!(error.contains("not signed by this node's CA"), "{error}");

    // A node that trusts the listener but has its own certificate from elsewhere.
    let (cert, key) = other.issue("a", |_| {});
    let stranger = TlsConfig::load(&cert, &key, &ca.ca_file()).unwrap();
    let error = dial_error(ca.node("b"), stranger, "b").await;
    assert!(error.contains("does not trust the CA"), "{error}");
}

#[tokio::test]
async fn a_wrong_name_is_named() {
    let ca = Authority::new();
    let error = dial_error(ca.node("x"), ca.node("a"), "b").await;
    assert!(error.contains("not made out to `b.migrator`"), "{error}");
    let error = dial_error(ca.node("b"), ca.node("stranger"), "b").await;
    assert!(error.contains("not among its peers"), "{error}");
}

#[tokio::test]
async fn a_client_without_certificate_is_told_so() {
    let ca = Authority::new();
    let listener = listen(ca.node("b"), Limits::default()).await;
    let mut roots = rustls::RootCertStore::empty();
    use rustls::pki_types::pem::PemObject;
    roots
        .add(rustls::pki_types::CertificateDer::from_pem_file(ca.ca_file()).unwrap())
        .unwrap();
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let bare = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut tls = ca.node("a");
    tls.connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(bare));
    let error = dial(listener.local_addr(), &tls, "b", 1, LIMIT)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("presented none"), "{error}");
}

#[tokio::test]
async fn a_peer_that_is_no_node_is_named() {
    let ca = Authority::new();
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = socket.local_addr().unwrap();
    let talk = async {
        let (mut tcp, _) = socket.accept().await.unwrap();
        tcp.write_all(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n")
            .await
            .unwrap();
        let mut sink = Vec::new();
        let _ = tcp.read_to_end(&mut sink).await;
    };
    let tls = ca.node("a");
    let (error, ()) = tokio::join!(dial(addr, &tls, "b", 1, LIMIT), talk);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("does not speak TLS"), "{error}");
}

#[tokio::test]
async fn nobody_there_is_named() {
    let ca = Authority::new();
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = socket.local_addr().unwrap();
    drop(socket);
    let error = dial(addr, &ca.node("a"), "b", 1, LIMIT).await.unwrap_err();
    assert!(matches!(error, DialError::Connect { .. }), "{error}");
}

#[tokio::test]
async fn a_silent_server_meets_the_deadline() {
    let ca = Authority::new();
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = socket.local_addr().unwrap();
    let short = Duration::from_millis(50);
    let error = dial(addr, &ca.node("a"), "b", 1, short).await.unwrap_err();
    assert!(matches!(error, DialError::Deadline { .. }), "{error}");
}

#[tokio::test]
async fn incomplete_sessions_are_bounded_and_time_out() {
    let ca = Authority::new();
    let limits = Limits {
        pending_per_peer: 1,
        session_deadline: Duration::from_millis(100),
        ..Limits::default()
    };
    let listener = listen(ca.node("b"), limits).await;
    let addr = listener.local_addr();
    let tls = ca.node("a");
    let mut held = half_a_session(addr, &tls).await;
    let busy = dial_shape(addr, &tls, "b", Shape::Query, LIMIT).await;
    assert!(
        matches!(
            busy,
            Err(DialError::Turned {
                why: Turned::Busy,
                ..
            })
        ),
        "{busy:?}"
    );
    // Another peer is not held up by this one.
    let other = ca.node("c");
    dial_shape(addr, &other, "b", Shape::Query, LIMIT)
        .await
        .unwrap();
    // The listener closes what stayed incomplete.
    let mut rest = Vec::new();
    tokio::time::timeout(LIMIT, held.read_to_end(&mut rest))
        .await
        .unwrap()
        .ok();
    dial_shape(addr, &tls, "b", Shape::Query, LIMIT)
        .await
        .unwrap();
}

/// The control connection of a migration whose other connections never come.
async fn half_a_session(
    addr: SocketAddr,
    tls: &TlsConfig,
) -> tokio_rustls::client::TlsStream<TcpStream> {
    let tcp = TcpStream::connect(addr).await.unwrap();
    let name = rustls::pki_types::ServerName::try_from(dns_name("b")).unwrap();
    let mut stream = tls.connector.connect(name, tcp).await.unwrap();
    let preamble = Preamble {
        version_min: 1,
        version_max: 1,
        role: Role::Control,
        shape: Shape::Migration { data: 1 },
        session: SessionId::random(),
    };
    stream.write_all(&preamble.encode()).await.unwrap();
    let mut reply = [0; REPLY_LEN];
    stream.read_exact(&mut reply).await.unwrap();
    assert_eq!(Reply::decode(&reply), Ok(Reply::Welcome(1)));
    stream
}
