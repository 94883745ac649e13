//! The workload of `cargo xtask test soak`: a program that checks its own memory, and its connections.
//!
//!     memory-check [--mib MIB] [--rewrite-mb MB] [--workers N]
//!
//! Each worker owns a part of the memory (see `blocks.rs`): it picks blocks at random, compares every word, and
//! rewrites every second one that it picked, at MB megabytes a second over all workers. Port 7100 answers lines:
//! `stats` with what was seen so far, `full` after every block has been compared; both with one line of JSON. Port
//! 7101 answers checked messages (see `stream.rs`).
//!
//! Built by `rustc` alone (std, static), so that the image needs no libraries.

#[path = "../soak/blocks.rs"]
pub mod blocks;
#[path = "../soak/stream.rs"]
pub mod stream;

use std::error::Error;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use blocks::{Arena, nth};
use stream::{Messages, Side};

/// Where `stats` and `full` are answered.
const CONTROL_PORT: u16 = 7100;
/// Faults whose text is kept.
const KEPT: usize = 16;
/// Comparing all of the memory takes seconds under emulation, and minutes on a machine that does something else.
const FULL_WITHIN: Duration = Duration::from_secs(300);
/// A worker that is this far behind its rate does not catch up: the guest stood still.
const LATE: Duration = Duration::from_millis(500);

/// Counts of one kind of check, and the first faults in words.
#[derive(Default)]
struct Faults {
    count: AtomicU64,
    texts: Mutex<Vec<String>>,
}

impl Faults {
    fn add(&self, text: &str) {
        eprintln!("memory-check: {text}");
        self.count.fetch_add(1, Ordering::Relaxed);
        let mut texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        if texts.len() < KEPT {
            texts.push(text.to_owned());
        }
    }

    /// As a JSON array: the texts are ours, and hold nothing that JSON would escape but quotes of system errors.
    fn json(&self) -> String {
        let texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        let quoted: Vec<String> = texts
            .iter()
            .map(|text| format!("\"{}\"", text.replace(['"', '\\'], "'")))
            .collect();
        format!("[{}]", quoted.join(","))
    }
}

/// What all threads count.
#[derive(Default)]
struct Counts {
    blocks: AtomicU64,
    bytes: AtomicU64,
    verified: AtomicU64,
    rewritten: AtomicU64,
    memory: Faults,
    connections: AtomicU64,
    messages: AtomicU64,
    streams: Faults,
}

/// A worker's order to compare all that it has; it answers with the bytes.
type Full = Sender<usize>;

struct Worker {
    arena: Arena,
    counts: Arc<Counts>,
}

impl Worker {
    /// Compares one block; after a fault it is written anew, so that each fault counts once.
    fn verify(&mut self, block: usize) -> usize {
        let verified = self.arena.verify(block);
        self.counts.verified.fetch_add(1, Ordering::Relaxed);
        match verified {
            Ok(bytes) => bytes,
            Err(fault) => {
                self.counts.memory.add(&fault.to_string());
                self.rewrite(block)
            }
        }
    }

    fn rewrite(&mut self, block: usize) -> usize {
        self.counts.rewritten.fetch_add(1, Ordering::Relaxed);
        self.arena.rewrite(block)
    }

    fn verify_table(&self) {
        if let Err(fault) = self.arena.verify_table() {
            self.counts.memory.add(&fault.to_string());
        }
    }

