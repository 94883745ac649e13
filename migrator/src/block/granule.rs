//! Disks in pieces: granules, extents, and a set of granules. Pure.

use std::ops::Range;

use super::DiskError;

/// What is tracked, and what waits, as one: 64 KiB. Smaller, and a terabyte's map costs megabytes to go through; larger, and a
/// database's page of 8 KiB moves too much with it.
pub const GRANULE: u64 = 64 << 10;

/// The largest disk, 8 TiB: its maps have 16 MiB each.
pub const MAX_SIZE: u64 = 8 << 40;

/// The smallest disk.
pub(super) const MIN_SIZE: u64 = 1 << 20;

/// Bytes `offset..offset + len` of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

impl Extent {
    /// One past the last byte.
    pub const fn end(self) -> u64 {
        self.offset.saturating_add(self.len)
    }

    /// Every granule that it touches, by index.
    pub(super) fn touched(self) -> Range<u64> {
        match self.len {
            0 => 0..0,
            _ => self.offset / GRANULE..self.end().div_ceil(GRANULE),
        }
    }

    /// Every granule that it covers whole, by index.
    pub(super) fn covered(self) -> Range<u64> {
        let first = self.offset.div_ceil(GRANULE);
        first..(self.end() / GRANULE).max(first)
    }
}

/// Checks the size of a disk, which may come from a peer.
///
/// # Errors
/// [`DiskError::Size`].
pub fn check_size(size: u64) -> Result<(), DiskError> {
    match (MIN_SIZE..=MAX_SIZE).contains(&size) && size.is_multiple_of(GRANULE) {
        true => Ok(()),
        false => Err(DiskError::Size { size }),
    }
}

/// Extents of set bits, in order, neighbours joined. `words` are 64 granules each, the lowest bit first.
pub(super) fn extents(words: impl IntoIterator<Item = u64>) -> Vec<Extent> {
    let mut found: Vec<Extent> = Vec::new();
    for (at, word) in (0_u64..).zip(words) {
        let mut left = word;
        while left != 0 {
            let bit = u64::from(left.trailing_zeros());
            let run = u64::from((left >> bit).trailing_ones());
            let (offset, len) = ((at * 64 + bit) * GRANULE, run * GRANULE);
            match found.last_mut() {
                Some(last) if last.end() == offset => last.len += len,
                Some(_) | None => found.push(Extent { offset, len }),
            }
            left &= match bit + run {
                64 => 0,
                next => u64::MAX << next,
            };
        }
    }
    found
}

/// The word and the bit of a granule.
pub(super) fn place(granule: u64) -> (usize, u64) {
    ((granule / 64) as usize, 1 << (granule % 64))
}

/// Words for a disk of this size.
pub(super) fn words(size: u64) -> usize {
    size.div_ceil(GRANULE).div_ceil(64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_bits_join_across_words() {
        let words = [1 << 63 | 0b101, 0b1, 0, u64::MAX];
        let of = |first: u64, count: u64| Extent {
            offset: first * GRANULE,
            len: count * GRANULE,
        };
        assert_eq!(extents(words), [of(0, 1), of(2, 1), of(63, 2), of(192, 64)]);
        assert_eq!(extents([0, 0]), []);
        assert_eq!(extents([u64::MAX, u64::MAX]), [of(0, 128)]);
    }

    #[test]
    fn a_range_touches_more_granules_than_it_covers() {
        let of = |offset, len| Extent { offset, len };
        assert_eq!(of(0, GRANULE).touched(), 0..1);
        assert_eq!(of(0, GRANULE).covered(), 0..1);
        assert_eq!(of(1, GRANULE).touched(), 0..2);
        assert!(of(1, GRANULE).covered().is_empty());
        assert_eq!(of(GRANULE - 1, GRANULE + 2).covered(), 1..2);
        assert!(of(5, 0).touched().is_empty());
        assert!(of(5, 0).covered().is_empty());
    }

    #[test]
    fn sizes_are_checked() {
        assert!(check_size(1 << 30).is_ok());
        for size in [0, 4096, (1 << 20) + 4096, MAX_SIZE + GRANULE, u64::MAX] {
            assert!(check_size(size).is_err(), "{size}");
        }
    }
}
