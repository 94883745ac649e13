//! The benchmarks' load inside a guest: writes memory at a steady rate, computes, or times touches of random pages; told what
//! to do, and asked how far it is, over UDP.
//!
//! Built by `rustc` alone (std, static), as the demo's echo is. `memory-load PORT MIB [FILE MIB]` fills a working set of MIB mebibytes
//! with noise (nothing that compresses or is zero), and then answers. A request is `NUMBER VERB [ARGUMENT]`, its answer
//! `NUMBER JSON`, the counters as they are then:
//!
//! | verb | what runs from then on |
//! |---|---|
//! | `idle` | nothing |
//! | `dirty BYTES` | so many bytes a second of the set are dirtied, page after page: one word of each, which dirties it as a whole |
//! | `spin` | loops as fast as they go; one sums up a random page of the set and writes one word of it |
//! | `disk BYTES` | so many bytes a second of the file are written, 16 KiB at a random place each, past the guest's page cache |
//! | `scan BYTES` | reads the file from its beginning to its end and again, so many bytes at a time, as fast as it goes |
//! | `pick BYTES` | the same, each time at a random place |
//! | `touch` | reads one word of a random page every 50 us, and times that read; the histogram begins anew |
//! | `report` | as before |

mod disk;
mod histogram;

use std::net::UdpSocket;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use disk::Disk;
use histogram::Histogram;

/// Words of a page of 4 KiB.
const WORDS: usize = 512;
/// How often the writer looks at the clock while it is early.
const TICK: Duration = Duration::from_millis(1);
/// A writer that was held up makes up for this much, and no more: bursts are not what was asked for.
const LAG: Duration = Duration::from_millis(20);
/// Loops between two looks at the mode.
const BATCH: u64 = 16;
/// Between two touches, spent awake: what interrupts the program meets this far more often than a touch of a microsecond, and is
/// not taken for a page that was waited for.
const BETWEEN: Duration = Duration::from_micros(50);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Idle,
    Disk { bytes_per_s: u64 },
    Read { bytes: usize, jumps: bool },
    Dirty { bytes_per_s: u64 },
    Spin,
    Touch,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Mode::Idle => "idle",
            Mode::Disk { .. } => "disk",
            Mode::Read { jumps: false, .. } => "scan",
            Mode::Read { jumps: true, .. } => "pick",
            Mode::Dirty { .. } => "dirty",
            Mode::Spin => "spin",
            Mode::Touch => "touch",
        }
    }
}

/// A request's number, and the mode it asks for, if another one.
fn parse(request: &str) -> Option<(u64, Option<Mode>)> {
    let mut words = request.split_ascii_whitespace();
    let number = words.next()?.parse().ok()?;
    let mode = match words.next()? {
        "idle" => Some(Mode::Idle),
        "dirty" => Some(Mode::Dirty {
            bytes_per_s: words.next()?.parse().ok()?,
        }),
        "disk" => Some(Mode::Disk {
            bytes_per_s: words.next()?.parse().ok()?,
        }),
        verb @ ("scan" | "pick") => Some(Mode::Read {
            bytes: words.next()?.parse().ok().filter(of_a_read)?,
            jumps: verb == "pick",
        }),
        "spin" => Some(Mode::Spin),
        "touch" => Some(Mode::Touch),
        "report" => None,
        _ => return None,
    };
    words.next().is_none().then_some((number, mode))
}

/// What O_DIRECT takes, and there is memory for.
fn of_a_read(bytes: &usize) -> bool {
    (1..=disk::LARGEST).contains(bytes) && bytes.is_power_of_two() && bytes.is_multiple_of(4096)
}

struct Shared {
    mode: Mutex<Mode>,
    /// Grows with each change of the mode.
    changes: AtomicU64,
    pages: AtomicU64,
    loops: AtomicU64,
    disk_bytes: AtomicU64,
    touches: Mutex<Histogram>,
}

