//! Connections, sessions and TLS over real sockets on the loopback; [`refusals`] are the sessions that do not come about.

mod refusals;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    date_time_ymd,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use vm_runtime::units::{Epoch, PAGE_SIZE, PageIndex};

use super::batch::Batch;
use super::bulk::{Data, PacketKind, Urgent};
use super::conn::{LinkError, Reader, Writer};
use super::control;
use super::message::{Control, Grant, StateChunk};
use super::preamble::{MAX_DATA_CONNECTIONS, Shape, Turned, VERSION_MAX};
use super::session::{DialError, Limits, Listener, Session, dial, dial_shape};
use super::tls::{TlsConfig, dns_name};

const LIMIT: Duration = Duration::from_secs(10);

pub(crate) struct Authority {
    dir: tempfile::TempDir,
    ca: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let cert = params.self_signed(&key).unwrap();
        std::fs::write(dir.path().join("ca.pem"), cert.pem()).unwrap();
        let ca = Issuer::new(params, key);
        Self { dir, ca }
    }

    fn ca_file(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    fn issue(&self, node: &str, change: impl FnOnce(&mut CertificateParams)) -> (PathBuf, PathBuf) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![dns_name(node)]).unwrap();
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        change(&mut params);
        let cert = params.signed_by(&key, &self.ca).unwrap();
        let paths = ["crt", "key"].map(|end| self.dir.path().join(format!("{node}.{end}")));
        std::fs::write(&paths[0], cert.pem()).unwrap();
        std::fs::write(&paths[1], key.serialize_pem()).unwrap();
        let [cert, key] = paths;
        (cert, key)
    }

    pub(crate) fn node(&self, node: &str) -> TlsConfig {
        self.node_with(node, |_| {})
    }

    fn node_with(&self, node: &str, change: impl FnOnce(&mut CertificateParams)) -> TlsConfig {
        let (cert, key) = self.issue(node, change);
        TlsConfig::load(&cert, &key, &self.ca_file()).unwrap()
    }
}

async fn listen(tls: TlsConfig, limits: Limits) -> Listener {
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    Listener::bind(any, tls, vec!["a".to_owned(), "c".to_owned()], limits)
        .await
        .unwrap()
}

async fn pair(data: usize) -> (Session, Session) {
    let ca = Authority::new();
    let mut listener = listen(ca.node("b"), Limits::default()).await;
    let addr = listener.local_addr();
    let tls = ca.node("a");
    let (dialed, accepted) = tokio::join!(dial(addr, &tls, "b", data, LIMIT), listener.accept());
    (dialed.unwrap(), accepted)
}

/// A full frame of pages of that byte.
fn fill(batch: &mut Batch, first: u64, byte: u8) {
    for page in first..first + 256 {
        let kept = batch.page(PageIndex(page), |content| {
            content.fill(byte);
            Ok::<bool, ()>(true)
        });
        assert_eq!(kept, Ok(true));
    }
}

