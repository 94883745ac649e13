//! What crosses the data connections and the urgent one: a fixed little-endian header, then raw bytes that are never copied.

mod blocks;

use bytes::{Buf, Bytes};
use vm_runtime::units::{PAGE_SIZE, PageIndex};

use crate::wire::codec::{DecodeError, Message, split_u8, split_u32, split_u64};
use crate::wire::frame::Lane;
use crate::wire::message::{Bound, Flows};

pub use blocks::{BLOCK, Blocks, MAX_BLOCKS, Place};

/// Pages that one `Pages` frame may hold: 1 MiB.
pub const MAX_PAGES: u32 = 256;

pub(super) const PAGES: u8 = 0x41;
const ZEROS: u8 = 0x42;
const BARRIER: u8 = 0x43;
const CHUNK: u8 = 0x44;
const ABSENT: u8 = 0x4a;
pub(super) const PACKED: u8 = 0x45;
const PACKET: u8 = 0x61;
const PACKET_ACK: u8 = 0x62;
const FLOWS: u8 = 0x63;
const BOUND: u8 = 0x64;

/// Bytes before the raw pages of a `Pages` frame: first page and count.
pub(super) const PAGES_HEAD: usize = 8 + 4;

/// Bytes before the packed ones of a `Packed` frame: first page, count and codec.
pub(super) const PACKED_HEAD: usize = PAGES_HEAD + 1;

/// How pages are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codec {
    /// The LZ4 block format, without a length before it.
    Lz4,
    /// A Zstandard frame (RFC 8878).
    Zstd,
}

impl Codec {
    /// Its number on the wire; 0 is none.
    pub const fn byte(self) -> u8 {
        match self {
            Self::Lz4 => 1,
            Self::Zstd => 2,
        }
    }

    const fn of_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Lz4),
            2 => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// A message of a data connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    /// `raw.len() / PAGE_SIZE` consecutive pages (1 to [`MAX_PAGES`]). `u64` first, `u32` count, raw.
    Pages {
        /// The first page.
        first: PageIndex,
        /// Their content.
        raw: Bytes,
    },
    /// Consecutive pages (1 to [`MAX_PAGES`]) in fewer bytes. `u64` first, `u32` count, `u8` codec, packed bytes: at least one, and
    /// fewer than the pages have. Whoever unpacks them must get exactly the pages' bytes.
    Packed {
        /// The first page.
        first: PageIndex,
        /// How many pages.
        count: u32,
        /// How they are packed.
        codec: Codec,
        /// The packed bytes.
        raw: Bytes,
    },
    /// Consecutive pages of zeros. `u64` first, `u64` count.
    Zeros {
        /// The first page.
        first: PageIndex,
        /// How many, at least 1.
        count: u64,
    },
    /// Nothing of this round or an earlier one follows on this connection. `u32` round.
    Barrier {
        /// The round, from 1.
        round: u32,
    },
    /// A chunk of an image. 32 bytes digest, raw.
    Chunk {
        /// SHA-256 that the raw bytes must have; the receiver checks.
        digest: [u8; 32],
        /// The content.
        raw: Bytes,
    },
    /// A chunk that was asked for, and is not here. 32 bytes digest. From version 4 on.
    Absent {
        /// Its SHA-256.
        digest: [u8; 32],
    },
    /// Content of a writable disk. From version 3 on.
    Disk(Blocks),
}

impl Message for Data {
    const LANE: Lane = Lane::Data;

    fn kind(&self) -> u8 {
        match self {
            Self::Pages { .. } => PAGES,
            Self::Zeros { .. } => ZEROS,
            Self::Barrier { .. } => BARRIER,
            Self::Chunk { .. } => CHUNK,
            Self::Absent { .. } => ABSENT,
            Self::Packed { .. } => PACKED,
            Self::Disk(blocks) => blocks.kind(),
        }
    }

    fn head(&self, out: &mut Vec<u8>) {
        match self {
            Self::Pages { first, raw } => {
                out.extend_from_slice(&first.0.to_le_bytes());
                out.extend_from_slice(&((raw.len() / PAGE_SIZE) as u32).to_le_bytes());
            }
            Self::Packed {
                first,
                count,
                codec,
                raw: _,
            } => {
                out.extend_from_slice(&first.0.to_le_bytes());
                out.extend_from_slice(&count.to_le_bytes());
                out.push(codec.byte());
            }
            Self::Zeros { first, count } => {
                out.extend_from_slice(&first.0.to_le_bytes());
                out.extend_from_slice(&count.to_le_bytes());
            }
            Self::Barrier { round } => out.extend_from_slice(&round.to_le_bytes()),
            Self::Chunk { digest, .. } | Self::Absent { digest } => out.extend_from_slice(digest),
            Self::Disk(blocks) => blocks.head(out),
        }
    }

    fn tail(&self) -> &[u8] {
        match self {
            Self::Pages { raw, .. } | Self::Chunk { raw, .. } | Self::Packed { raw, .. } => raw,
            Self::Zeros { .. } | Self::Barrier { .. } | Self::Absent { .. } => &[],
            Self::Disk(blocks) => blocks.tail(),
        }
    }

