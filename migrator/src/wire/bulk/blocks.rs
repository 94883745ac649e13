//! Content of writable disks on the data connections. From version 3 on.

use bytes::Bytes;

use super::Codec;
use crate::wire::codec::{DecodeError, split_u8, split_u16, split_u32, split_u64};

/// What offsets and lengths are multiples of, in bytes.
pub const BLOCK: u64 = 4096;
/// Bytes of a disk that one frame may hold: 1 MiB.
pub const MAX_BLOCKS: u32 = 1 << 20;

pub(super) const RAW: u8 = 0x46;
pub(super) const PACKED: u8 = 0x47;
pub(super) const HOLE: u8 = 0x48;
pub(super) const BARRIER: u8 = 0x49;

/// Where in which disk. On the wire: `u16` disk, `u64` offset in bytes, a multiple of [`BLOCK`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index into [`Offer::disks`](crate::wire::message::Offer::disks).
    pub disk: u16,
    /// Bytes from its start.
    pub offset: u64,
}

/// A piece of a disk, or the end of a round of them. Lengths are multiples of [`BLOCK`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Blocks {
    /// Content as it is, up to [`MAX_BLOCKS`] bytes. Place, `u32` length, raw.
    Raw {
        /// Where it belongs.
        at: Place,
        /// The content.
        raw: Bytes,
    },
    /// Content in fewer bytes. Place, `u32` length, `u8` codec, packed bytes: at least one, and fewer than the content has.
    Packed {
        /// Where it belongs.
        at: Place,
        /// Bytes of the content, up to [`MAX_BLOCKS`].
        len: u32,
        /// How it is packed.
        codec: Codec,
        /// The packed bytes.
        raw: Bytes,
    },
    /// Zeros, of which nothing need be kept. Place, `u64` length.
    Hole {
        /// Where it begins.
        at: Place,
        /// Its length in bytes, at least one block.
        len: u64,
    },
    /// Nothing of this round of disks or an earlier one follows on this connection. `u32` round.
    Barrier {
        /// The round of disks, from 1; rounds of memory are counted apart.
        round: u32,
    },
}

impl Blocks {
    pub(super) const fn kind(&self) -> u8 {
        match self {
            Self::Raw { .. } => RAW,
            Self::Packed { .. } => PACKED,
            Self::Hole { .. } => HOLE,
            Self::Barrier { .. } => BARRIER,
        }
    }

    pub(super) fn head(&self, out: &mut Vec<u8>) {
        match self {
            Self::Raw { at, raw } => {
                at.put(out);
                out.extend_from_slice(&(raw.len() as u32).to_le_bytes());
            }
            Self::Packed { at, len, codec, .. } => {
                at.put(out);
                out.extend_from_slice(&len.to_le_bytes());
                out.push(codec.byte());
            }
            Self::Hole { at, len } => {
                at.put(out);
                out.extend_from_slice(&len.to_le_bytes());
            }
            Self::Barrier { round } => out.extend_from_slice(&round.to_le_bytes()),
        }
    }

    pub(super) fn tail(&self) -> &[u8] {
        match self {
            Self::Raw { raw, .. } | Self::Packed { raw, .. } => raw,
            Self::Hole { .. } | Self::Barrier { .. } => &[],
        }
    }

    pub(super) fn decode(kind: u8, mut payload: Bytes) -> Result<Self, DecodeError> {
        let name = "Blocks";
        let payload = &mut payload;
        let decoded = match kind {
            RAW => {
                let at = Place::split(name, payload)?;
                let len = split_u32(name, payload)?;
                let raw = std::mem::take(payload);
                (at.holds(u64::from(len)) && len <= MAX_BLOCKS && raw.len() == len as usize)
                    .then_some(Self::Raw { at, raw })
            }
            PACKED => {
                let at = Place::split(name, payload)?;
                let len = split_u32(name, payload)?;
                let codec = Codec::of_byte(split_u8(name, payload)?);
                let raw = std::mem::take(payload);
                let fits = at.holds(u64::from(len))
                    && len <= MAX_BLOCKS
                    && (1..len as usize).contains(&raw.len());
                codec.filter(|_| fits).map(|codec| Self::Packed {
                    at,
                    len,
                    codec,
                    raw,
                })
            }
            HOLE => {
                let at = Place::split(name, payload)?;
                let len = split_u64(name, payload)?;
                at.holds(len).then_some(Self::Hole { at, len })
            }
            _ => Some(Self::Barrier {
                round: split_u32(name, payload)?,
            }),
        };
        decoded
            .filter(|_| payload.is_empty())
            .ok_or(DecodeError::Malformed(name))
    }
}

impl Place {
    fn put(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.disk.to_le_bytes());
        out.extend_from_slice(&self.offset.to_le_bytes());
    }

    fn split(name: &'static str, payload: &mut Bytes) -> Result<Self, DecodeError> {
        Ok(Self {
            disk: split_u16(name, payload)?,
            offset: split_u64(name, payload)?,
        })
    }

    /// Whether `len` bytes from here are whole blocks within any file. The receiver still checks against its disk.
    fn holds(self, len: u64) -> bool {
        let end = self.offset.checked_add(len);
        self.offset.is_multiple_of(BLOCK)
            && len.is_multiple_of(BLOCK)
            && len > 0
            && end.is_some_and(|end| end <= i64::MAX as u64)
    }
}
