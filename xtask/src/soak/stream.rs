//! A TCP stream in which nothing can be lost, doubled, reordered or changed without being seen.
//!
//! Both ends know every byte beforehand: a message's length and content follow from the connection's number, the
//! direction and the message's number. That is stronger than a checksum, and says which byte is wrong.
//!
//! ```text
//! hello    mark u64, number of the connection u64            client to server, once
//! message  mark u32, length u32, number u64, content         both ways, numbered from 0; integers are little-endian
//! ```
//!
//! The server answers each message with one of its own. Only `std`: the workload is compiled from this file by `rustc`
//! alone.

use std::fmt;
use std::io::{self, Read};

use super::blocks::{mix, nth};

/// Where the server listens.
pub const PORT: u16 = 7101;
/// Begins a connection.
const HELLO: u64 = 0x6d69_6772_6174_6f72;
/// Begins a message.
const MARK: u32 = 0x4d53_4721;
/// Bytes of a message before its content.
const HEADER: usize = 16;
/// Contents have 8 to so many bytes, in steps of 8.
const LONGEST: u64 = 8 << 10;

/// Who sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Who connected.
    Client,
    /// Who listened.
    Server,
}

/// A stream that is not what was sent.
#[derive(Debug)]
pub enum Fault {
    /// The connection broke.
    Broken(io::Error),
    /// It ended within a message, or its hello.
    Cut,
    /// What came is no hello.
    NoHello,
    /// What came is no beginning of a message.
    NoMessage {
        /// The number of the message that belongs here.
        expected: u64,
        /// Four bytes that came.
        found: u32,
    },
    /// A message is missing, doubled, or out of its turn.
    OutOfTurn {
        /// The number that belongs here.
        expected: u64,
        /// The one that came.
        found: u64,
    },
    /// A message has the wrong length.
    Length {
        /// Its number.
        number: u64,
        /// Bytes that it has.
        expected: u32,
        /// Bytes that it says it has.
        found: u32,
    },
    /// A message was changed on its way.
    Changed {
        /// Its number.
        number: u64,
        /// The first wrong byte of its content.
        offset: usize,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Broken(_) => f.write_str("the connection broke"),
            Self::Cut => f.write_str("the connection ended within a message"),
            Self::NoHello => f.write_str("the connection does not begin as it must"),
            Self::NoMessage { expected, found } => {
                write!(f, "{found:08x} comes where message {expected} begins")
            }
            Self::OutOfTurn { expected, found } => {
                write!(f, "message {found} comes where {expected} belongs")
            }
            Self::Length {
                number,
                expected,
                found,
            } => write!(
                f,
                "message {number} says it has {found} bytes, of which it has {expected}"
            ),
            Self::Changed { number, offset } => {
                write!(f, "message {number} is wrong from byte {offset} on")
            }
        }
    }
}

impl std::error::Error for Fault {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Broken(error) => Some(error),
            Self::Cut
            | Self::NoHello
            | Self::NoMessage { .. }
            | Self::OutOfTurn { .. }
            | Self::Length { .. }
            | Self::Changed { .. } => None,
        }
    }
}

/// The bytes that begin the connection of this number.
pub fn hello(connection: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&HELLO.to_le_bytes());
    bytes[8..].copy_from_slice(&connection.to_le_bytes());
    bytes
}

/// Reads them; the connection's number.
///
/// # Errors
/// Something else came.
pub fn read_hello(from: &mut impl Read) -> Result<u64, Fault> {
    let mut bytes = [0; 16];
    if !fill(from, &mut bytes)? {
        return Err(Fault::Cut);
    }
    if word(&bytes[..8]) != HELLO {
        return Err(Fault::NoHello);
    }
    Ok(word(&bytes[8..]))
}

/// One direction of a connection: what comes next in it.
#[derive(Clone, Debug)]
pub struct Messages {
    seed: u64,
    next: u64,
}

impl Messages {
    /// What this side sends on the connection of this number.
    pub fn of(connection: u64, side: Side) -> Self {
        let direction = match side {
            Side::Client => 1,
            Side::Server => 2,
        };
        Self {
            seed: mix(mix(connection).wrapping_add(direction)),
            next: 0,
        }
    }

    /// The next message's bytes, to be sent.
    pub fn write(&mut self) -> Vec<u8> {
        let number = self.next;
        self.next += 1;
        let length = self.length(number);
        let mut bytes = Vec::with_capacity(HEADER + length as usize);
        bytes.extend(MARK.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(number.to_le_bytes());
        bytes.extend(self.content(number));
        bytes
    }

    /// Reads the next message, and compares it; false if the stream has ended before it.
    ///
    /// # Errors
    /// It is not that message. Nothing more can be read then.
    pub fn read(&mut self, from: &mut impl Read) -> Result<bool, Fault> {
        let expected = self.next;
        let mut header = [0; HEADER];
        if !fill(from, &mut header)? {
            return Ok(false);
        }
        let half = |bytes: &[u8]| u32::try_from(word(bytes)).unwrap_or(u32::MAX);
        if half(&header[..4]) != MARK {
            return Err(Fault::NoMessage {
                expected,
                found: half(&header[..4]),
            });
        }
        let number = word(&header[8..]);
        if number != expected {
            return Err(Fault::OutOfTurn {
                expected,
                found: number,
            });
        }
        let length = self.length(number);
        if half(&header[4..8]) != length {
            return Err(Fault::Length {
                number,
                expected: length,
                found: half(&header[4..8]),
            });
        }
        let mut content = vec![0; length as usize];
        if !fill(from, &mut content)? {
            return Err(Fault::Cut);
        }
        let wrong = |(found, right): (&u8, u8)| *found != right;
        if let Some(offset) = content.iter().zip(self.content(number)).position(wrong) {
            return Err(Fault::Changed { number, offset });
        }
        self.next += 1;
        Ok(true)
    }

    fn length(&self, number: u64) -> u32 {
        let steps = 1 + mix(self.seed ^ mix(number)) % (LONGEST / 8);
        u32::try_from(steps * 8).unwrap_or(u32::MAX)
    }

    fn content(&self, number: u64) -> impl Iterator<Item = u8> {
        let seed = mix(self.seed.wrapping_add(number));
        let words = u64::from(self.length(number) / 8);
        (0..words).flat_map(move |index| nth(seed, index).to_le_bytes())
    }
}

/// Up to eight bytes as a little-endian number.
fn word(bytes: &[u8]) -> u64 {
    let digit = |number: u64, byte: &u8| number << 8 | u64::from(*byte);
    bytes.iter().rev().fold(0, digit)
}

/// Reads until the buffer is full; false if the stream ends before its first byte.
fn fill(from: &mut impl Read, buffer: &mut [u8]) -> Result<bool, Fault> {
    let mut done = 0;
    while done < buffer.len() {
        match from.read(&mut buffer[done..]) {
            Ok(0) if done == 0 => return Ok(false),
            Ok(0) => return Err(Fault::Cut),
            Ok(got) => done += got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Fault::Broken(error)),
        }
    }
    Ok(true)
}
