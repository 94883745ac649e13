//! nginx under wrk, beside a client that compares each body.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, TcpStream};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::load::{Client, Load, Program};
use super::place::{Place, connect};
use crate::cmd;

/// The container.
pub(super) const CONTAINER: &str = "nginx";
/// Its port.
pub(super) const PORT: u16 = 80;

/// The page has the numbers up to this one.
const LAST: u32 = 8_000;

/// What wrk takes to end.
const ENDS_WITHIN: Duration = Duration::from_secs(60);

/// The container as part of a pod.
pub(super) fn container(image: &str) -> String {
    format!(
        "    - name: {CONTAINER}
      image: {image}
      command: [/bin/sh, -c, 'seq 1 {LAST} > /var/www/html/numbers && exec nginx -g \"daemon off;\"']
"
    )
}

/// The load.
pub(super) struct Server {
    client: Client<Browser>,
    wrk: Mutex<Program>,
}

struct Browser {
    namespace: String,
    address: IpAddr,
    /// None: to be opened anew, as the server has said.
    stream: Option<BufReader<TcpStream>>,
    page: Vec<u8>,
}

impl Browser {
    fn get(&mut self) -> Result<()> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => BufReader::new(connect(&self.namespace, self.address, PORT)?),
        };
        stream
            .get_mut()
            .write_all(b"GET /numbers HTTP/1.1\r\nHost: apps\r\n\r\n")?;
        let (mut length, mut close) = (None, false);
        let mut line = String::new();
        for number in 0.. {
            line.clear();
            stream.read_line(&mut line)?;
            let text = line.strip_suffix("\r\n");
            let text = text.context("the connection was closed")?;
            if number == 0 {
                ensure!(text == "HTTP/1.1 200 OK", "nginx answers `{text}`");
            }
            if text.is_empty() {
                break;
            }
            match text.split_once(": ") {
                Some(("Content-Length", n)) => length = Some(n.parse::<usize>()?),
                Some(("Connection", how)) => close = how == "close",
                Some(_) | None => {}
            }
        }
        let mut body = vec![0; length.context("no Content-Length")?];
        stream.read_exact(&mut body)?;
        ensure!(body == self.page, "the page is another one");
        self.stream = (!close).then_some(stream);
        Ok(())
    }
}

impl Server {
    /// Starts it.
    ///
    /// # Errors
    /// wrk cannot be started.
    pub(super) fn start(place: &Place<'_>) -> Result<Self> {
        let url = format!("http://{}/numbers", place.address);
        // An hour is longer than any run: it is ended by SIGINT, as by ^C, and tells what there was.
        let words = ["-c", "16", "-t", "1", "-d", "10h", "--timeout", "30s", &url];
        let wrk = Program::start(place.namespace, &mut cmd::command("wrk", words))?;
        let browser = Browser {
            namespace: place.namespace.to_owned(),
            address: place.address.parse()?,
            stream: None,
            page: (1..=LAST)
                .map(|n| format!("{n}\n"))
                .collect::<String>()
                .into_bytes(),
        };
        Ok(Self {
            client: Client::start(browser, |browser, _| browser.get()),
            wrk: Mutex::new(wrk),
        })
    }
}

/// The requests that wrk has had answers to; none may have failed.
fn answered(summary: &str) -> Result<u64> {
    // wrk tells of these only where there were some.
    for word in ["Socket errors", "Non-2xx"] {
        ensure!(!summary.contains(word), "{summary}");
    }
    let line = summary.lines().find(|l| l.contains(" requests in "));
    let count = line.and_then(|l| l.split_whitespace().next());
    let count: u64 = count.with_context(|| summary.to_owned())?.parse()?;
    ensure!(count > 0, "{summary}");
    Ok(count)
}

impl Load for Server {
    fn done(&self) -> u64 {
        self.client.done()
    }

    fn fault(&self) -> Option<String> {
        let wrk = self
            .wrk
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .ended();
        self.client.fault().or(wrk)
    }

    fn end(self: Box<Self>) -> Result<String> {
        let wrk = self
            .wrk
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        wrk.signal(Signal::SIGINT)?;
        let count = answered(&wrk.ends_well(ENDS_WITHIN)?)?;
        let (_, pages) = self.client.stop()?;
        Ok(format!(
            "{count} requests of wrk, and {pages} pages that were compared"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_that_wrk_tells_of_are_errors() {
        let fine = "Running 600m test\n  5000 requests in 9.00s, 100MB read\nRequests/sec: 500\n";
        assert_eq!(answered(fine).unwrap(), 5000);
        for bad in [
            "  Socket errors: connect 0, read 1, write 0, timeout 0\n",
            "  Non-2xx or 3xx responses: 3\n",
        ] {
            assert!(answered(&(fine.to_owned() + bad)).is_err());
        }
        assert!(answered("").is_err());
    }
}