    /// Never ends. `rate` is in bytes a second.
    fn run(mut self, orders: &Receiver<Full>, rate: f64, seed: u64) {
        let mut due = Instant::now();
        for pick in 0.. {
            let now = Instant::now();
            if now.saturating_duration_since(due) > LATE {
                due = now;
            }
            match orders.recv_timeout(due.saturating_duration_since(now)) {
                Ok(answer) => {
                    self.verify_table();
                    let bytes = (0..self.arena.blocks())
                        .map(|block| self.verify(block))
                        .sum();
                    // Whoever asked may have gone away.
                    let _ = answer.send(bytes);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            let block = (nth(seed, pick) % self.arena.blocks() as u64) as usize;
            self.verify(block);
            if pick % 2 == 0 {
                let bytes = self.rewrite(block);
                due += Duration::from_secs_f64(bytes as f64 / rate);
            }
            if pick % 64 == 0 {
                self.verify_table();
            }
        }
    }
}

/// What the control port needs.
struct Service {
    counts: Arc<Counts>,
    workers: Vec<Mutex<Sender<Full>>>,
    began: Instant,
    /// Tells this run of the program from another.
    run: u64,
}

impl Service {
    fn stats(&self) -> String {
        let text = |path| std::fs::read_to_string(path).unwrap_or_default();
        let uptime = text("/proc/uptime");
        let counts = &self.counts;
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        format!(
            "{{\"boot_id\":\"{}\",\"uptime_s\":{},\"run\":{},\"age_s\":{},\"blocks\":{},\"bytes\":{},\"verified\":{},\
             \"rewritten\":{},\"memory_faults\":{},\"memory_texts\":{},\"connections\":{},\"messages\":{},\
             \"stream_faults\":{},\"stream_texts\":{}}}",
            text("/proc/sys/kernel/random/boot_id").trim(),
            uptime.split_whitespace().next().unwrap_or("0"),
            self.run,
            self.began.elapsed().as_secs_f64(),
            get(&counts.blocks),
            get(&counts.bytes),
            get(&counts.verified),
            get(&counts.rewritten),
            get(&counts.memory.count),
            counts.memory.json(),
            get(&counts.connections),
            get(&counts.messages),
            get(&counts.streams.count),
            counts.streams.json(),
        )
    }

    /// Has all workers compare all they have, at the same time.
    fn full(&self) -> Result<String, Box<dyn Error>> {
        let (answer, answers) = channel();
        for worker in &self.workers {
            let worker = worker.lock().unwrap_or_else(PoisonError::into_inner);
            worker.send(answer.clone())?;
        }
        let mut bytes = 0;
        for _ in &self.workers {
            bytes += answers.recv_timeout(FULL_WITHIN)?;
        }
        let faults = self.counts.memory.count.load(Ordering::Relaxed);
        Ok(format!("{{\"bytes\":{bytes},\"memory_faults\":{faults}}}"))
    }

    fn control(&self, stream: TcpStream) -> Result<(), Box<dyn Error>> {
        let mut to = stream.try_clone()?;
        for line in BufReader::new(stream).lines() {
            let mut answer = match line?.as_str() {
                "stats" => self.stats(),
                "full" => self.full()?,
                other => format!("{{\"error\":\"unknown: {} bytes\"}}", other.len()),
            };
            answer.push('\n');
            to.write_all(answer.as_bytes())?;
        }
        Ok(())
    }
}

/// Answers every message of one connection, until it ends.
fn echo(mut from: TcpStream, counts: &Counts) -> Result<(), stream::Fault> {
    let broken = stream::Fault::Broken;
    from.set_nodelay(true).map_err(broken)?;
    let mut to = from.try_clone().map_err(broken)?;
    let connection = stream::read_hello(&mut from)?;
    let mut theirs = Messages::of(connection, Side::Client);
    let mut ours = Messages::of(connection, Side::Server);
    let mut from = BufReader::new(from);
    while theirs.read(&mut from)? {
        to.write_all(&ours.write()).map_err(broken)?;
        counts.messages.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// A socket on `::` takes IPv4 as well, unless the kernel has no IPv6.
fn listen(port: u16) -> io::Result<TcpListener> {
    TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)))
}

/// Serves each connection on a thread of its own.
fn serve(
    listener: &TcpListener,
    serve: impl Fn(TcpStream) + Clone + Send + 'static,
) -> io::Result<()> {
    // An error is that of a connection which is gone already.
    for stream in listener.incoming().flatten() {
        let serve = serve.clone();
        std::thread::Builder::new().spawn(move || serve(stream))?;
    }
    Ok(())
}

/// What the command line says.
struct Options {
    mib: usize,
    rewrite_mb: f64,
    workers: usize,
}

fn options() -> Result<Options, Box<dyn Error>> {
    let mut options = Options {
        mib: 64,
        rewrite_mb: 20.0,
        workers: 2,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().ok_or(format!("{word} needs a value"))?;
        match word.as_str() {
            "--mib" => options.mib = value.parse()?,
            "--rewrite-mb" => options.rewrite_mb = value.parse()?,
            "--workers" => options.workers = value.parse()?,
            _ => return Err(format!("unknown: {word}").into()),
        }
    }
    if options.mib < options.workers || options.workers == 0 || options.rewrite_mb <= 0.0 {
        return Err("needs a worker, a megabyte for each, and a rate".into());
    }
    Ok(options)
}

fn run() -> Result<(), Box<dyn Error>> {
    let Options {
        mib,
        rewrite_mb,
        workers,
    } = options()?;
    let counts = Arc::new(Counts::default());
    let run = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    // 53 bits: a number that survives any reader of JSON.
    let run = nth(0, run.as_nanos() as u64) >> 11;
    let mut senders = Vec::new();
    for worker in 0..workers as u64 {
        let (sender, orders) = channel();
        senders.push(Mutex::new(sender));
        let arena = Arena::new(nth(run, worker), (mib << 20) / workers);
        counts
            .blocks
            .fetch_add(arena.blocks() as u64, Ordering::Relaxed);
        counts
            .bytes
            .fetch_add(arena.bytes() as u64, Ordering::Relaxed);
        let counts = Arc::clone(&counts);
        let rate = rewrite_mb * 1e6 / workers as f64;
        std::thread::Builder::new()
            .spawn(move || Worker { arena, counts }.run(&orders, rate, nth(!run, worker)))?;
    }
    let service = Arc::new(Service {
        counts: Arc::clone(&counts),
        workers: senders,
        began: Instant::now(),
        run,
    });
    let (control, messages) = (listen(CONTROL_PORT)?, listen(stream::PORT)?);
    println!(
        "memory-check: {mib} MiB, ports {CONTROL_PORT} and {}",
        stream::PORT
    );
    std::thread::Builder::new().spawn(move || {
        let failed = serve(&control, move |stream| {
            if let Err(error) = service.control(stream) {
                eprintln!("memory-check: control: {error}");
            }
        });
        eprintln!("memory-check: control: {failed:?}");
    })?;
    serve(&messages, move |stream| {
        let peer = stream
            .peer_addr()
            .map_or_else(|error| error.to_string(), |peer| peer.to_string());
        counts.connections.fetch_add(1, Ordering::Relaxed);
        if let Err(fault) = echo(stream, &counts) {
            let source = fault
                .source()
                .map(|error| format!(": {error}"))
                .unwrap_or_default();
            counts
                .streams
                .add(&format!("connection of {peer}: {fault}{source}"));
        }
        counts.connections.fetch_sub(1, Ordering::Relaxed);
    })?;
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("memory-check: {error}");
            ExitCode::FAILURE
        }
    }
}
