//! memcached under a client that knows each answer. Debian has no load generator for it.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;

use anyhow::{Context, Result, ensure};

use super::load::{Client, Load};
use super::place::Place;

/// The container.
pub(super) const CONTAINER: &str = "memcached";
/// Its port.
pub(super) const PORT: u16 = 11211;

/// The container as part of a pod.
pub(super) fn container(image: &str) -> String {
    format!(
        "    - name: {CONTAINER}
      image: {image}
      command: [memcached]
      args: [-u, memcache, -l, 0.0.0.0, -m, '32']
"
    )
}

/// The load.
pub(super) struct Server(Client<Memcached>);

/// A connection, in memcached's text protocol.
struct Memcached(BufReader<TcpStream>);

impl Memcached {
    /// Sends one request and reads as many lines as the answer has.
    fn call(&mut self, request: &str, lines: usize) -> Result<String> {
        self.0.get_mut().write_all(request.as_bytes())?;
        let mut answer = String::new();
        for _ in 0..lines {
            let read = self.0.read_line(&mut answer)?;
            ensure!(read > 0, "the connection was closed");
        }
        Ok(answer.replace("\r\n", " ").trim_end().to_owned())
    }

    fn get(&mut self, number: u64) -> Result<()> {
        let value = format!("value {number}");
        let found = self.call(&format!("get key{number}\r\n"), 3)?;
        let wanted = format!("VALUE key{number} 0 {} {value} END", value.len());
        ensure!(found == wanted, "get key{number} answers `{found}`");
        Ok(())
    }
}

impl Server {
    /// Starts it.
    ///
    /// # Errors
    /// memcached does not answer.
    pub(super) fn start(place: &Place<'_>) -> Result<Self> {
        let mut memcached = Memcached(BufReader::new(place.connect(PORT)?));
        let stored = memcached.call("set counter 0 0 1\r\n0\r\n", 1)?;
        ensure!(stored == "STORED", "memcached answers `{stored}`");
        Ok(Self(Client::start(memcached, |memcached, number| {
            let counted = memcached.call("incr counter 1\r\n", 1)?;
            ensure!(
                counted == number.to_string(),
                "incr number {number} answers `{counted}`"
            );
            let value = format!("value {number}");
            let set = format!("set key{number} 0 0 {}\r\n{value}\r\n", value.len());
            let stored = memcached.call(&set, 1)?;
            ensure!(stored == "STORED", "set answers `{stored}`");
            memcached.get(number).context("after set")
        })))
    }
}

impl Load for Server {
    fn done(&self) -> u64 {
        self.0.done()
    }

    fn fault(&self) -> Option<String> {
        self.0.fault()
    }

    fn end(self: Box<Self>) -> Result<String> {
        let (mut memcached, rounds) = self.0.stop()?;
        // The last ones: the oldest may have been evicted, as a cache does.
        for number in rounds.saturating_sub(10_000).max(1)..=rounds {
            memcached.get(number)?;
        }
        Ok(format!("{rounds} rounds of a client that compares"))
    }
}
