//! Frames on a byte stream: COBS, so that `0x00` only ever means "here a frame ends".
//!
//! ```text
//!   wire   cobs(body) 00            Attach, Attached and Refused also begin with 00
//!   body   kind u8 | fields, little endian | crc32 (IEEE) of all before it
//!
//!   1 Attach    min u16, max u16, session [16], nonce u64, next_rx u64, fresh u8
//!   2 Attached  version u16, nonce u64, next_rx u64
//!   3 Refused   nonce u64, reason u8 (1 unknown session, 2 version)
//!   4 Data      seq u64, ack u64, payload
//!   5 Ack       ack u64
//!   6 Gap       (nothing): attach again, a frame is missing
//! ```
//!
//! The bytes of kinds 1 to 3 never change: they negotiate the version.

/// The longest payload of one Data frame, in bytes. A Configure request with its environment must fit.
pub const MAX_PAYLOAD: usize = 256 << 10;

/// The longest body: kind, sequence, acknowledgement, payload, checksum.
const MAX_BODY: usize = 1 + 8 + 8 + MAX_PAYLOAD + 4;

/// COBS adds one byte for each 254, and one.
const MAX_ENCODED: usize = MAX_BODY + MAX_BODY / 254 + 2;

/// Names one host's memory of the link; chosen at random by the host.
pub type SessionId = [u8; 16];

/// Why a guest did not attach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The host asked to resume a session that this guest does not have: attach fresh.
    UnknownSession,
    /// No version in common.
    Version,
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// The host takes the link.
    Attach {
        /// Oldest version the host speaks.
        min: u16,
        /// Newest version the host speaks.
        max: u16,
        /// The host's session.
        session: SessionId,
        /// Comes back in the answer, so that a late answer is not taken for this one's.
        nonce: u64,
        /// The first sequence number that the host has not received.
        next_rx: u64,
        /// Begin a session, rather than go on with one.
        fresh: bool,
    },
    /// The guest has attached.
    Attached {
        /// The version both will speak.
        version: u16,
        /// From the Attach.
        nonce: u64,
        /// The first sequence number that the guest has not received.
        next_rx: u64,
    },
    /// The guest has not attached, and changed nothing.
    Refused {
        /// From the Attach.
        nonce: u64,
        /// Why.
        reason: Refusal,
    },
    /// One message.
    Data {
        /// Its number in this direction, from 0.
        seq: u64,
        /// The first number that the sender has not received.
        ack: u64,
        /// The message.
        payload: Vec<u8>,
    },
    /// Everything before `ack` was received and dealt with.
    Ack {
        /// The first number that the sender has not received.
        ack: u64,
    },
    /// The guest saw a number out of turn and asks the host to attach again.
    Gap,
}

/// Appends `frame` as it goes on the wire.
///
/// The payload of a Data frame must not be longer than [`MAX_PAYLOAD`]; [`super::link`] sees to it.
pub fn encode(frame: &Frame, out: &mut Vec<u8>) {
    let mut body = Vec::new();
    match frame {
        Frame::Attach {
            min,
            max,
            session,
            nonce,
            next_rx,
            fresh,
        } => {
            body.push(1);
            body.extend(min.to_le_bytes());
            body.extend(max.to_le_bytes());
            body.extend(session);
            body.extend(nonce.to_le_bytes());
            body.extend(next_rx.to_le_bytes());
            body.push(u8::from(*fresh));
            out.push(0);
        }
        Frame::Attached {
            version,
            nonce,
            next_rx,
        } => {
            body.push(2);
            body.extend(version.to_le_bytes());
            body.extend(nonce.to_le_bytes());
            body.extend(next_rx.to_le_bytes());
            out.push(0);
        }
        Frame::Refused { nonce, reason } => {
            body.push(3);
            body.extend(nonce.to_le_bytes());
            body.push(match reason {
                Refusal::UnknownSession => 1,
                Refusal::Version => 2,
            });
            out.push(0);
        }
        Frame::Data { seq, ack, payload } => {
            body.reserve(payload.len() + 21);
            body.push(4);
            body.extend(seq.to_le_bytes());
            body.extend(ack.to_le_bytes());
            body.extend_from_slice(payload);
        }
        Frame::Ack { ack } => {
            body.push(5);
            body.extend(ack.to_le_bytes());
        }
        Frame::Gap => body.push(6),
    }
    body.extend(crc32fast::hash(&body).to_le_bytes());
    cobs_encode(&body, out);
    out.push(0);
}

