//! A server that answers what no registry may: real HTTP, and lies in it.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result};

/// The server. It ends with its guard.
pub struct Liar {
    address: String,
    over: Arc<AtomicBool>,
    listening: Option<JoinHandle<()>>,
}

impl Liar {
    /// A server that writes what `answer` gives for a request's path. It is given the server's address, too.
    ///
    /// # Errors
    /// No port is free.
    pub fn start(answer: impl Fn(&str, &str) -> Vec<u8> + Send + Sync + 'static) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?.to_string();
        let over = Arc::new(AtomicBool::new(false));
        let (own, at) = (Arc::clone(&over), address.clone());
        let listening = std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if own.load(Ordering::SeqCst) {
                    return;
                }
                // A client that has heard enough goes away.
                let _ = serve(client, |path| answer(path, &at));
            }
        });
        Ok(Self {
            address,
            over,
            listening: Some(listening),
        })
    }

    /// Host and port.
    pub fn address(&self) -> &str {
        &self.address
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        // Wakes the listener.
        let _ = TcpStream::connect(&self.address);
        if let Some(listening) = self.listening.take() {
            let _ = listening.join();
        }
    }
}

fn serve(mut client: TcpStream, answer: impl Fn(&str) -> Vec<u8>) -> Result<()> {
    let mut reader = BufReader::new(client.try_clone()?);
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let path = first.split(' ').nth(1).context("no request")?;
    Ok(client.write_all(&answer(path))?)
}

/// An answer with a body, after which the connection ends.
pub fn answer(status: &str, headers: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\n{headers}Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
    .into_bytes()
}