impl Shared {
    fn mode(&self) -> Mode {
        *self.mode.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, mode: Mode) {
        if mode == Mode::Touch {
            let mut touches = self.touches.lock().unwrap_or_else(PoisonError::into_inner);
            *touches = Histogram::new();
        }
        *self.mode.lock().unwrap_or_else(PoisonError::into_inner) = mode;
        self.changes.fetch_add(1, Relaxed);
    }

    /// So many more bytes were written to the file, or read from it.
    fn count(&self, bytes: u64) {
        self.disk_bytes.fetch_add(bytes, Relaxed);
    }

    fn report(&self, began: Instant) -> String {
        let touches = self.touches.lock().unwrap_or_else(PoisonError::into_inner);
        format!(
            r#"{{"mode":"{}","uptime_us":{},"pages":{},"loops":{},"disk_bytes":{},"touches_ns":{}}}"#,
            self.mode().name(),
            began.elapsed().as_micros(),
            self.pages.load(Relaxed),
            self.loops.load(Relaxed),
            self.disk_bytes.load(Relaxed),
            touches.json(),
        )
    }
}

/// The working set: atomics, because the compiler must neither drop nor reorder what is done to them.
struct Set(Vec<AtomicU64>);

impl Set {
    fn filled(mib: usize) -> Set {
        let mut noise = 0x9e37_79b9_7f4a_7c15;
        let words = (0..mib << 17).map(|_| AtomicU64::new(next(&mut noise)));
        Set(words.collect())
    }

    fn pages(&self) -> usize {
        self.0.len() / WORDS
    }
}

/// xorshift64 (Marsaglia, 2003).
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn work(set: &Set, disk: Option<Disk>, shared: &Shared) {
    let mut disk = disk;
    let mut random = 88_172_645_463_325_252;
    let mut at = 0;
    loop {
        let change = shared.changes.load(Relaxed);
        let same = || shared.changes.load(Relaxed) == change;
        match shared.mode() {
            Mode::Idle => std::thread::sleep(10 * TICK),
            Mode::Disk { bytes_per_s } => use_disk(&mut disk, shared, |disk| {
                disk.write(bytes_per_s, same, |bytes| shared.count(bytes))
            }),
            Mode::Read { bytes, jumps } => use_disk(&mut disk, shared, |disk| {
                disk.read(bytes, jumps, same, |bytes| shared.count(bytes))
            }),
            Mode::Dirty { bytes_per_s } => dirty(set, shared, bytes_per_s, &mut at, same),
            Mode::Spin => {
                while same() {
                    for _ in 0..BATCH {
                        spin(set, &mut random);
                    }
                    shared.loops.fetch_add(BATCH, Relaxed);
                }
            }
            Mode::Touch => {
                while same() {
                    touch(set, shared, &mut random);
                }
            }
        }
    }
}

/// What fails ends the work: its counter stands still then.
fn use_disk(
    disk: &mut Option<Disk>,
    shared: &Shared,
    work: impl FnOnce(&mut Disk) -> std::io::Result<()>,
) {
    let done = match disk {
        Some(disk) => work(disk),
        None => Err(std::io::Error::other("there is no file")),
    };
    if let Err(error) = done {
        eprintln!("memory-load: the file: {error}");
        shared.set(Mode::Idle);
    }
}

fn dirty(set: &Set, shared: &Shared, bytes_per_s: u64, at: &mut usize, same: impl Fn() -> bool) {
    let a_page = Duration::from_secs_f64(4096.0 / bytes_per_s.max(1) as f64);
    let mut due = Instant::now();
    while same() {
        let now = Instant::now();
        due = due.max(now.checked_sub(LAG).unwrap_or(now));
        let mut written = 0;
        while due <= now {
            set.0[*at * WORDS].fetch_add(1, Relaxed);
            *at = (*at + 1) % set.pages();
            written += 1;
            due += a_page;
        }
        shared.pages.fetch_add(written, Relaxed);
        std::thread::sleep(TICK);
    }
}

