//! redis under redis-benchmark, beside a client that knows each answer, and one that only waits.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::load::{Client, Load, Program};
use super::place::Place;
use crate::cmd;
use crate::process::poll_until;

/// The container.
pub(super) const CONTAINER: &str = "redis";
/// Its port.
pub(super) const PORT: u16 = 6379;

/// Requests of one run of redis-benchmark: its connections live as long as a run, some seconds under emulation.
const REQUESTS: u64 = 40_000;

/// What a run may take on a busy machine.
const RUN_WITHIN: Duration = Duration::from_secs(240);

/// The key that redis-benchmark counts with, where it is not told to use many.
const COUNTED: &str = "counter:__rand_int__";

/// The container as part of a pod.
pub(super) fn container(image: &str) -> String {
    format!(
        "    - name: {CONTAINER}
      image: {image}
      command: [/usr/bin/redis-server]
      args: [--protected-mode, 'no', --bind, '*', --save, '']
"
    )
}

/// A connection to redis, in its own protocol (RESP 2).
pub(super) struct Redis(BufReader<TcpStream>);

impl Redis {
    /// One request and its answer; the elements of an array are joined by spaces.
    ///
    /// # Errors
    /// The connection breaks, or redis answers with an error.
    pub(super) fn call(&mut self, words: &[&str]) -> Result<String> {
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            request += &format!("${}\r\n{word}\r\n", word.len());
        }
        self.0.get_mut().write_all(request.as_bytes())?;
        self.answer().with_context(|| words.join(" "))
    }

    fn answer(&mut self) -> Result<String> {
        let line = self.line()?;
        let (kind, rest) = line.split_at_checked(1).context("an empty answer")?;
        match kind {
            "+" | ":" => Ok(rest.to_owned()),
            "$" => {
                let text = self.line()?;
                ensure!(
                    text.len() == rest.parse::<usize>()?,
                    "a string of {rest} bytes is `{text}`"
                );
                Ok(text)
            }
            "*" => {
                let elements: usize = rest.parse()?;
                let elements: Result<Vec<String>> = (0..elements).map(|_| self.answer()).collect();
                Ok(elements?.join(" "))
            }
            _ => bail!("redis answers {line}"),
        }
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        let whole = line.strip_suffix("\r\n");
        Ok(whole.context("the connection was closed")?.to_owned())
    }
}

/// The load.
pub(super) struct Server {
    client: Client<Redis>,
    benchmark: Client<()>,
    /// One that only waits.
    waiting: Redis,
    /// Ends redis-benchmark where the test has failed.
    _over: Over,
}

/// Dropped: nobody waits for a run any more.
struct Over(Arc<AtomicBool>);

impl Drop for Over {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Server {
    /// Starts it.
    ///
    /// # Errors
    /// redis does not answer.
    pub(super) fn start(place: &Place<'_>) -> Result<Self> {
        let open = || Ok::<_, anyhow::Error>(Redis(BufReader::new(place.connect(PORT)?)));
        let mut waiting = open()?;
        waiting.call(&["SUBSCRIBE", "news"])?;
        let client = Client::start(open()?, |redis, number| {
            let number = number.to_string();
            let (key, value) = (format!("key:{number}"), format!("value of {number}"));
            let counted = redis.call(&["INCR", "counter"])?;
            ensure!(counted == number, "INCR number {number} answers {counted}");
            let stored = redis.call(&["SET", &key, &value])?;
            ensure!(stored == "OK", "SET answers {stored}");
            let found = redis.call(&["GET", &key])?;
            ensure!(found == value, "GET {key} answers {found}");
            Ok(())
        });
        let (namespace, address) = (place.namespace.to_owned(), place.address.to_owned());
        let over = Arc::new(AtomicBool::new(false));
        let given_up = Arc::clone(&over);
        let benchmark = Client::start((), move |(), _| {
            let requests = REQUESTS.to_string();
            let words = [
                "-h", &address, "-t", "incr", "-c", "20", "-n", &requests, "--csv",
            ];
            let mut command = cmd::command("redis-benchmark", words);
            let mut program = Program::start(&namespace, &mut command)?;
            poll_until(RUN_WITHIN, || {
                program.ended().is_some() || given_up.load(Ordering::Relaxed)
            });
            let said = program.ends_well(Duration::ZERO)?;
            ensure!(!said.contains("Error") && said.contains("INCR"), "{said}");
            Ok(())
        });
        Ok(Self {
            client,
            benchmark,
            waiting,
            _over: Over(over),
        })
    }
}

impl Load for Server {
    fn done(&self) -> u64 {
        self.client.done()
    }

    fn fault(&self) -> Option<String> {
        self.client.fault().or_else(|| self.benchmark.fault())
    }

    fn end(self: Box<Self>) -> Result<String> {
        let ((), runs) = self.benchmark.stop()?;
        let (mut redis, rounds) = self.client.stop()?;
        let counted = redis.call(&["GET", COUNTED])?;
        ensure!(
            counted == (runs * REQUESTS).to_string(),
            "redis-benchmark was answered {} times, redis has counted {counted}",
            runs * REQUESTS
        );
        let counted = redis.call(&["GET", "counter"])?;
        ensure!(counted == rounds.to_string(), "{counted} of {rounds}");
        // The keys, and the two counters.
        let keys = redis.call(&["DBSIZE"])?;
        ensure!(
            keys == (rounds + 2).to_string(),
            "{keys} keys, {rounds} rounds"
        );
        for number in 1..=rounds {
            let found = redis.call(&["GET", &format!("key:{number}")])?;
            ensure!(
                found == format!("value of {number}"),
                "key {number} holds {found}"
            );
        }
        let heard = redis.call(&["PUBLISH", "news", "moved"])?;
        ensure!(heard == "1", "the waiting client is gone");
        let mut waiting = self.waiting;
        let news = waiting.answer()?;
        ensure!(
            news == "message news moved",
            "the waiting client hears {news}"
        );
        Ok(format!(
            "{} requests in {runs} runs of redis-benchmark, and {rounds} rounds of a client that compares",
            runs * REQUESTS
        ))
    }
}
