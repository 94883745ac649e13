//! A TCP relay before a registry that counts, breaks off, tampers, or is busy.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use anyhow::Result;

/// What the relay does to the registry's answers. Bytes are counted over all connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// Breaks off once, behind this many bytes.
    Once(u64),
    /// Breaks off every connection behind this many bytes of its own.
    Each(u64),
    /// Changes this one byte.
    Flip(u64),
    /// Changes a byte in the middle of each answer that is a part of a blob.
    Parts,
    /// Answers so many requests with 429, and says to come again after a second.
    Busy(u64),
}

/// The relay. It ends with its guard.
pub struct Relay {
    address: String,
    shared: Arc<Shared>,
    listening: Option<JoinHandle<()>>,
}

struct Shared {
    target: String,
    fault: Fault,
    bytes: AtomicU64,
    refused: AtomicU64,
    broken: AtomicBool,
    over: AtomicBool,
}

impl Relay {
    /// A relay to `target`, on a port of its own.
    ///
    /// # Errors
    /// No port is free.
    pub fn start(target: &str, fault: Fault) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?.to_string();
        let shared = Arc::new(Shared {
            target: target.to_owned(),
            fault,
            bytes: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            broken: AtomicBool::new(false),
            over: AtomicBool::new(false),
        });
        let own = Arc::clone(&shared);
        let listening = std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if own.over.load(Ordering::SeqCst) {
                    return;
                }
                let shared = Arc::clone(&own);
                // Ends with its connection.
                std::thread::spawn(move || shared.relay(client));
            }
        });
        Ok(Self {
            address,
            shared,
            listening: Some(listening),
        })
    }

    /// Host and port.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Bytes that went to clients, headers included.
    pub fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::SeqCst)
    }

    /// Requests that were answered with 429.
    pub fn refused(&self) -> u64 {
        self.shared.refused.load(Ordering::SeqCst)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        // Wakes the listener.
        let _ = TcpStream::connect(&self.address);
        if let Some(listening) = self.listening.take() {
            let _ = listening.join();
        }
    }
}

impl Shared {
    /// Serves one connection until either side ends it. Its errors are ends, too.
    fn relay(self: &Arc<Self>, mut client: TcpStream) {
        if let Fault::Busy(times) = self.fault {
            let counted = |n: u64| (n < times).then_some(n + 1);
            let order = Ordering::SeqCst;
            if self.refused.fetch_update(order, order, counted).is_ok() {
                let mut request = [0; 4096];
                let _ = client.read(&mut request);
                let _ = client.write_all(
                    b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
                );
                return;
            }
        }
        let Ok(mut server) = TcpStream::connect(&self.target) else {
            return;
        };
        let (Ok(mut requests), Ok(mut to_server)) = (client.try_clone(), server.try_clone()) else {
            return;
        };
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut requests, &mut to_server);
            let _ = to_server.shutdown(Shutdown::Write);
        });
        let mut own = 0;
        let mut buffer = vec![0; 16 << 10];
        while let Ok(n @ 1..) = server.read(&mut buffer) {
            let before = self.bytes.fetch_add(n as u64, Ordering::SeqCst);
            let over = match self.fault {
                Fault::None | Fault::Busy(_) => false,
                Fault::Parts => {
                    spoil(&mut buffer[..n]);
                    false
                }
                Fault::Once(at) => {
                    before + n as u64 > at && !self.broken.swap(true, Ordering::SeqCst)
                }
                Fault::Each(at) => own + n as u64 > at,
                Fault::Flip(at) => {
                    if (before..before + n as u64).contains(&at) {
                        buffer[(at - before) as usize] ^= 0xff;
                    }
                    false
                }
            };
            own += n as u64;
            if over || client.write_all(&buffer[..n]).is_err() {
                break;
            }
        }
        let _ = client.shutdown(Shutdown::Both);
        let _ = server.shutdown(Shutdown::Both);
    }
}

/// Changes the last byte of what came, if it begins with a part and has a beginning of its body.
fn spoil(came: &mut [u8]) {
    let is_part = came.starts_with(b"HTTP/1.1 206");
    let body = came.windows(4).position(|four| four == b"\r\n\r\n");
    if let (true, Some(body), Some(last)) = (is_part, body, came.len().checked_sub(1))
        && last >= body + 4
    {
        came[last] ^= 0xff;
    }
}
