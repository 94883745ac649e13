//! Pages made smaller for the wire, and back. Which codec pays, [`auto`] says.

pub mod auto;
mod choice;
mod pack;

use std::io;

use serde::{Deserialize, Serialize};
use vm_runtime::memory::{lz4_pack, lz4_room, lz4_unpack};
use vm_runtime::units::PAGE_SIZE;
use zstd::zstd_safe;

pub(super) use choice::Choice;
pub(super) use pack::Packer;

use crate::wire::bulk::{Codec, MAX_PAGES};

/// The fastest of zstd's ordinary levels: the higher ones cost more than they save while a guest waits.
const ZSTD_LEVEL: i32 = 1;

/// What the user wishes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Compress {
    /// Pages cross as they are.
    None,
    /// Each page is compressed with LZ4, unless that makes it no smaller.
    Lz4,
    /// The same with zstd.
    Zstd,
    /// Whichever of the three moves most pages a second, by what link and processor have shown so far.
    #[default]
    Auto,
}

impl std::fmt::Display for Compress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
            Self::Auto => "auto",
        })
    }
}

/// Makes pages smaller. Its memory is used again.
#[derive(Default)]
pub struct Compressor {
    zstd: Option<zstd::bulk::Compressor<'static>>,
}

impl Compressor {
    /// Bytes that [`Self::pack`] must be given for `raw` bytes, however badly they compress.
    pub fn room(codec: Codec, raw: usize) -> usize {
        match codec {
            Codec::Lz4 => lz4_room(raw),
            Codec::Zstd => zstd_safe::compress_bound(raw),
        }
    }

    /// Packs `raw` into `out`, which has [`Self::room`]. Returns the packed size; `None` if it is not worth it: less than a
    /// sixteenth is saved.
    pub fn pack(&mut self, codec: Codec, raw: &[u8], out: &mut [u8]) -> Option<usize> {
        let packed = match codec {
            Codec::Lz4 => lz4_pack(raw, out)?,
            Codec::Zstd => {
                let zstd = match &mut self.zstd {
                    Some(zstd) => zstd,
                    // It fails only without memory.
                    none => none.insert(zstd::bulk::Compressor::new(ZSTD_LEVEL).ok()?),
                };
                zstd.compress_to_buffer(raw, out).ok()?
            }
        };
        (packed <= raw.len() / 16 * 15).then_some(packed)
    }
}

/// Bytes that no sender of ours packed.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// Not what the codec makes, or more than was said.
    #[error("pages that the source packed cannot be unpacked: the peer is broken or not ours")]
    Damaged(#[source] io::Error),
    /// Less than was said.
    #[error(
        "the source packed {found} bytes of pages, and said {said}: the peer is broken or not ours"
    )]
    Short {
        /// Bytes that came out.
        found: usize,
        /// Bytes of the pages that were announced.
        said: usize,
    },
}

/// Gets pages back. Never writes beyond the pages that were announced, whatever the packed bytes are.
#[derive(Default)]
pub struct Decompressor {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
    raw: Vec<u8>,
}

impl Decompressor {
    /// The `count` pages, at most [`MAX_PAGES`], that `packed` holds.
    ///
    /// # Errors
    /// See [`UnpackError`].
    pub fn unpack(
        &mut self,
        codec: Codec,
        count: u32,
        packed: &[u8],
    ) -> Result<&[u8], UnpackError> {
        let said = count.min(MAX_PAGES) as usize * PAGE_SIZE;
        if self.raw.len() < said {
            self.raw.resize(said, 0);
        }
        let out = &mut self.raw[..said];
        let found = match codec {
            Codec::Lz4 => lz4_unpack(packed, out).map_err(UnpackError::Damaged)?,
            Codec::Zstd => {
                let zstd = match &mut self.zstd {
                    Some(zstd) => zstd,
                    none => {
                        none.insert(zstd::bulk::Decompressor::new().map_err(UnpackError::Damaged)?)
                    }
                };
                zstd.decompress_to_buffer(packed, out)
                    .map_err(UnpackError::Damaged)?
            }
        };
        if found != said {
            return Err(UnpackError::Short { found, said });
        }
        Ok(out)
    }
}

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Compressor")
    }
}

impl std::fmt::Debug for Decompressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Decompressor")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CODECS: [Codec; 2] = [Codec::Lz4, Codec::Zstd];

    fn packed(codec: Codec, raw: &[u8]) -> Option<Vec<u8>> {
        let mut out = vec![0; Compressor::room(codec, raw.len())];
        let size = Compressor::default().pack(codec, raw, &mut out)?;
        out.truncate(size);
        Some(out)
    }

    #[test]
    fn what_does_not_get_smaller_is_left_alone() {
        let mut state = 1u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 56) as u8
        })
        .take(4 * PAGE_SIZE)
        .collect();
        for codec in CODECS {
            assert_eq!(packed(codec, &noise), None, "{codec:?}");
        }
    }

    #[test]
    fn a_bomb_does_not_get_beyond_the_pages_that_were_announced() {
        for codec in CODECS {
            let bomb = packed(codec, &vec![0; MAX_PAGES as usize * PAGE_SIZE]).unwrap();
            assert!(
                bomb.len() < PAGE_SIZE + 200,
                "{codec:?}: {} bytes",
                bomb.len()
            );
            let mut decompressor = Decompressor::default();
            let error = decompressor.unpack(codec, 1, &bomb).unwrap_err();
            assert!(
                matches!(error, UnpackError::Damaged(_)),
                "{codec:?}: {error}"
            );
            assert_eq!(decompressor.raw.len(), PAGE_SIZE);
            // The same bytes, honestly announced.
            let raw = decompressor.unpack(codec, MAX_PAGES, &bomb).unwrap();
            assert!(raw.iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn fewer_pages_than_were_announced_are_an_error() {
        for codec in CODECS {
            let one = packed(codec, &[7; PAGE_SIZE]).unwrap();
            let error = Decompressor::default().unpack(codec, 2, &one).unwrap_err();
            assert!(
                matches!(error, UnpackError::Short { .. }),
                "{codec:?}: {error}"
            );
        }
    }

    proptest! {
        #[test]
        fn what_was_packed_comes_out(
            pages in 1usize..5,
            seed in prop::collection::vec(any::<u8>(), 1..700),
            zstd: bool,
        ) {
            let codec = if zstd { Codec::Zstd } else { Codec::Lz4 };
            let raw: Vec<u8> = seed.iter().copied().cycle().take(pages * PAGE_SIZE).collect();
            if let Some(packed) = packed(codec, &raw) {
                let mut decompressor = Decompressor::default();
                prop_assert_eq!(decompressor.unpack(codec, pages as u32, &packed).unwrap(), &raw[..]);
                prop_assert!(decompressor.unpack(codec, pages as u32 + 1, &packed).is_err());
            }
        }

        #[test]
        fn junk_and_damage_never_panic(
            junk in prop::collection::vec(any::<u8>(), 0..300),
            at: prop::sample::Index,
            byte: u8,
            zstd: bool,
        ) {
            let codec = if zstd { Codec::Zstd } else { Codec::Lz4 };
            let mut decompressor = Decompressor::default();
            let _ = decompressor.unpack(codec, 1, &junk);
            let mut packed = packed(codec, &[3; 2 * PAGE_SIZE]).unwrap();
            let at = at.index(packed.len());
            packed[at] = byte;
            let _ = decompressor.unpack(codec, 2, &packed);
        }
    }
}
