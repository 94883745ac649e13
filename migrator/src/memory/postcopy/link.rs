//! A fault connection without the runtime: whoever waits for a page waits for as few threads as possible.
//!
//! One thread reads; any thread writes, and what it writes is on its way when the call returns. TLS is rustls's, driven by hand: the
//! connection's state is locked for the moment of encryption or decryption only, never across a system call that blocks.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::BytesMut;
use rustls::{ClientConnection, Connection as Tls, ServerConnection};
use tokio_rustls::TlsStream;

use crate::wire::codec::{Message, encode};
use crate::wire::conn::{Connection, LinkError, STALL};
use crate::wire::fault::Fault;
use crate::wire::frame::{Lane, frame_size, take_frame};

/// Bytes of one read: a full frame and its TLS records.
const READ: usize = 80 << 10;

/// One connection, for a reading thread and any number of writing ones.
#[derive(Debug)]
pub(super) struct FaultLink {
    tcp: TcpStream,
    tls: Mutex<Tls>,
    /// Held from the encryption of a frame until it is in the socket: records must leave in their order.
    out: Mutex<Vec<u8>>,
    input: Mutex<BytesMut>,
}

impl FaultLink {
    /// Takes a connection whose preamble has been exchanged.
    ///
    /// # Errors
    /// What the socket says.
    pub(super) fn new(connection: Connection<Fault>) -> io::Result<Self> {
        let (tcp, mut tls): (_, Tls) = match connection.into_stream() {
            TlsStream::Client(stream) => {
                let (tcp, tls): (_, ClientConnection) = stream.into_inner();
                (tcp, tls.into())
            }
            TlsStream::Server(stream) => {
                let (tcp, tls): (_, ServerConnection) = stream.into_inner();
                (tcp, tls.into())
            }
        };
        // A frame is encrypted whole before it leaves.
        tls.set_buffer_limit(None);
        let tcp = tcp.into_std()?;
        tcp.set_nonblocking(false)?;
        tcp.set_write_timeout(Some(STALL))?;
        Ok(Self {
            tcp,
            tls: Mutex::new(tls),
            out: Mutex::default(),
            input: Mutex::default(),
        })
    }

    /// Writes a message, down to the socket.
    ///
    /// # Errors
    /// See [`LinkError`]. The connection is of no more use then.
    pub(super) fn send(&self, message: &Fault) -> Result<(), LinkError> {
        let mut frame = Vec::with_capacity(64 + message.tail().len());
        encode(message, &mut frame);
        let mut out = lock(&self.out);
        out.clear();
        {
            let mut tls = lock(&self.tls);
            tls.writer().write_all(&frame)?;
            while tls.wants_write() {
                tls.write_tls(&mut *out)?;
            }
        }
        (&self.tcp)
            .write_all(&out)
            .map_err(|error| match error.kind() {
                // What a socket with a timeout says when it is over.
                io::ErrorKind::WouldBlock => LinkError::Stalled(STALL),
                _ => error.into(),
            })
    }

    /// The next message; waits as long as it takes. For one thread at a time.
    ///
    /// # Errors
    /// See [`LinkError`]; [`LinkError::Closed`] is the orderly end, and what follows [`Self::close`].
    pub(super) fn next(&self) -> Result<Fault, LinkError> {
        let mut input = lock(&self.input);
        let mut raw = vec![0; READ];
        loop {
            if let Some(frame) = take_frame(&mut input, Lane::Fault)? {
                return Ok(Fault::decode(frame.kind, frame.payload)?);
            }
            // Checks the length before more is taken in.
            frame_size(&input, Lane::Fault)?;
            if self.decrypted(&mut input)? > 0 {
                continue;
            }
            let got = match (&self.tcp).read(&mut raw) {
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            if got == 0 {
                return Err(match input.is_empty() {
                    true => LinkError::Closed,
                    false => LinkError::Truncated,
                });
            }
            let mut records = &raw[..got];
            while !records.is_empty() {
                let mut tls = lock(&self.tls);
                tls.read_tls(&mut records)?;
                tls.process_new_packets().map_err(io::Error::other)?;
                drop(tls);
                self.decrypted(&mut input)?;
            }
        }
    }

    /// Moves what is decrypted into `input`; how much it was.
    fn decrypted(&self, input: &mut BytesMut) -> io::Result<usize> {
        let mut tls = lock(&self.tls);
        let mut plain = [0; 16 << 10];
        let mut total = 0;
        loop {
            match tls.reader().read(&mut plain) {
                // The peer says goodbye; what the socket holds is the end.
                Ok(0) => return Ok(total),
                Ok(got) => {
                    input.extend_from_slice(&plain[..got]);
                    total += got;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(total),
                Err(error) => return Err(error),
            }
        }
    }

    /// Ends the connection, from any thread: whoever reads or writes fails.
    pub(super) fn close(&self) {
        // One that the peer has ended is closed.
        let _ = self.tcp.shutdown(Shutdown::Both);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A thread that panicked here leaves a connection that fails at its next record, which ends it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
