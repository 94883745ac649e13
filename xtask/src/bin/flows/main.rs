//! The traffic of `cargo xtask test soak --switchovers`: the sender and the receiver of numbered packets of every kind.
//!
//!     flows --own4 ADDRESS --own6 ADDRESS                                                       the receiver
//!     flows --own4 ADDRESS --own6 ADDRESS --to4 ADDRESS --to6 ADDRESS --sender N --rate PACKETS a sender
//!
//! With `--unicast`, a sender sends to no groups: pods that are routed hear of none.
//!
//! The receiver books what arrives, by sender and kind, and sends it back; a sender books the answers. Port 7200 of
//! either takes lines: `start RUN` and `stop` (senders), and `stats`, which is answered by one line of JSON.
//!
//! Built by `rustc` alone (std, static), so that the image needs no libraries.

// Of the memory check only its mixing of numbers is needed.
#[allow(dead_code)]
#[path = "../../soak/blocks.rs"]
pub mod blocks;
mod counters;
#[path = "../../soak/flows/kind.rs"]
pub mod kind;
mod receiver;
mod sender;
mod sockets;
#[path = "../../soak/stream.rs"]
pub mod stream;
mod streams;
#[path = "../../soak/flows/tally.rs"]
pub mod tally;

use std::error::Error;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use kind::{CONTROL_PORT, Kind};
use sockets::Own;

/// What answers orders.
trait Role: Send + Sync + 'static {
    /// Carries out an order; the line that answers it.
    fn order(&self, words: &[&str]) -> String;
}

/// An address may still be tentative when the program starts, and a port in use by the one before.
const READY_WITHIN: Duration = Duration::from_secs(20);

fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_micros() as u64)
}

/// Tries until it works, or has not for long enough.
fn patiently<T>(what: &str, attempt: impl Fn() -> io::Result<T>) -> Result<T, String> {
    let until = Instant::now() + READY_WITHIN;
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() >= until => return Err(format!("{what}: {error}")),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn argument(name: &str) -> Option<String> {
    let mut words = std::env::args();
    words.find(|word| word == name)?;
    words.next()
}

fn parse<T: std::str::FromStr>(name: &str) -> Result<T, String> {
    let text = argument(name).ok_or_else(|| format!("{name} is missing"))?;
    text.parse()
        .map_err(|_| format!("{name} {text} cannot be read"))
}

fn run() -> Result<(), Box<dyn Error>> {
    let own = Own {
        v4: parse("--own4")?,
        v6: parse("--own6")?,
    };
    let role: Arc<dyn Role> = if argument("--to4").is_some() {
        let to = Own {
            v4: parse("--to4")?,
            v6: parse("--to6")?,
        };
        let kinds = match std::env::args().any(|word| word == "--unicast") {
            true => Kind::unicast(),
            false => &Kind::ALL,
        };
        sender::open(own, to, kinds, (parse("--sender")?, parse("--rate")?))?
    } else {
        receiver::open(own)?
    };
    let listener = patiently("cannot listen", || {
        TcpListener::bind((own.v4, CONTROL_PORT))
    })?;
    println!("flows: ready");
    for client in listener.incoming().flatten() {
        let role = Arc::clone(&role);
        std::thread::spawn(move || serve(client, &*role));
    }
    Ok(())
}

fn serve(client: TcpStream, role: &dyn Role) {
    let Ok(mut answers) = client.try_clone() else {
        return;
    };
    for line in BufReader::new(client).lines().map_while(Result::ok) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let answer = role.order(&words) + "\n";
        if answers.write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("flows: {error}");
            ExitCode::FAILURE
        }
    }
}
