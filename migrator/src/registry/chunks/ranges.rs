//! Which chunks are asked for in one request. Pure.

use super::index::Place;
use crate::image::Digest;

/// Bytes nobody wants that are fetched rather than asked around: about what crosses in the time of a request.
const GAP: u64 = 64 << 10;

/// Most bytes of one request, unless one chunk has more: long enough to keep a link busy, short enough for several at a time.
const LONGEST: u64 = 2 << 20;

/// A stored chunk that is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    /// A chunk of the image that has these bytes.
    pub(super) index: u32,
    /// Where they are.
    pub(super) place: Place,
}

/// Chunks that lie close to each other in a pack, in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) pack: u32,
    /// First byte.
    pub(super) start: u64,
    /// Behind the last byte.
    pub(super) end: u64,
    pub(super) chunks: Vec<Wanted>,
}

impl Range {
    /// As a request's header has it.
    pub(super) fn header(&self) -> String {
        format!("bytes={}-{}", self.start, self.end - 1)
    }

    /// Whether a chunk is among them.
    pub(super) fn has(&self, digest: &Digest) -> bool {
        let mut chunks = self.chunks.iter();
        chunks.any(|chunk| chunk.place.digest == *digest)
    }

    /// Of several chunks, in requests: those that begin first are the first's.
    pub(super) fn of(mut chunks: Vec<Wanted>) -> Vec<Range> {
        chunks.sort_by_key(|chunk| (chunk.place.pack, chunk.place.offset, chunk.place.length));
        chunks.dedup_by_key(|chunk| (chunk.place.pack, chunk.place.offset, chunk.place.length));
        let mut ranges: Vec<Range> = Vec::new();
        for chunk in chunks {
            let Place {
                pack,
                offset,
                length,
                ..
            } = chunk.place;
            let end = offset + u64::from(length);
            match ranges.last_mut() {
                // Places may overlap in a hostile index: an end never goes back, and a chunk that begins before the end of the one
                // before it gets a request of its own.
                Some(last)
                    if last.pack == pack
                        && offset >= last.end
                        && offset - last.end <= GAP
                        && end - last.start <= LONGEST =>
                {
                    last.end = end;
                    last.chunks.push(chunk);
                }
                Some(_) | None => ranges.push(Range {
                    pack,
                    start: offset,
                    end,
                    chunks: vec![chunk],
                }),
            }
        }
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(index: u32, pack: u32, offset: u64, length: u32) -> Wanted {
        let place = Place {
            digest: Digest([index as u8; 32]),
            pack,
            offset,
            length,
            plain: length,
        };
        Wanted { index, place }
    }

    fn shape(chunks: Vec<Wanted>) -> Vec<(u32, u64, u64, Vec<u32>)> {
        let ranges = Range::of(chunks).into_iter();
        ranges
            .map(|r| {
                (
                    r.pack,
                    r.start,
                    r.end,
                    r.chunks.iter().map(|c| c.index).collect(),
                )
            })
            .collect()
    }

    #[test]
    fn neighbours_share_a_request() {
        let chunks = vec![
            wanted(2, 0, 300, 50),
            wanted(1, 0, 100, 200),
            wanted(3, 1, 350, 9),
        ];
        assert_eq!(
            shape(chunks),
            [(0, 100, 350, vec![1, 2]), (1, 350, 359, vec![3])]
        );
    }

    #[test]
    fn what_is_far_apart_does_not() {
        let far = 100 + GAP + 1;
        let chunks = vec![
            wanted(1, 0, 0, 100),
            wanted(2, 0, far, 10),
            wanted(3, 0, far + 10 + GAP, 10),
        ];
        assert_eq!(
            shape(chunks),
            [(0, 0, 100, vec![1]), (0, far, far + 20 + GAP, vec![2, 3])]
        );
    }

    #[test]
    fn requests_are_not_endless() {
        let chunk = 256 << 10;
        let chunks = (0..20)
            .map(|i| wanted(i, 0, u64::from(i) * chunk, chunk as u32))
            .collect();
        let ranges = Range::of(chunks);
        assert_eq!(ranges.len(), 3);
        assert!(
            ranges
                .iter()
                .all(|range| range.end - range.start <= LONGEST)
        );
        assert_eq!(ranges[0].header(), "bytes=0-2097151");
    }

    #[test]
    fn the_same_place_is_asked_for_once_and_overlaps_apart() {
        let chunks = vec![
            wanted(1, 0, 0, 100),
            wanted(5, 0, 0, 100),
            wanted(2, 0, 50, 100),
        ];
        assert_eq!(shape(chunks), [(0, 0, 100, vec![1]), (0, 50, 150, vec![2])]);
    }
}
