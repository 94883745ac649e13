//! The receiving end of a data connection. It takes TLS apart again: rustls asks the socket for one record of 16 KiB at a time, and a
//! system call for each (with what the kernel does for TCP in it) costs more than the record's decryption.

use std::io::{self, BufRead};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

use crate::wire::conn::Stream;

/// What one system call may take: 16 records.
const READ: usize = 256 << 10;

/// Decrypted bytes of a connection on which this end says nothing.
#[derive(Debug)]
pub struct Inflow {
    tcp: TcpStream,
    tls: rustls::Connection,
    /// Encrypted bytes: those from `start` to `end` wait for rustls.
    buf: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Inflow {
    pub(super) fn new(stream: Stream) -> Self {
        let (tcp, tls) = match stream {
            TlsStream::Client(stream) => {
                let (tcp, tls) = stream.into_inner();
                (tcp, rustls::Connection::from(tls))
            }
            TlsStream::Server(stream) => {
                let (tcp, tls) = stream.into_inner();
                (tcp, rustls::Connection::from(tls))
            }
        };
        Self {
            tcp,
            tls,
            buf: vec![0; READ].into_boxed_slice(),
            start: 0,
            end: 0,
        }
    }

    /// Hands plaintext out, if there is any; `None` if more must come first.
    fn hand_out(&mut self, out: &mut ReadBuf<'_>) -> Option<io::Result<()>> {
        let mut reader = self.tls.reader();
        match reader.fill_buf() {
            // Nothing is the orderly end.
            Ok(data) => {
                let amount = data.len().min(out.remaining());
                out.put_slice(&data[..amount]);
                reader.consume(amount);
                Some(Ok(()))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) => Some(Err(error)),
        }
    }

    /// Gives rustls a record or so of what has come.
    fn decrypt(&mut self) -> io::Result<()> {
        let mut bytes = &self.buf[self.start..self.end];
        self.start += self.tls.read_tls(&mut bytes)?;
        let state = self.tls.process_new_packets();
        if self.tls.wants_write() {
            // An alert, or a new key that the peer asked for. A few bytes on an idle socket: they fit, or the connection is lost anyway.
            let mut out = Vec::new();
            self.tls.write_tls(&mut out)?;
            let _ = self.tcp.try_write(&out);
        }
        state.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(())
    }
}

impl AsyncRead for Inflow {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if let Some(done) = this.hand_out(out) {
                return Poll::Ready(done);
            }
            if this.start == this.end {
                let mut buf = ReadBuf::new(&mut this.buf);
                ready!(Pin::new(&mut this.tcp).poll_read(cx, &mut buf))?;
                (this.start, this.end) = (0, buf.filled().len());
            }
            // Without any bytes this tells rustls that no more will come.
            this.decrypt()?;
        }
    }
}