/// Finds frames in a stream of bytes, whatever the pieces it comes in.
#[derive(Debug, Default)]
pub struct Decoder {
    encoded: Vec<u8>,
    overlong: bool,
    dropped: u64,
}

impl Decoder {
    /// A decoder at the beginning of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes from the stream and calls `each` for every whole frame, in order.
    ///
    /// What is not a frame (cut, corrupt, too long, of an unknown kind) is dropped and counted.
    pub fn push(&mut self, mut bytes: &[u8], mut each: impl FnMut(Frame)) {
        while let Some(end) = bytes.iter().position(|b| *b == 0) {
            self.keep(&bytes[..end]);
            bytes = &bytes[end + 1..];
            let whole = !std::mem::take(&mut self.overlong);
            if whole && self.encoded.is_empty() {
                continue;
            }
            match decode(&self.encoded).filter(|_| whole) {
                Some(frame) => each(frame),
                None => self.dropped += 1,
            }
            self.encoded.clear();
        }
        self.keep(bytes);
    }

    /// How many things between two delimiters were not a frame.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    fn keep(&mut self, bytes: &[u8]) {
        if self.overlong || self.encoded.len() + bytes.len() > MAX_ENCODED {
            self.overlong = true;
            self.encoded.clear();
        } else {
            self.encoded.extend_from_slice(bytes);
        }
    }
}

fn decode(encoded: &[u8]) -> Option<Frame> {
    let body = cobs_decode(encoded)?;
    let (rest, crc) = body.split_last_chunk::<4>()?;
    if body.len() > MAX_BODY || crc32fast::hash(rest) != u32::from_le_bytes(*crc) {
        return None;
    }
    let (kind, mut rest) = rest.split_first()?;
    let rest = &mut rest;
    let frame = match kind {
        1 => Frame::Attach {
            min: u16::from_le_bytes(take(rest)?),
            max: u16::from_le_bytes(take(rest)?),
            session: take(rest)?,
            nonce: u64::from_le_bytes(take(rest)?),
            next_rx: u64::from_le_bytes(take(rest)?),
            fresh: match take(rest)? {
                [0] => false,
                [1] => true,
                _ => return None,
            },
        },
        2 => Frame::Attached {
            version: u16::from_le_bytes(take(rest)?),
            nonce: u64::from_le_bytes(take(rest)?),
            next_rx: u64::from_le_bytes(take(rest)?),
        },
        3 => Frame::Refused {
            nonce: u64::from_le_bytes(take(rest)?),
            reason: match take(rest)? {
                [1] => Refusal::UnknownSession,
                [2] => Refusal::Version,
                _ => return None,
            },
        },
        4 => Frame::Data {
            seq: u64::from_le_bytes(take(rest)?),
            ack: u64::from_le_bytes(take(rest)?),
            payload: std::mem::take(rest).to_vec(),
        },
        5 => Frame::Ack {
            ack: u64::from_le_bytes(take(rest)?),
        },
        6 => Frame::Gap,
        _ => return None,
    };
    rest.is_empty().then_some(frame)
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = bytes.split_first_chunk::<N>()?;
    *bytes = tail;
    Some(*head)
}

/// Consistent overhead byte stuffing (Cheshire and Baker, 1997), without the closing zero.
fn cobs_encode(body: &[u8], out: &mut Vec<u8>) {
    out.reserve(body.len() + body.len() / 254 + 2);
    let mut code_at = out.len();
    let mut code = 1u8;
    out.push(0);
    for byte in body {
        if *byte != 0 {
            out.push(*byte);
            code += 1;
        }
        if *byte == 0 || code == 0xff {
            out[code_at] = code;
            code_at = out.len();
            code = 1;
            out.push(0);
        }
    }
    out[code_at] = code;
}

fn cobs_decode(mut encoded: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::with_capacity(encoded.len());
    while let Some((code, rest)) = encoded.split_first() {
        let run = usize::from(*code).checked_sub(1)?;
        if run > rest.len() {
            return None;
        }
        body.extend_from_slice(&rest[..run]);
        encoded = &rest[run..];
        if *code != 0xff && !encoded.is_empty() {
            body.push(0);
        }
    }
    Some(body)
}

#[cfg(test)]
mod tests;
