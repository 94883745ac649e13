//! The workload as the client's namespace sees it: its control port, and connections that must not break.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::stream::{self, Messages, Side, hello};
use crate::netns;

/// The workload's control port.
const CONTROL_PORT: u16 = 7100;
/// To connect, or to answer what needs no work.
const SOON: Duration = Duration::from_secs(10);
/// To compare all of the memory: the workload gives up a little earlier.
const FULL_WITHIN: Duration = Duration::from_secs(310);
/// Far more than a switchover: a connection that is silent for so long is broken.
const SILENT: Duration = Duration::from_secs(30);
/// Between two messages of one connection.
const INTERVAL: Duration = Duration::from_millis(50);

/// What the workload says of itself.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Stats {
    /// Differs after a reboot.
    pub boot_id: String,
    /// Seconds since the guest booted.
    pub uptime_s: f64,
    /// Differs after a restart of the program.
    pub run: u64,
    /// Seconds since the program has filled its memory.
    pub age_s: f64,
    /// Blocks that it has.
    pub blocks: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Blocks compared so far.
    pub verified: u64,
    /// Blocks rewritten so far.
    pub rewritten: u64,
    /// Blocks that were wrong.
    pub memory_faults: u64,
    /// The first of them in words.
    pub memory_texts: Vec<String>,
    /// Open connections.
    pub connections: u64,
    /// Messages answered.
    pub messages: u64,
    /// Connections that were wrong, or broke.
    pub stream_faults: u64,
    /// The first of them in words.
    pub stream_texts: Vec<String>,
}

/// What the workload says after it has compared all of its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Full {
    /// Bytes compared.
    pub bytes: u64,
    /// Blocks that were wrong, ever.
    pub memory_faults: u64,
}

/// Where the workload is.
#[derive(Clone, Debug)]
pub struct Workload {
    /// The client's namespace.
    pub netns: String,
    /// The pod's address.
    pub pod: IpAddr,
}

impl Workload {
    /// What it has seen so far.
    ///
    /// # Errors
    /// It does not answer.
    pub fn stats(&self) -> Result<Stats> {
        self.ask("stats", SOON)
    }

    /// Compares all of its memory.
    ///
    /// # Errors
    /// It does not answer within minutes.
    pub fn full(&self) -> Result<Full> {
        self.ask("full", FULL_WITHIN)
    }

    fn ask<T: for<'a> Deserialize<'a>>(&self, verb: &str, limit: Duration) -> Result<T> {
        let ask = || -> Result<T> {
            let mut control = self.connect(CONTROL_PORT)?;
            control.set_read_timeout(Some(limit))?;
            writeln!(control, "{verb}")?;
            let mut line = String::new();
            BufReader::new(control).read_line(&mut line)?;
            serde_json::from_str(&line).with_context(|| format!("it says `{}`", line.trim()))
        };
        ask().with_context(|| format!("the workload does not answer `{verb}`"))
    }

    fn connect(&self, port: u16) -> Result<TcpStream> {
        let address = SocketAddr::new(self.pod, port);
        netns::within(&self.netns, || {
            TcpStream::connect_timeout(&address, SOON)
                .with_context(|| format!("cannot connect to {address}"))
        })
    }

    /// Opens a connection that carries messages both ways until it is stopped. No two may have one number.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open(&self, number: u64) -> Result<Connection> {
        let mut socket = self.connect(stream::PORT)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(SILENT))?;
        socket.set_write_timeout(Some(SILENT))?;
        socket.write_all(&hello(number))?;
        let shared = Arc::new(Shared::default());
        let writer = {
            let (shared, socket) = (Arc::clone(&shared), socket.try_clone()?);
            std::thread::Builder::new()
                .name(format!("soak-tx-{number}"))
                .spawn(move || write(socket, number, &shared))?
        };
        let reader = {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name(format!("soak-rx-{number}"))
                .spawn(move || read(socket, number, &shared))?
        };
        Ok(Connection {
            number,
            shared,
            threads: [writer, reader],
        })
    }
}

/// What the two threads of a connection share with its owner.
#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    sent: AtomicU64,
    answered: AtomicU64,
    fault: Mutex<Option<String>>,
}

impl Shared {
    /// Keeps the first fault: the others follow from it.
    fn fail(&self, what: &str) {
        let mut fault = self.fault.lock().unwrap_or_else(PoisonError::into_inner);
        fault.get_or_insert_with(|| what.to_owned());
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// An open connection under traffic.
pub struct Connection {
    number: u64,
    shared: Arc<Shared>,
    threads: [JoinHandle<()>; 2],
}

impl Connection {
    /// Messages answered so far.
    pub fn answered(&self) -> u64 {
        self.shared.answered.load(Ordering::Relaxed)
    }

    /// What was wrong with it, if anything.
    pub fn fault(&self) -> Option<String> {
        let fault = self
            .shared
            .fault
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        fault
            .as_ref()
            .map(|text| format!("connection {}: {text}", self.number))
    }

    /// Sends no more, and waits until everything is answered; how many messages that were.
    ///
    /// # Errors
    /// Something was wrong with it, or an answer is missing.
    pub fn stop(self) -> Result<u64> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let Self {
            number,
            shared,
            threads,
        } = self;
        for thread in threads {
            if thread.join().is_err() {
                bail!("connection {number}: a thread of it panicked");
            }
        }
        let text = shared
            .fault
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(text) = text {
            bail!("connection {number}: {text}");
        }
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let (sent, answered) = (count(&shared.sent), count(&shared.answered));
        ensure!(
            sent == answered,
            "connection {number}: {answered} of {sent} messages were answered"
        );
        Ok(answered)
    }
}

fn write(mut socket: TcpStream, number: u64, shared: &Shared) {
    let mut messages = Messages::of(number, Side::Client);
    let mut due = Instant::now();
    while !shared.stop.load(Ordering::Relaxed) {
        if let Err(error) = socket.write_all(&messages.write()) {
            shared.fail(&format!("cannot send: {error}"));
            break;
        }
        shared.sent.fetch_add(1, Ordering::Relaxed);
        // Not what was missed while the guest stood still: that would be a burst.
        due = (due + INTERVAL).max(Instant::now());
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    // The server answers what it has, and closes.
    let _ = socket.shutdown(Shutdown::Write);
}

fn read(socket: TcpStream, number: u64, shared: &Shared) {
    let mut messages = Messages::of(number, Side::Server);
    let mut socket = BufReader::new(socket);
    loop {
        match messages.read(&mut socket) {
            Ok(true) => {
                shared.answered.fetch_add(1, Ordering::Relaxed);
            }
            Ok(false) if shared.stop.load(Ordering::Relaxed) => return,
            Ok(false) => return shared.fail("the workload closed it"),
            Err(fault) => {
                return shared.fail(&format!("{:#}", anyhow::Error::new(fault)));
            }
        }
    }
}
