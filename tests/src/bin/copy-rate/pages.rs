//! Pages in our frames, by the engine's own sender and receiver: over TLS, and over plain TCP.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use migrator::memory::compress::Compress;
use migrator::memory::receive::{self, Arrival, Target};
use migrator::memory::send::PageSender;
use migrator::wire::{Connection, Data, Limits, Listener, Reader, TlsConfig, Writer, dial};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use vm_runtime::units::PageRange;

use super::{Args, CONNECTS_WITHIN, announced, connect, empty, listening, noise, settle};

/// The lab's nodes: the sender is a, the listener b.
const SENDER: &str = "a";
const LISTENER: &str = "b";

pub(super) async fn send_tls(args: &Args, side: TcpStream) -> Result<(u64, Duration)> {
    let tls = identity(args)?;
    let connections = args.connections;
    let session = dial(args.address, &tls, LISTENER, connections, CONNECTS_WITHIN).await?;
    let writers = session.data.into_iter().map(|data| data.split().1);
    send(args, side, writers.collect()).await
}

pub(super) async fn listen_tls(args: &Args, side: SocketAddr) -> Result<()> {
    let tls = identity(args)?;
    let peers = vec![SENDER.to_owned()];
    let mut listener = Listener::bind(args.address, tls, peers, Limits::default()).await?;
    let side = listening(side).await?;
    let session = listener.accept().await;
    let readers = session.data.into_iter().map(Connection::into_reader);
    listen(side, readers.collect()).await
}

fn identity(args: &Args) -> Result<TlsConfig> {
    let file = |name| args.certificates.join(name);
    let (cert, key, ca) = (file("cert.pem"), file("key.pem"), file("ca.pem"));
    Ok(TlsConfig::load(&cert, &key, &ca)?)
}

pub(super) async fn send_plain(args: &Args, side: TcpStream) -> Result<(u64, Duration)> {
    let (mut writers, mut kept) = (Vec::new(), Vec::new());
    for _ in 0..args.connections {
        let (read, write) = connect(args.address).await?.into_split();
        writers.push(Writer::new(write));
        kept.push(read);
    }
    send(args, side, writers).await
}

pub(super) async fn listen_plain(args: &Args, side: SocketAddr) -> Result<()> {
    let listener = TcpListener::bind(args.address).await?;
    let side = listening(side).await?;
    let (mut readers, mut kept) = (Vec::new(), Vec::new());
    for _ in 0..args.connections {
        let (read, write) = listener.accept().await?.0.into_split();
        readers.push(Reader::new(read));
        kept.push(write);
    }
    listen(side, readers).await
}

/// Sends whole rounds until the time is over; bytes of pages, and how long until the other end had placed them.
async fn send<W: AsyncWrite + Unpin + Send + 'static>(
    args: &Args,
    side: TcpStream,
    writers: Vec<Writer<Data, W>>,
) -> Result<(u64, Duration)> {
    let memory = noise()?;
    let all = [PageRange::new(0, memory.pages())];
    let sender = PageSender::start(&memory, writers, None, Compress::None);
    let begun = Instant::now();
    let mut round = 0;
    while round == 0 || begun.elapsed().as_secs_f64() < args.seconds {
        round += 1;
        sender.round(round, &all, false).await?;
    }
    settle(side, u64::from(round)).await?;
    Ok((u64::from(round) * memory.len().0, begun.elapsed()))
}

async fn listen<R: AsyncRead + Unpin + Send + 'static>(
    side: TcpListener,
    readers: Vec<Reader<Data, R>>,
) -> Result<()> {
    let target = Arc::new(OnceLock::new());
    let (memory, hashes) = (empty()?, None);
    if target.set(Target::new(memory, hashes, None)).is_err() {
        bail!("the target was set twice");
    }
    let (arrivals, mut arrived) = mpsc::channel(64);
    let mut done = vec![0; readers.len()];
    receive::start(readers, &target, &arrivals);
    let announced = announced(side);
    tokio::pin!(announced);
    let mut end = None;
    // Barriers come all the time, and who reads the pages waits until they are taken.
    let mut side = loop {
        tokio::select! {
            found = &mut announced, if end.is_none() => end = Some(found?),
            arrival = arrived.recv() => match arrival.context("the receiver has ended")? {
                Arrival::Barrier { lane, round } => done[lane] = round,
                Arrival::Chunk { .. } | Arrival::DiskBarrier { .. } => {
                    bail!("images and disks are not sent here")
                }
                Arrival::Ended(error) => return Err(error.into()),
            },
        }
        end = match end {
            Some((side, rounds)) if done.iter().all(|done| u64::from(*done) >= rounds) => {
                break side;
            }
            end => end,
        };
    };
    side.write_all(&[1]).await?;
    Ok(())
}