fn spin(set: &Set, random: &mut u64) {
    let page = next(random) as usize % set.pages() * WORDS;
    let words = &set.0[page..page + WORDS];
    let sum = words
        .iter()
        .fold(0u64, |sum, word| sum.rotate_left(5) ^ word.load(Relaxed));
    words[sum as usize % WORDS].store(sum, Relaxed);
}

fn touch(set: &Set, shared: &Shared, random: &mut u64) {
    let mut times = [0; BATCH as usize];
    for time in &mut times {
        let word = &set.0[next(random) as usize % set.pages() * WORDS];
        let mut before = Instant::now();
        let due = before + BETWEEN;
        while before < due {
            before = Instant::now();
        }
        std::hint::black_box(word.load(Relaxed));
        *time = u64::try_from(before.elapsed().as_nanos()).unwrap_or(u64::MAX);
    }
    let mut touches = shared
        .touches
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    for time in times {
        touches.add(time);
    }
}

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let port: Option<u16> = args.next().and_then(|text| text.parse().ok());
    let mib: Option<usize> = args.next().and_then(|text| text.parse().ok());
    let (Some(port), Some(mib @ 1..)) = (port, mib) else {
        eprintln!("usage: memory-load PORT MIB [FILE MIB]");
        return ExitCode::from(2);
    };
    let disk = match (args.next(), args.next().and_then(|text| text.parse().ok())) {
        (Some(path), Some(mib @ 1..)) => match Disk::filled(&path, mib) {
            Ok(disk) => Some(disk),
            Err(error) => {
                eprintln!("memory-load: cannot fill {path}: {error}");
                return ExitCode::FAILURE;
            }
        },
        _ => None,
    };
    let began = Instant::now();
    let set = Set::filled(mib);
    let socket = match UdpSocket::bind(("0.0.0.0", port)) {
        Ok(socket) => socket,
        Err(error) => {
            eprintln!("memory-load: cannot bind port {port}: {error}");
            return ExitCode::FAILURE;
        }
    };
    let shared = Arc::new(Shared {
        mode: Mutex::new(Mode::Idle),
        changes: AtomicU64::new(0),
        pages: AtomicU64::new(0),
        loops: AtomicU64::new(0),
        disk_bytes: AtomicU64::new(0),
        touches: Mutex::new(Histogram::new()),
    });
    let worker = Arc::clone(&shared);
    std::thread::spawn(move || work(&set, disk, &worker));
    println!("memory-load: port {port}, {mib} MiB");
    let mut request = [0; 128];
    let mut last = None;
    loop {
        // An error belongs to one datagram (an ICMP answer to an earlier one): the next is served all the same.
        let Ok((length, peer)) = socket.recv_from(&mut request) else {
            continue;
        };
        let text = String::from_utf8_lossy(&request[..length]);
        let Some((number, mode)) = parse(&text) else {
            continue;
        };
        // A request that comes again was answered with a lost datagram: its effect is there already.
        if last != Some(number) {
            last = Some(number);
            mode.into_iter().for_each(|mode| shared.set(mode));
        }
        let _ = socket.send_to(
            format!("{number} {}", shared.report(began)).as_bytes(),
            peer,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_verbs_with_a_number() {
        assert_eq!(parse("7 idle"), Some((7, Some(Mode::Idle))));
        let dirty = Mode::Dirty {
            bytes_per_s: 20_000_000,
        };
        assert_eq!(parse("8 dirty 20000000\n"), Some((8, Some(dirty))));
        let disk = Mode::Disk { bytes_per_s: 5 };
        assert_eq!(parse("8 disk 5"), Some((8, Some(disk))));
        let pick = Mode::Read {
            bytes: 4096,
            jumps: true,
        };
        assert_eq!(parse("8 pick 4096"), Some((8, Some(pick))));
        assert_eq!(parse("9 report"), Some((9, None)));
        for junk in [
            "",
            "7",
            "idle",
            "7 dirty",
            "7 dirty x",
            "7 scan 0",
            "7 scan 2097152",
            "7 pick 1000",
            "7 idle now",
            "x idle",
            "7 jump",
        ] {
            assert_eq!(parse(junk), None, "{junk}");
        }
    }
}
