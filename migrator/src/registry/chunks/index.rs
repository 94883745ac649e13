//! The index of an image's chunks: what the image is, and where in the packs each of its chunks lies. Pure.
//!
//! All numbers are little-endian.
//!
//! ```text
//!  0          8  "MGCHUNK1"
//!  8          4  H, bytes of the head
//! 12          4  S, number of stored chunks
//! 16          4  U, number of first uses
//! 20          H  the head: JSON, see `Head`
//!          4 N  for each chunk of the image the number of its stored chunk, or 0xffff_ffff: all its bytes are zero
//!         48 S  for each stored chunk: SHA-256 of its plain bytes (32), offset in its pack (8), length there (4), number of its pack (4)
//!          4 U  chunks of the image, in the order in which a pod first used them
//! ```
//!
//! N is `erofs_size / chunk_size`, rounded up. A stored chunk is one zstd frame (RFC 8878) of its plain bytes; it is the plain bytes
//! themselves where its length is theirs. Nothing may follow.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::image::record::{BadRecord, MAX_EROFS_SIZE};
use crate::image::{Digest, ImageConfig, ImageRecord};

const MAGIC: &[u8; 8] = b"MGCHUNK1";
/// Bytes before the head.
const FIXED: usize = 20;
/// Bytes for one stored chunk.
const PLACE: usize = 48;
/// A chunk that is not stored: all its bytes are zero.
const ZERO: u32 = u32::MAX;
/// Longest head, in bytes: a configuration has a megabyte of text at most, which JSON may write six times as long.
const MAX_HEAD: usize = 8 << 20;
/// Most bytes of an index: the head, and the lists for the largest image in the smallest chunks.
pub(super) const MAX_INDEX: u64 =
    FIXED as u64 + MAX_HEAD as u64 + (MAX_EROFS_SIZE >> 16) * (4 + PLACE as u64 + 4);

/// Why an index is not used.
#[derive(Debug, thiserror::Error)]
pub enum BadIndex {
    /// Its beginning.
    #[error("it does not begin as an index of chunks does")]
    Magic,
    /// Its length.
    #[error("it has {found} bytes where its numbers ask for {expected}")]
    Length {
        /// As it came.
        found: u64,
        /// As its own numbers ask.
        expected: u64,
    },
    /// Its head.
    #[error("its head is not valid")]
    Head(#[from] serde_json::Error),
    /// Its head's length.
    #[error("its head has {0} bytes, more than {MAX_HEAD}")]
    LongHead(usize),
    /// It is of another image.
    #[error("it belongs to the image {0}")]
    OtherImage(Digest),
    /// The image.
    #[error("what it says of the image contradicts itself")]
    Record(#[from] BadRecord),
    /// A chunk without a place.
    #[error("chunk {0} of the image is at a place that is not there")]
    Place(u32),
    /// A stored chunk.
    #[error(
        "stored chunk {0} does not lie within its pack, has no length that it can have, or is nobody's"
    )]
    Stored(u32),
    /// The order of use.
    #[error("chunk {0} is used, and the image does not have it")]
    Use(u32),
}

/// What the index says of the image, beside its chunks.
#[derive(Debug, Serialize, Deserialize)]
struct Head {
    /// The image's manifest in the registry.
    manifest_digest: Digest,
    /// As in [`ImageRecord`].
    erofs_digest: Digest,
    erofs_size: u64,
    chunk_size: u32,
    config: ImageConfig,
}

/// Where a stored chunk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Digest of the plain bytes.
    pub(super) digest: Digest,
    /// Which pack.
    pub(super) pack: u32,
    /// Where in it, in bytes.
    pub(super) offset: u64,
    /// Bytes there.
    pub(super) length: u32,
    /// Bytes when it is plain.
    pub(super) plain: u32,
}

/// An index that agrees with itself and with its packs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkIndex {
    record: ImageRecord,
    /// For each chunk its stored chunk.
    stored: Vec<Option<u32>>,
    places: Vec<Place>,
    first_uses: Vec<u32>,
}