#[tokio::test]
async fn a_session_is_put_together_and_carries_every_lane() {
    let (a, b) = pair(2).await;
    assert_eq!((a.peer.as_str(), b.peer.as_str()), ("b", "a"));
    assert_eq!((a.id, a.version), (b.id, VERSION_MAX));
    assert_eq!((a.data.len(), b.data.len()), (2, 2));

    let (to_b, mut from_b) = control::start(a.control);
    let (to_a, mut from_a) = control::start(b.control);
    let chunk = StateChunk(Bytes::from(vec![7; StateChunk::MAX]));
    to_b.send(Grant { epoch: Epoch(9) }).await.unwrap();
    for _ in 0..8 {
        to_b.send(Control::from(chunk.clone())).await.unwrap();
    }
    to_b.flush().await.unwrap();
    assert_eq!(
        from_a.recv().await.unwrap(),
        Control::Grant(Grant { epoch: Epoch(9) })
    );
    for _ in 0..8 {
        assert_eq!(from_a.recv().await.unwrap(), chunk.clone().into());
    }

    for (index, (out, inn)) in a.data.into_iter().zip(b.data).enumerate() {
        let (_, mut out) = out.split();
        let (mut inn, _) = inn.split();
        let send = async {
            let mut batch = Batch::new();
            fill(&mut batch, 5, index as u8 + 1);
            batch.push(&Data::Barrier { round: 1 });
            out.send_batch(&batch).await.unwrap();
            out.close().await.unwrap();
        };
        let receive = async {
            let pages = inn.next().await.unwrap();
            let raw = Bytes::from(vec![index as u8 + 1; 256 * PAGE_SIZE]);
            let first = PageIndex(5);
            assert_eq!(pages, Data::Pages { first, raw });
            assert_eq!(inn.next().await.unwrap(), Data::Barrier { round: 1 });
            assert!(matches!(inn.next().await, Err(LinkError::Closed)));
        };
        tokio::join!(send, receive);
    }

    let (mut ack, mut packets) = a.urgent.unwrap().split();
    let (mut log, mut acks) = b.urgent.unwrap().split();
    let packet = Urgent::Packet {
        seq: 3,
        kind: PacketKind::Frame,
        frame: Bytes::from(vec![1; 66_000]),
    };
    packets.send(&packet).await.unwrap();
    assert_eq!(log.next().await.unwrap(), packet);
    acks.send(&Urgent::PacketAck { seq: 3 }).await.unwrap();
    assert_eq!(ack.next().await.unwrap(), Urgent::PacketAck { seq: 3 });

    drop(to_a);
    drop(from_a);
    assert!(matches!(from_b.recv().await, Err(LinkError::Closed)));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_peers_dial_the_widest_session_at_once() {
    let ca = Authority::new();
    let mut listener = listen(ca.node("b"), Limits::default()).await;
    let addr = listener.local_addr();
    let (one, other) = (ca.node("a"), ca.node("c"));
    let most = usize::from(MAX_DATA_CONNECTIONS);
    let both = async { (listener.accept().await, listener.accept().await) };
    let (first, second, (x, y)) = tokio::join!(
        dial(addr, &one, "b", most, LIMIT),
        dial(addr, &other, "b", most, LIMIT),
        both
    );
    for session in [first.unwrap(), second.unwrap(), x, y] {
        assert_eq!(session.data.len(), most);
    }
    let beyond = dial(addr, &one, "b", most + 1, LIMIT).await;
    assert!(matches!(beyond, Err(DialError::DataConnections(65))));
}

#[tokio::test]
async fn resume_and_query_sessions_have_the_connections_of_their_shape() {
    let ca = Authority::new();
    let mut listener = listen(ca.node("b"), Limits::default()).await;
    let addr = listener.local_addr();
    let tls = ca.node("a");
    let shapes = [0, 2].map(|data| Shape::Resume { data });
    for shape in [shapes[0], shapes[1], Shape::Query] {
        let dialed = dial_shape(addr, &tls, "b", shape, LIMIT).await.unwrap();
        let accepted = listener.accept().await;
        for session in [dialed, accepted] {
            assert_eq!(session.shape, shape);
            assert_eq!(session.data.len(), usize::from(shape.data()));
            assert_eq!(session.faults.len(), usize::from(shape.faults()));
            assert_eq!(session.urgent.is_some(), shape != Shape::Query);
        }
    }
}

#[tokio::test]
async fn a_dialer_whose_node_is_cut_off_hears_within_three_seconds() {
    let (a, b) = pair(1).await;
    let (_to_b, mut from_b) = control::start(a.control);
    // The peer is alive as a process and says nothing: no pings.
    let started = tokio::time::Instant::now();
    let error = from_b.recv().await.unwrap_err();
    assert!(matches!(error, LinkError::Silent(_)), "{error}");
    assert!(started.elapsed() < Duration::from_millis(3500));
    drop(b);
}

#[tokio::test]
async fn an_idle_link_stays_alive_and_measures_its_round_trip() {
    let (a, b) = pair(1).await;
    let (_to_b, mut from_b) = control::start(a.control);
    let (_to_a, _from_a) = control::start(b.control);
    let idle = tokio::time::timeout(Duration::from_millis(3300), from_b.recv()).await;
    assert!(idle.is_err(), "{idle:?}");
    assert!(from_b.round_trip_us().is_some());
}

#[tokio::test]
async fn a_reader_never_holds_more_than_a_frame_and_its_room() {
    let (mut to, from) = tokio::io::duplex(1 << 22);
    let mut reader: Reader<Data, _> = Reader::new(from);
    // The length of the largest frame, and not a byte of it.
    to.write_all(&(1u32 << 31).to_le_bytes()).await.unwrap();
    assert!(matches!(reader.next().await, Err(LinkError::Frame(_))));

    let (to, from) = tokio::io::duplex(1 << 22);
    let mut reader: Reader<Data, _> = Reader::new(from);
    let mut writer: Writer<Data, _> = Writer::new(to);
    writer.feed(&Data::Barrier { round: 4 }).await.unwrap();
    writer.flush().await.unwrap();
    assert_eq!(reader.next().await.unwrap(), Data::Barrier { round: 4 });
    drop(writer);
    assert!(matches!(reader.next().await, Err(LinkError::Closed)));
}

#[tokio::test]
async fn the_end_in_the_middle_of_a_frame_is_told_from_an_orderly_one() {
    let (mut to, from) = tokio::io::duplex(64);
    let mut reader: Reader<Data, _> = Reader::new(from);
    to.write_all(&[5, 0, 0, 0, 0x43, 1]).await.unwrap();
    drop(to);
    assert!(matches!(reader.next().await, Err(LinkError::Truncated)));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_page_of_many_full_frames_arrives_over_two_data_connections() {
    let (a, b) = pair(2).await;
    let frames = 40u64;
    let senders = a.data.into_iter().map(|connection| {
        tokio::spawn(async move {
            let (_read, mut writer) = connection.split();
            let mut batch = Batch::new();
            for i in 0..frames {
                batch.clear();
                fill(&mut batch, i * 256, 3);
                writer.send_batch(&batch).await.unwrap();
            }
            writer.close().await.unwrap();
        })
    });
    let senders: Vec<_> = senders.collect();
    let receivers = b.data.into_iter().map(|connection| {
        tokio::spawn(async move {
            let (mut reader, _write) = connection.split();
            let mut pages = 0u64;
            while let Ok(Data::Pages { raw, .. }) = reader.next().await {
                pages += (raw.len() / PAGE_SIZE) as u64;
            }
            pages
        })
    });
    let receivers: Vec<_> = receivers.collect();
    let mut pages = 0;
    for receiver in receivers {
        pages += receiver.await.unwrap();
    }
    for sender in senders {
        sender.await.unwrap();
    }
    assert_eq!(pages, 2 * frames * 256);
}
