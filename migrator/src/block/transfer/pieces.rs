//! How a disk is cut for the wire. Pure.

use bytes::Bytes;

use crate::block::Extent;
use crate::wire::bulk::{BLOCK, Blocks, Place};

/// Bytes that are read, packed and sent as one: what keeps a connection busy for a millisecond or so, and others from it no longer.
pub const PIECE: u64 = 256 << 10;

/// Cuts extents at the multiples of [`PIECE`], and widens them to whole blocks within a disk of `size` bytes.
pub(super) fn cut(extents: &[Extent], size: u64) -> Vec<Extent> {
    let mut out: Vec<Extent> = Vec::new();
    for extent in extents.iter().filter(|extent| extent.len > 0) {
        let mut at = extent.offset / BLOCK * BLOCK;
        // Two extents may share a block.
        at = at.max(out.last().map_or(0, |last| last.end()));
        let end = extent.end().next_multiple_of(BLOCK).min(size);
        while at < end {
            let boundary = (at / PIECE + 1) * PIECE;
            let len = boundary.min(end) - at;
            out.push(Extent { offset: at, len });
            at += len;
        }
    }
    out
}

/// The frames of a piece that was read from `offset` on. Blocks of zeros become holes, or nothing where the destination has holes anyway.
pub(super) fn frames(disk: u16, offset: u64, raw: &Bytes, has_holes: bool) -> Vec<Blocks> {
    let mut out = Vec::new();
    let mut start = 0;
    while start < raw.len() {
        let zero = is_zero(block(raw, start));
        let mut end = start;
        while end < raw.len() && is_zero(block(raw, end)) == zero {
            end = (end + BLOCK as usize).min(raw.len());
        }
        let at = Place {
            disk,
            offset: offset + start as u64,
        };
        if !zero {
            let raw = raw.slice(start..end);
            out.push(Blocks::Raw { at, raw });
        } else if !has_holes {
            let len = (end - start) as u64;
            out.push(Blocks::Hole { at, len });
        }
        start = end;
    }
    out
}

fn block(raw: &[u8], at: usize) -> &[u8] {
    &raw[at..(at + BLOCK as usize).min(raw.len())]
}

fn is_zero(block: &[u8]) -> bool {
    let (words, rest) = block.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 4 << 20;

    proptest! {
        #[test]
        fn every_byte_of_an_extent_is_in_one_piece(gaps in proptest::collection::vec((0u64..300_000, 0u64..600_000), 0..8)) {
            let mut at = 0;
            let mut extents = Vec::new();
            for (gap, len) in gaps {
                let offset = (at + gap).min(SIZE);
                let len = len.min(SIZE - offset);
                extents.push(Extent { offset, len });
                at = offset + len;
            }
            let pieces = cut(&extents, SIZE);
            for pair in pieces.windows(2) {
                prop_assert!(pair[0].end() <= pair[1].offset, "in order, and none twice");
            }
            for piece in &pieces {
                prop_assert!(piece.len > 0 && piece.end() <= SIZE);
                prop_assert_eq!(piece.offset / PIECE, (piece.end() - 1) / PIECE);
                prop_assert!(piece.offset.is_multiple_of(BLOCK) && piece.len.is_multiple_of(BLOCK));
            }
            let within = |byte: u64| pieces.iter().any(|piece| (piece.offset..piece.end()).contains(&byte));
            for extent in extents.iter().filter(|extent| extent.len > 0) {
                for byte in [extent.offset, extent.offset + extent.len / 2, extent.end() - 1] {
                    prop_assert!(within(byte));
                }
            }
        }

        #[test]
        fn frames_put_together_are_the_piece(blocks in proptest::collection::vec(any::<bool>(), 1..40), has_holes: bool) {
            let raw: Vec<u8> = blocks.iter().flat_map(|full| {
                let mut block = vec![0; BLOCK as usize];
                block[77] = u8::from(*full);
                block
            }).collect();
            let raw = Bytes::from(raw);
            // What the destination has: anything, or zeros.
            let mut there = vec![if has_holes { 0 } else { 0xaa }; raw.len()];
            let offset = 5 * BLOCK;
            for frame in frames(3, offset, &raw, has_holes) {
                match frame {
                    Blocks::Raw { at, raw } => {
                        prop_assert_eq!(at.disk, 3);
                        let at = (at.offset - offset) as usize;
                        there[at..at + raw.len()].copy_from_slice(&raw);
                    }
                    Blocks::Hole { at, len } => {
                        prop_assert!(!has_holes);
                        let at = (at.offset - offset) as usize;
                        there[at..at + len as usize].fill(0);
                    }
                    Blocks::Packed { .. } | Blocks::Barrier { .. } => prop_assert!(false),
                }
            }
            prop_assert_eq!(&there[..], &raw[..]);
        }
    }
}
