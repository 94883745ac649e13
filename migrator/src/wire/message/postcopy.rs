//! What the two sides tell each other about missing pages.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use vm_runtime::units::{PageIndex, PageRange};

use crate::wire::codec::{DecodeError, split_u64};

/// A set of pages, one bit each. On the wire: `u64` first page, then words of 64 pages, little-endian, lowest bit first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageBits {
    /// Page of the first bit; a multiple of 64.
    pub first: PageIndex,
    /// Eight bytes for 64 pages: see [`PageBits::ranges`].
    pub bits: Bytes,
}

impl PageBits {
    /// Words that fit one frame.
    pub const MAX_WORDS: usize = 64 << 10;

    /// The set `words`, cut into messages; words of zeros at the end of each are left out.
    pub fn of(words: &[u64]) -> Vec<Self> {
        let mut out = Vec::new();
        for (index, piece) in words.chunks(Self::MAX_WORDS).enumerate() {
            let used = piece
                .iter()
                .rposition(|word| *word != 0)
                .map_or(0, |last| last + 1);
            if used > 0 {
                let bits: Vec<u8> = piece[..used].iter().flat_map(|w| w.to_le_bytes()).collect();
                out.push(Self {
                    first: PageIndex((index * Self::MAX_WORDS * 64) as u64),
                    bits: bits.into(),
                });
            }
        }
        out
    }

    /// The pages of the set, as ranges in order that do not touch.
    pub fn ranges(&self) -> Vec<PageRange> {
        let mut out: Vec<PageRange> = Vec::new();
        let (words, _) = self.bits.as_chunks::<8>();
        for (index, word) in (0u64..).zip(words) {
            let mut bits = u64::from_le_bytes(*word);
            while bits != 0 {
                let start = u64::from(bits.trailing_zeros());
                let len = u64::from((!(bits >> start)).trailing_zeros()).min(64 - start);
                bits &= !(u64::MAX.checked_shr(64 - len as u32).unwrap_or(0) << start);
                let first = self.first.0 + index * 64 + start;
                match out.last_mut() {
                    Some(last) if last.end.0 == first => last.end.0 += len,
                    Some(_) | None => out.push(PageRange::new(first, first + len)),
                }
            }
        }
        out
    }

    /// One past the highest page that a bit stands for.
    pub fn end(&self) -> u64 {
        self.first.0 + self.bits.len() as u64 * 8
    }

    pub(super) fn head(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.first.0.to_le_bytes());
    }

    pub(super) fn tail(&self) -> &[u8] {
        &self.bits
    }

    pub(super) fn parse(mut payload: Bytes) -> Result<Self, DecodeError> {
        let first = split_u64("PageBits", &mut payload)?;
        let fits = first.is_multiple_of(64) && first < 1 << 52 && payload.len().is_multiple_of(8);
        fits.then_some(Self {
            first: PageIndex(first),
            bits: payload,
        })
        .ok_or(DecodeError::Malformed("PageBits"))
    }
}

/// The pages of the `PageBits` before this are missing at the destination, or too old there, and cross after the guest's resume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StaleEnd {
    /// Whether the guest stands still, so that no more become stale.
    pub last: bool,
}

/// The pages of a `StaleEnd` that was not the last are missing at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StaleAck;

/// The pages of the `PageBits` before this are what the running guest lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// How many.
    pub pages: u64,
}

/// The running guest lacks no page any more: nothing of the source's copy is needed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryComplete {
    /// What it cost the guest.
    pub faults: FaultFigures,
}

/// How long the guest waited for pages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultFigures {
    /// Pages that were missing at the guest's resume, or at the restart of the service.
    pub missing: u64,
    /// Waits for a page that was missing.
    pub count: u64,
    /// The longest, in microseconds.
    pub max_us: u64,
    /// Waits by their length: upper bound in microseconds, and how many; those without any are left out.
    pub buckets: Vec<(u64, u64)>,
    /// Microseconds from the resume to the last page.
    pub took_us: u64,
    /// Pages whose content was not the source's, of those that were compared (verify): they were asked for again.
    pub mismatched: u64,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_set_crosses_as_it_is(words in proptest::collection::vec(prop_oneof![Just(0), Just(u64::MAX), any::<u64>()], 0..40)) {
            let mut expected = Vec::new();
            for (index, word) in words.iter().enumerate() {
                expected.extend((0..64).filter(|bit| word >> bit & 1 == 1).map(|bit| index as u64 * 64 + bit));
            }
            let ranges: Vec<_> = PageBits::of(&words).iter().flat_map(PageBits::ranges).collect();
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end.0 < pair[1].start.0));
            let pages: Vec<u64> = ranges.iter().flat_map(|r| r.start.0..r.end.0).collect();
            prop_assert_eq!(pages, expected);
        }
    }
}
