//! Pages in our frames: by the engine's own sender and receiver over TLS, and by the same loop over plain TCP.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use migrator::memory::receive::{self, Arrival, Target};
use migrator::memory::send::PageSender;
use migrator::wire::bulk::MAX_PAGES;
use migrator::wire::{Batch, Data, Limits, Listener, Reader, TlsConfig, Writer, dial};
use tokio::io::AsyncWriteExt;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use vm_runtime::memory::GuestMemory;
use vm_runtime::units::{PAGE_SIZE, PageIndex, PageRange};

use super::{Args, CONNECTS_WITHIN, announced, connect, empty, noise, settle};

/// The lab's nodes: the sender is a, the listener b.
const SENDER: &str = "a";
const LISTENER: &str = "b";

/// Sends whole rounds until the time is over; bytes of pages, and how long until the other end had placed them.
pub(super) async fn send_tls(args: &Args, side: TcpStream) -> Result<(u64, Duration)> {
    let memory = noise()?;
    let all = [PageRange::new(0, memory.pages())];
    let tls = identity(args)?;
    let connections = args.connections;
    let session = dial(args.address, &tls, LISTENER, connections, CONNECTS_WITHIN).await?;
    let writers = session.data.into_iter().map(|data| data.split().1);
    let sender = PageSender::start(&memory, writers.collect(), None);
    let begun = Instant::now();
    let mut round = 0;
    while round == 0 || begun.elapsed().as_secs_f64() < args.seconds {
        round += 1;
        sender.round(round, &all, false).await?;
    }
    settle(side, u64::from(round)).await?;
    Ok((u64::from(round) * memory.len().0, begun.elapsed()))
}

pub(super) async fn listen_tls(args: &Args, side: &TcpListener) -> Result<()> {
    let tls = identity(args)?;
    let peers = vec![SENDER.to_owned()];
    let mut listener = Listener::bind(args.address, tls, peers, Limits::default()).await?;
    let session = listener.accept().await;
    let readers = session.data.into_iter().map(|data| data.split().0);
    let target = Arc::new(OnceLock::new());
    let memory = empty()?;
    let hashes = None;
    if target.set(Target::new(memory, hashes)).is_err() {
        bail!("the target was set twice");
    }
    let (arrivals, mut arrived) = mpsc::channel(64);
    receive::start(readers.collect(), &target, &arrivals);
    let mut done = vec![0; args.connections];
    let (mut side, rounds) = announced(side).await?;
    while done.iter().any(|done| u64::from(*done) < rounds) {
        match arrived.recv().await.context("the receiver has ended")? {
            Arrival::Barrier { lane, round } => done[lane] = round,
            Arrival::Chunk { .. } => bail!("chunks of images are not sent here"),
            Arrival::Ended(error) => return Err(error.into()),
        }
    }
    side.write_all(&[1]).await?;
    Ok(())
}

fn identity(args: &Args) -> Result<TlsConfig> {
    let file = |name| args.certificates.join(name);
    let (cert, key, ca) = (file("cert.pem"), file("key.pem"), file("ca.pem"));
    Ok(TlsConfig::load(&cert, &key, &ca)?)
}

pub(super) async fn send_plain(args: &Args, side: TcpStream) -> Result<(u64, Duration)> {
    let memory = noise()?;
    let mut lanes = Vec::new();
    for _ in 0..args.connections {
        let (_, write) = connect(args.address).await?.into_split();
        lanes.push(write);
    }
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    let count = lanes.len() as u64;
    for (lane, write) in lanes.into_iter().enumerate() {
        let (memory, seconds) = (Arc::clone(&memory), args.seconds);
        tasks.spawn(async move { lane_rounds(write, &memory, lane as u64, count, seconds).await });
    }
    let mut pages = 0;
    while let Some(sent) = tasks.join_next().await {
        pages += sent??;
    }
    settle(side, pages).await?;
    Ok((pages * PAGE_SIZE as u64, begun.elapsed()))
}

/// Every `count`th piece of the memory, again and again; pages sent.
async fn lane_rounds(
    write: OwnedWriteHalf,
    memory: &GuestMemory,
    lane: u64,
    count: u64,
    seconds: f64,
) -> Result<u64> {
    let mut writer: Writer<Data, OwnedWriteHalf> = Writer::new(write);
    let mut batch = Batch::new();
    let (begun, mut pages) = (Instant::now(), 0);
    let stride = count * u64::from(MAX_PAGES);
    while begun.elapsed().as_secs_f64() < seconds {
        let mut first = lane * u64::from(MAX_PAGES);
        while first < memory.pages() {
            memory.read(PageIndex(first), batch.pages(PageIndex(first), MAX_PAGES))?;
            writer.send_batch(&batch).await?;
            batch.clear();
            pages += u64::from(MAX_PAGES);
            first += stride;
        }
    }
    writer.close().await?;
    Ok(pages)
}

pub(super) async fn listen_plain(args: &Args, side: &TcpListener) -> Result<()> {
    let listener = TcpListener::bind(args.address).await?;
    let memory = empty()?;
    let (mut side, mut tasks) = (side.accept().await?.0, JoinSet::new());
    for _ in 0..args.connections {
        let (tcp, _) = listener.accept().await?;
        let memory = Arc::clone(&memory);
        tasks.spawn(async move { place_all(tcp.into_split().0, &memory).await });
    }
    let mut placed = 0;
    while let Some(pages) = tasks.join_next().await {
        placed += pages??;
    }
    let sent = tokio::io::AsyncReadExt::read_u64_le(&mut side).await?;
    anyhow::ensure!(placed == sent, "{placed} pages of {sent} have come");
    side.write_all(&[1]).await?;
    Ok(())
}

/// Places pages until the sender closes; how many.
async fn place_all(read: OwnedReadHalf, memory: &GuestMemory) -> Result<u64> {
    let mut reader: Reader<Data, OwnedReadHalf> = Reader::new(read);
    let mut pages = 0;
    loop {
        match reader.next().await {
            Ok(Data::Pages { first, raw }) => {
                memory.write(first, &raw)?;
                pages += (raw.len() / PAGE_SIZE) as u64;
            }
            Ok(other) => bail!("only pages are sent here, and no {other:?}"),
            Err(migrator::wire::LinkError::Closed) => return Ok(pages),
            Err(error) => return Err(error.into()),
        }
    }
}