impl ChunkIndex {
    /// The image.
    pub fn record(&self) -> &ImageRecord {
        &self.record
    }

    /// Chunks of the image in the order in which a pod first used them; not all, maybe none.
    pub fn first_uses(&self) -> &[u32] {
        &self.first_uses
    }

    /// Where chunk `index` is; `None` if all its bytes are zero, or if the image does not have it.
    pub(super) fn place(&self, index: u32) -> Option<&Place> {
        let stored = (*self.stored.get(index as usize)?)?;
        self.places.get(stored as usize)
    }

    /// Bytes of all stored chunks, as they lie in the packs.
    pub fn stored_bytes(&self) -> u64 {
        self.places
            .iter()
            .map(|place| u64::from(place.length))
            .sum()
    }

    /// Writes an index. `places` has each stored chunk once.
    pub(super) fn encode(
        record: &ImageRecord,
        places: &[Place],
        first_uses: &[u32],
    ) -> Result<Vec<u8>, serde_json::Error> {
        let numbers: HashMap<Digest, u32> = (0u32..)
            .zip(places)
            .map(|(number, place)| (place.digest, number))
            .collect();
        let head = serde_json::to_vec(&Head {
            manifest_digest: record.manifest_digest,
            erofs_digest: record.erofs_digest,
            erofs_size: record.erofs_size,
            chunk_size: record.chunk_size,
            config: record.config.clone(),
        })?;
        let mut out =
            Vec::with_capacity(FIXED + head.len() + 4 * record.chunks.len() + PLACE * places.len());
        out.extend_from_slice(MAGIC);
        // Each is bounded by an image's number of chunks, a head by what `ImageConfig::validate` takes.
        for count in [head.len(), places.len(), first_uses.len()] {
            out.extend_from_slice(&(count as u32).to_le_bytes());
        }
        out.extend_from_slice(&head);
        for chunk in &record.chunks {
            let number = numbers.get(chunk).copied().unwrap_or(ZERO);
            out.extend_from_slice(&number.to_le_bytes());
        }
        for place in places {
            out.extend_from_slice(&place.digest.0);
            out.extend_from_slice(&place.offset.to_le_bytes());
            out.extend_from_slice(&place.length.to_le_bytes());
            out.extend_from_slice(&place.pack.to_le_bytes());
        }
        for index in first_uses {
            out.extend_from_slice(&index.to_le_bytes());
        }
        Ok(out)
    }

