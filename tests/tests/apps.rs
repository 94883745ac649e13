//! Programs as people run them, in images that other tools made.
#![allow(missing_docs, unreachable_pub)]

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use migrator_tests::images;
use migrator_tests::lab::{POD, POD_IPV4, SOON, TestLab};
use xtask::lab::Node;
use xtask::netns;
use xtask::process::poll_until;

/// Far more than a switchover, far less than TCP's patience.
const ANSWERS_WITHIN: Duration = Duration::from_secs(10);

/// A connection to redis, in its own protocol (RESP 2).
struct Redis(BufReader<TcpStream>);

impl Redis {
    /// Connects from the client's namespace.
    fn connect(test: &TestLab) -> Result<Self> {
        let server: SocketAddr = format!("{POD_IPV4}:6379").parse()?;
        let stream = netns::within(&test.lab().client(), || {
            Ok(TcpStream::connect_timeout(&server, Duration::from_secs(2))?)
        })?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWERS_WITHIN))?;
        stream.set_write_timeout(Some(ANSWERS_WITHIN))?;
        Ok(Self(BufReader::new(stream)))
    }

    fn call(&mut self, words: &[&str]) -> Result<String> {
        self.send(words)?;
        self.answer().with_context(|| words.join(" "))
    }

    fn send(&mut self, words: &[&str]) -> Result<()> {
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            request += &format!("${}\r\n{word}\r\n", word.len());
        }
        Ok(self.0.get_mut().write_all(request.as_bytes())?)
    }

    /// One answer; the elements of an array are joined by spaces.
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

/// Writes and reads all the time, over one connection, until it is told to stop.
struct Client {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    thread: JoinHandle<Result<Redis>>,
}

impl Client {
    fn start(mut redis: Redis) -> Self {
        let (stop, done) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let thread = std::thread::spawn({
            let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
            move || {
                while !stop.load(Ordering::Relaxed) {
                    let number = (done.load(Ordering::Relaxed) + 1).to_string();
                    let (key, value) = (format!("key:{number}"), format!("value of {number}"));
                    let counted = redis.call(&["INCR", "counter"])?;
                    ensure!(counted == number, "INCR number {number} answers {counted}");
                    let stored = redis.call(&["SET", &key, &value])?;
                    ensure!(stored == "OK", "SET answers {stored}");
                    let found = redis.call(&["GET", &key])?;
                    ensure!(found == value, "GET {key} answers {found}");
                    done.fetch_add(1, Ordering::Relaxed);
                }
                Ok(redis)
            }
        });
        Self { stop, done, thread }
    }

    /// Waits until it has done some more.
    fn goes_on(&self) -> Result<()> {
        let enough = self.done.load(Ordering::Relaxed) + 50;
        let far = poll_until(SOON, || {
            self.done.load(Ordering::Relaxed) >= enough || self.thread.is_finished()
        });
        ensure!(
            far && !self.thread.is_finished(),
            "the client stands still, or its connection broke"
        );
        Ok(())
    }

    /// The connection, and how many times it went round.
    fn stop(self) -> Result<(Redis, u64)> {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self
            .thread
            .join()
            .map_err(|_| anyhow!("the client panicked"))?;
        Ok((ended?, self.done.load(Ordering::Relaxed)))
    }
}

fn pod() -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata:
  name: {POD}
  annotations:
    migrator/ipv4: {POD_IPV4}/24
    migrator/vm-memory: 256Mi
spec:
  containers:
    - name: redis
      image: {}
      command: [/usr/bin/redis-server]
      args: [--protected-mode, 'no', --bind, '*', --save, '']
",
        images::REDIS
    )
}

#[test]
fn redis_keeps_its_clients_connections() -> Result<()> {
    let test = TestLab::up()?;
    let image = images::redis(test.project())?;
    test.import(Node::A, &image, &["--name", images::REDIS])?;
    test.run(Node::A, &pod(), &[])?;
    let mut redis = None;
    poll_until(SOON, || {
        redis = Redis::connect(&test).ok();
        redis.is_some()
    });
    let redis = redis.context("redis takes no connection")?;
    // One that only waits.
    let mut reader = Redis::connect(&test)?;
    reader.call(&["SUBSCRIBE", "news"])?;
    let client = Client::start(redis);
    for from in [Node::A, Node::B] {
        client.goes_on()?;
        let moved = test.moves(from);
        if moved.is_err() || client.thread.is_finished() {
            client.stop()?;
            moved?;
            bail!("the client stopped by itself");
        }
    }
    client.goes_on()?;
    let (mut redis, rounds) = client.stop()?;
    ensure!(redis.call(&["GET", "counter"])? == rounds.to_string());
    ensure!(redis.call(&["DBSIZE"])? == (rounds + 1).to_string());
    for number in 1..=rounds {
        let found = redis.call(&["GET", &format!("key:{number}")])?;
        ensure!(
            found == format!("value of {number}"),
            "key {number} holds {found}"
        );
    }
    ensure!(
        redis.call(&["PUBLISH", "news", "moved"])? == "1",
        "the waiting client is gone"
    );
    let news = reader.answer()?;
    ensure!(
        news == "message news moved",
        "the waiting client hears {news}"
    );
    test.end()
}
