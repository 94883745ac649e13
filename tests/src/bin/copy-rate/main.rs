//! How fast pages cross a link: our page sender and receiver over TLS, the same frames over plain TCP, and for comparison a pipe
//! that is rustls and nothing else. `cargo xtask bench memory` runs one end in each of the lab's namespaces.
//!
//! ```text
//! listen                                       send         begun when `listen` has printed `listening`
//!   data connections  <---- pages, or bytes ----
//!   side connection   <---- how much it was ----    when everything has been written
//!                     -------- one byte ------->    when everything has been placed: the clock stops
//! ```

mod pages;
mod pipe;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use vm_runtime::memory::GuestMemory;
use vm_runtime::units::{Bytes, PAGE_SIZE, PageIndex};

/// Guest RAM that is sent over and over, in MiB: more than any cache holds.
const MEMORY_MIB: u64 = 256;
/// For TCP, TLS and the preambles of all connections.
const CONNECTS_WITHIN: Duration = Duration::from_secs(10);
/// Beyond what was asked for.
const GRACE: Duration = Duration::from_secs(60);

#[derive(Debug, Parser)]
struct Args {
    end: End,
    /// Where `listen` listens; the port after it is the side connection's
    address: SocketAddr,
    #[arg(long)]
    how: How,
    #[arg(long)]
    connections: usize,
    /// How long to send
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Folder of this end's ca.pem, cert.pem and key.pem
    #[arg(long)]
    certificates: PathBuf,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum End {
    Listen,
    Send,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum How {
    /// Our frames over TCP
    Plain,
    /// Our frames over TLS: the way of a migration
    Tls,
    /// Bytes over TLS
    Rustls,
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    let limit = Duration::from_secs_f64(args.seconds) + GRACE;
    let outcome = match timeout(limit, run(&args)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(anyhow::anyhow!("not over after {limit:?}")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("copy-rate: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &Args) -> Result<()> {
    let side = SocketAddr::new(args.address.ip(), args.address.port() + 1);
    match args.end {
        End::Listen => match args.how {
            How::Plain => pages::listen_plain(args, side).await,
            How::Tls => pages::listen_tls(args, side).await,
            How::Rustls => pipe::listen(args, side).await,
        },
        End::Send => {
            let side = connect(side).await?;
            let (bytes, took) = match args.how {
                How::Plain => pages::send_plain(args, side).await?,
                How::Tls => pages::send_tls(args, side).await?,
                How::Rustls => pipe::send(args, side).await?,
            };
            let seconds = took.as_secs_f64();
            println!(
                "{}",
                serde_json::json!({ "bytes": bytes, "seconds": seconds })
            );
            Ok(())
        }
    }
}

async fn connect(address: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(address)
        .await
        .with_context(|| format!("cannot connect to {address}"))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Listens for the side connection, and says so: everything else of this end listens by now.
async fn listening(side: SocketAddr) -> Result<TcpListener> {
    let side = TcpListener::bind(side).await.context("cannot listen")?;
    println!("listening");
    Ok(side)
}

/// Tells the other end how much was sent, and waits until it has all of it.
async fn settle(mut side: TcpStream, amount: u64) -> Result<()> {
    side.write_all(&amount.to_le_bytes()).await?;
    side.read_u8()
        .await
        .context("the other end has not got everything")?;
    Ok(())
}

/// The other side of [`settle`]: how much there is to come.
async fn announced(side: TcpListener) -> Result<(TcpStream, u64)> {
    let (mut stream, _) = side.accept().await?;
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes).await?;
    Ok((stream, u64::from_le_bytes(bytes)))
}

/// RAM in which no page is zero or like another.
fn noise() -> Result<Arc<GuestMemory>> {
    let memory = empty()?;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut chunk = vec![0; 256 * PAGE_SIZE];
    for first in (0..memory.pages()).step_by(256) {
        for word in chunk.chunks_exact_mut(8) {
            // xorshift64 (Marsaglia, 2003).
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        memory.write(PageIndex(first), &chunk)?;
    }
    Ok(memory)
}

fn empty() -> Result<Arc<GuestMemory>> {
    let memory = GuestMemory::create("copy-rate", Bytes::mib(MEMORY_MIB))?;
    Ok(Arc::new(memory))
}