    fn decode(kind: u8, mut payload: Bytes) -> Result<Self, DecodeError> {
        match kind {
            PAGES => {
                let bad = DecodeError::Malformed("Pages");
                let first = PageIndex(split_u64("Pages", &mut payload)?);
                let count = split_u32("Pages", &mut payload)?;
                let fits = (1..=MAX_PAGES).contains(&count)
                    && payload.len() == count as usize * PAGE_SIZE
                    && in_range(first, u64::from(count));
                fits.then_some(Self::Pages {
                    first,
                    raw: payload,
                })
                .ok_or(bad)
            }
            PACKED => {
                let bad = DecodeError::Malformed("Packed");
                let first = PageIndex(split_u64("Packed", &mut payload)?);
                let count = split_u32("Packed", &mut payload)?;
                let codec = Codec::of_byte(split_u8("Packed", &mut payload)?).ok_or(bad)?;
                let fits = (1..=MAX_PAGES).contains(&count)
                    && (1..count as usize * PAGE_SIZE).contains(&payload.len())
                    && in_range(first, u64::from(count));
                fits.then_some(Self::Packed {
                    first,
                    count,
                    codec,
                    raw: payload,
                })
                .ok_or(bad)
            }
            ZEROS => {
                let bad = DecodeError::Malformed("Zeros");
                let first = PageIndex(split_u64("Zeros", &mut payload)?);
                let count = split_u64("Zeros", &mut payload)?;
                let fits = payload.is_empty() && count > 0 && in_range(first, count);
                fits.then_some(Self::Zeros { first, count }).ok_or(bad)
            }
            BARRIER => {
                let round = split_u32("Barrier", &mut payload)?;
                payload
                    .is_empty()
                    .then_some(Self::Barrier { round })
                    .ok_or(DecodeError::Malformed("Barrier"))
            }
            CHUNK => {
                let digest = *payload
                    .first_chunk::<32>()
                    .ok_or(DecodeError::Malformed("Chunk"))?;
                payload.advance(32);
                Ok(Self::Chunk {
                    digest,
                    raw: payload,
                })
            }
            ABSENT => payload
                .as_ref()
                .try_into()
                .map(|digest| Self::Absent { digest })
                .map_err(|_| DecodeError::Malformed("Absent")),
            blocks::RAW..=blocks::BARRIER => Blocks::decode(kind, payload).map(Self::Disk),
            kind => Err(DecodeError::UnknownType {
                lane: Lane::Data,
                kind,
            }),
        }
    }
}

/// Whether the byte offsets of these pages fit a signed 64-bit file offset. The receiver still checks against its RAM.
fn in_range(first: PageIndex, count: u64) -> bool {
    first
        .0
        .checked_add(count)
        .is_some_and(|end| end <= i64::MAX as u64 / PAGE_SIZE as u64)
}

/// What an item of the packet log is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PacketKind {
    /// What was left in the TAP's queue when the VM stopped: precedes the log.
    Residue,
    /// A parked frame.
    Frame,
    /// No residue follows.
    ResidueEnd,
    /// The source's node has seen the announcement: nothing more comes the old way.
    End,
}

/// A message of the urgent connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Urgent {
    /// An item of the packet log. `u64` sequence number, `u8` kind, raw.
    Packet {
        /// Its place in the log.
        seq: u64,
        /// What it is.
        kind: PacketKind,
        /// virtio-net header and Ethernet frame; empty for the markers.
        frame: Bytes,
    },
    /// The destination has injected everything up to here. `u64` sequence number.
    PacketAck {
        /// The highest sequence number injected.
        seq: u64,
    },
    /// Flows that have begun since: before their first packets. Raw. From version 2 on.
    Flows(Flows),
    /// The same of flows that the source translates. Raw. From version 3 on.
    Bound(Bound),
}

impl Message for Urgent {
    const LANE: Lane = Lane::Urgent;

    fn kind(&self) -> u8 {
        match self {
            Self::Packet { .. } => PACKET,
            Self::PacketAck { .. } => PACKET_ACK,
            Self::Flows(_) => FLOWS,
            Self::Bound(_) => BOUND,
        }
    }

    fn head(&self, out: &mut Vec<u8>) {
        match self {
            Self::Packet { seq, kind, .. } => {
                out.extend_from_slice(&seq.to_le_bytes());
                out.push(match kind {
                    PacketKind::Residue => 1,
                    PacketKind::Frame => 2,
                    PacketKind::ResidueEnd => 3,
                    PacketKind::End => 4,
                });
            }
            Self::PacketAck { seq } => out.extend_from_slice(&seq.to_le_bytes()),
            Self::Flows(_) | Self::Bound(_) => {}
        }
    }

    fn tail(&self) -> &[u8] {
        match self {
            Self::Packet { frame, .. } => frame,
            Self::PacketAck { .. } => &[],
            Self::Flows(Flows(raw)) | Self::Bound(Bound(raw)) => raw,
        }
    }

    fn decode(kind: u8, mut payload: Bytes) -> Result<Self, DecodeError> {
        match kind {
            PACKET => {
                let seq = split_u64("Packet", &mut payload)?;
                let kind = match split_u8("Packet", &mut payload)? {
                    1 => PacketKind::Residue,
                    2 => PacketKind::Frame,
                    3 => PacketKind::ResidueEnd,
                    4 => PacketKind::End,
                    _ => return Err(DecodeError::Malformed("Packet")),
                };
                Ok(Self::Packet {
                    seq,
                    kind,
                    frame: payload,
                })
            }
            PACKET_ACK => {
                let seq = split_u64("PacketAck", &mut payload)?;
                payload
                    .is_empty()
                    .then_some(Self::PacketAck { seq })
                    .ok_or(DecodeError::Malformed("PacketAck"))
            }
            FLOWS => Ok(Self::Flows(Flows(payload))),
            BOUND => Ok(Self::Bound(Bound(payload))),
            kind => Err(DecodeError::UnknownType {
                lane: Lane::Urgent,
                kind,
            }),
        }
    }
}