    /// Reads an index whose digest is right, of the image with this manifest and with packs of these sizes.
    ///
    /// The image gets the name `name`.
    ///
    /// # Errors
    /// It contradicts itself, or them.
    pub(super) fn decode(
        bytes: &[u8],
        manifest: Digest,
        name: &str,
        packs: &[u64],
    ) -> Result<Self, BadIndex> {
        let mut rest = Reader(bytes);
        if rest.take(MAGIC.len()) != Some(MAGIC) {
            return Err(BadIndex::Magic);
        }
        let short = |expected: u64| BadIndex::Length {
            found: bytes.len() as u64,
            expected,
        };
        let mut count = || rest.u32().ok_or(short(FIXED as u64));
        let (head_length, stored_count, use_count) = (count()? as usize, count()?, count()?);
        if head_length > MAX_HEAD {
            return Err(BadIndex::LongHead(head_length));
        }
        let head = rest
            .take(head_length)
            .ok_or(short((FIXED + head_length) as u64))?;
        let head: Head = serde_json::from_slice(head)?;
        if head.manifest_digest != manifest {
            return Err(BadIndex::OtherImage(head.manifest_digest));
        }
        let chunk_size = head.chunk_size;
        if chunk_size == 0 {
            return Err(BadRecord::ChunkSize(0).into());
        }
        let chunk_count = head.erofs_size.div_ceil(u64::from(chunk_size));
        // Everything that is allocated below is bounded by what came.
        let lists = u128::from(chunk_count) * 4
            + u128::from(stored_count) * PLACE as u128
            + u128::from(use_count) * 4;
        let expected = (FIXED + head_length) as u128 + lists;
        if bytes.len() as u128 != expected {
            return Err(short(u64::try_from(expected).unwrap_or(u64::MAX)));
        }
        let numbers: Vec<u32> = (0..chunk_count).map_while(|_| rest.u32()).collect();
        let mut places: Vec<Place> = (0..stored_count).map_while(|_| rest.place()).collect();
        let first_uses: Vec<u32> = (0..use_count).map_while(|_| rest.u32()).collect();

        let zeros = Zeros::of(head.erofs_size, chunk_size);
        let mut chunks = Vec::with_capacity(numbers.len());
        let mut stored = Vec::with_capacity(numbers.len());
        for (index, number) in (0u32..).zip(numbers) {
            let plain = zeros.length(index);
            if number == ZERO {
                chunks.push(zeros.digest(index));
                stored.push(None);
                continue;
            }
            let place = places
                .get_mut(number as usize)
                .ok_or(BadIndex::Place(index))?;
            // The short last chunk cannot be the same as a whole one.
            if place.plain != 0 && place.plain != plain {
                return Err(BadIndex::Place(index));
            }
            place.plain = plain;
            chunks.push(place.digest);
            stored.push(Some(number));
        }
        for (number, place) in (0u32..).zip(&places) {
            let end = place.offset.checked_add(u64::from(place.length));
            let size = packs.get(place.pack as usize).copied().unwrap_or(0);
            let fits =
                end.is_some_and(|end| end <= size) && (1..=place.plain).contains(&place.length);
            if !fits {
                return Err(BadIndex::Stored(number));
            }
        }
        if let Some(index) = first_uses
            .iter()
            .find(|index| **index as usize >= chunks.len())
        {
            return Err(BadIndex::Use(*index));
        }
        let record = ImageRecord {
            name: name.to_owned(),
            manifest_digest: manifest,
            config: head.config,
            erofs_size: head.erofs_size,
            chunk_size,
            chunks,
            erofs_digest: head.erofs_digest,
        };
        record.validate()?;
        Ok(Self {
            record,
            stored,
            places,
            first_uses,
        })
    }
}

/// The chunks of an image whose bytes are all zero: of the usual length, and of the last one's.
pub(super) struct Zeros {
    size: u64,
    chunk_size: u32,
    whole: Digest,
    last: Digest,
}

impl Zeros {
    /// For an image of `size` bytes. At most 4 MiB are hashed, whatever `chunk_size` claims.
    pub(super) fn of(size: u64, chunk_size: u32) -> Self {
        let chunk = u64::from(chunk_size).min(4 << 20);
        let tail = match size.checked_rem(chunk) {
            None | Some(0) => chunk,
            Some(tail) => tail,
        };
        let zeros = vec![0; chunk as usize];
        Self {
            size,
            chunk_size,
            whole: Digest::of(&zeros),
            last: Digest::of(&zeros[..tail as usize]),
        }
    }

    /// How many bytes chunk `index` has.
    fn length(&self, index: u32) -> u32 {
        let chunk = u64::from(self.chunk_size);
        let left = self.size.saturating_sub(u64::from(index) * chunk);
        left.min(chunk) as u32
    }

    /// Its digest if all of it is zero.
    pub(super) fn digest(&self, index: u32) -> Digest {
        match self.length(index) == self.chunk_size {
            true => self.whole,
            false => self.last,
        }
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn place(&mut self) -> Option<Place> {
        let digest = Digest(self.array()?);
        let offset = self.array().map(u64::from_le_bytes)?;
        let length = self.u32()?;
        let pack = self.u32()?;
        Some(Place {
            digest,
            pack,
            offset,
            length,
            plain: 0,
        })
    }
}

#[cfg(test)]
mod tests;
