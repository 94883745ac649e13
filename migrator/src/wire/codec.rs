//! From messages to frames and back.

use bytes::{Buf, Bytes};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::wire::frame::{self, Lane};

/// A frame whose content makes no sense. The connection is of no more use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// A type that this version of the protocol does not have.
    #[error(
        "a {lane:?} frame of the unknown type {kind:#04x} came: do both nodes run neighbouring versions?"
    )]
    UnknownType {
        /// The lane.
        lane: Lane,
        /// The type.
        kind: u8,
    },
    /// Too short, too long, or with values out of range.
    #[error("a malformed {0} message came: the peer is broken or of another version")]
    Malformed(&'static str),
}

/// A message of one lane: `head ++ tail` is its frame's payload.
pub trait Message: Sized + Send {
    /// The lane it belongs to.
    const LANE: Lane;

    /// The frame type; never 0.
    fn kind(&self) -> u8;

    /// Appends the small, computed part of the payload.
    fn head(&self, out: &mut Vec<u8>);

    /// The bulk of the payload, which is sent without a copy.
    fn tail(&self) -> &[u8] {
        &[]
    }

    /// Parses a frame. Bulk is sliced from `payload`, not copied.
    ///
    /// # Errors
    ///
    /// See [`DecodeError`].
    fn decode(kind: u8, payload: Bytes) -> Result<Self, DecodeError>;
}

/// Bytes of the whole frame of `message`.
pub fn size<M: Message>(message: &M) -> usize {
    let mut head = Vec::new();
    message.head(&mut head);
    frame::HEADER + head.len() + message.tail().len()
}

/// Appends the whole frame of `message` to `out`.
pub fn encode<M: Message>(message: &M, out: &mut Vec<u8>) {
    encode_head(message, out);
    out.extend_from_slice(message.tail());
}

/// Appends the frame of `message` up to its tail to `out`.
pub(crate) fn encode_head<M: Message>(message: &M, out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(&[0; frame::HEADER]);
    message.head(out);
    let payload = out.len() - start - frame::HEADER + message.tail().len();
    out[start..start + frame::HEADER].copy_from_slice(&frame::header(message.kind(), payload));
}

pub(crate) fn put_postcard<T: Serialize>(value: &T, out: &mut Vec<u8>) {
    let encoded = postcard::to_extend(value, std::mem::take(out));
    *out = encoded.expect("our own messages hold nothing that postcard cannot write");
}

pub(crate) fn get_postcard<T: DeserializeOwned>(
    name: &'static str,
    payload: &[u8],
) -> Result<T, DecodeError> {
    match split_postcard(name, payload)? {
        (value, []) => Ok(value),
        _ => Err(DecodeError::Malformed(name)),
    }
}

/// A value, and what follows it.
pub(crate) fn split_postcard<'a, T: DeserializeOwned>(
    name: &'static str,
    payload: &'a [u8],
) -> Result<(T, &'a [u8]), DecodeError> {
    postcard::take_from_bytes(payload).map_err(|_| DecodeError::Malformed(name))
}

pub(crate) fn split_u64(name: &'static str, payload: &mut Bytes) -> Result<u64, DecodeError> {
    payload
        .try_get_u64_le()
        .map_err(|_| DecodeError::Malformed(name))
}

pub(crate) fn split_u32(name: &'static str, payload: &mut Bytes) -> Result<u32, DecodeError> {
    payload
        .try_get_u32_le()
        .map_err(|_| DecodeError::Malformed(name))
}

pub(crate) fn split_u16(name: &'static str, payload: &mut Bytes) -> Result<u16, DecodeError> {
    payload
        .try_get_u16_le()
        .map_err(|_| DecodeError::Malformed(name))
}

pub(crate) fn split_u8(name: &'static str, payload: &mut Bytes) -> Result<u8, DecodeError> {
    payload
        .try_get_u8()
        .map_err(|_| DecodeError::Malformed(name))
}
