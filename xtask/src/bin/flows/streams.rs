//! TCP connections of checked messages (see `stream.rs`), both ends.

use std::io::{BufReader, Write};
use std::net::{IpAddr, Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::kind::STREAM_PORT;
use crate::stream::{Messages, Side, hello, read_hello};

/// Between two messages of a connection.
const INTERVAL: Duration = Duration::from_millis(100);
/// Faults that are told.
const KEPT: usize = 8;

/// What is counted of all connections of this program.
#[derive(Default)]
pub(crate) struct Streams {
    connections: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
    faults: Mutex<Vec<String>>,
}

impl Streams {
    fn fault(&self, text: String) {
        eprintln!("flows: {text}");
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        if faults.len() < KEPT {
            faults.push(text);
        }
    }

    pub(crate) fn json(&self) -> String {
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        let texts: Vec<String> = faults
            .iter()
            .map(|text| format!("\"{}\"", text.replace(['"', '\\'], "'")))
            .collect();
        format!(
            r#"{{"connections":{},"sent":{},"received":{},"faults":[{}]}}"#,
            count(&self.connections),
            count(&self.sent),
            count(&self.received),
            texts.join(",")
        )
    }

    /// The receiver's end: each message is compared, and answered by one.
    pub(crate) fn answer(&self, mut socket: TcpStream) {
        let served = (|| {
            socket.set_nodelay(true).map_err(|e| e.to_string())?;
            let number = read_hello(&mut socket).map_err(|fault| fault.to_string())?;
            self.connections.fetch_add(1, Ordering::Relaxed);
            let (mut theirs, mut ours) = (
                Messages::of(number, Side::Client),
                Messages::of(number, Side::Server),
            );
            let mut from = BufReader::new(socket.try_clone().map_err(|e| e.to_string())?);
            while theirs.read(&mut from).map_err(|fault| fault.to_string())? {
                self.received.fetch_add(1, Ordering::Relaxed);
                socket
                    .write_all(&ours.write())
                    .map_err(|error| error.to_string())?;
                self.sent.fetch_add(1, Ordering::Relaxed);
            }
            Ok::<_, String>(())
        })();
        if let Err(text) = served {
            self.fault(format!("a stream: {text}"));
        }
    }

    /// A sender's end: numbered messages at a steady rate, until `stop`.
    pub(crate) fn begin(
        self: &Arc<Self>,
        to: IpAddr,
        number: u64,
        stop: &Arc<AtomicBool>,
    ) -> std::io::Result<()> {
        let mut socket = TcpStream::connect((to, STREAM_PORT))?;
        socket.set_nodelay(true)?;
        socket.write_all(&hello(number))?;
        self.connections.fetch_add(1, Ordering::Relaxed);
        let reader = socket.try_clone()?;
        let (streams, stopped) = (Arc::clone(self), Arc::clone(stop));
        std::thread::spawn(move || {
            let mut messages = Messages::of(number, Side::Client);
            while !stopped.load(Ordering::Relaxed) {
                if let Err(error) = socket.write_all(&messages.write()) {
                    return streams.fault(format!("a stream to {to}: cannot send: {error}"));
                }
                streams.sent.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(INTERVAL);
            }
            // The receiver answers what it has, and closes.
            let _ = socket.shutdown(Shutdown::Write);
        });
        let (streams, stopped) = (Arc::clone(self), Arc::clone(stop));
        std::thread::spawn(move || {
            let mut messages = Messages::of(number, Side::Server);
            let mut from = BufReader::new(reader);
            loop {
                match messages.read(&mut from) {
                    Ok(true) => {
                        streams.received.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(false) if stopped.load(Ordering::Relaxed) => return,
                    Ok(false) => return streams.fault(format!("the stream to {to} was closed")),
                    Err(fault) => return streams.fault(format!("a stream to {to}: {fault}")),
                }
            }
        });
        Ok(())
    }
}
