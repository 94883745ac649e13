//! Which connection carries which page, and in what pieces. Pure.

use vm_runtime::units::{PageIndex, PageRange};

/// Pages in one piece of work, and the most that one frame carries: 1 MiB of guest RAM.
pub const PIECE_PAGES: u64 = 256;

/// The connection (0..lanes) that carries a page, for as long as the migration lasts.
pub const fn lane_of(page: PageIndex, lanes: usize) -> usize {
    ((page.0 / PIECE_PAGES) % lanes as u64) as usize
}

/// Cuts ranges into pieces of at most [`PIECE_PAGES`] that do not cross a piece boundary, one list a
/// connection, each in the order of the ranges.
pub fn split(ranges: &[PageRange], lanes: usize) -> Vec<Vec<PageRange>> {
    let mut out = vec![Vec::new(); lanes];
    for range in ranges {
        let mut start = range.start.0;
        while start < range.end.0 {
            let boundary = (start / PIECE_PAGES + 1) * PIECE_PAGES;
            let end = boundary.min(range.end.0);
            out[lane_of(PageIndex(start), lanes)].push(PageRange::new(start, end));
            start = end;
        }
    }
    out
}

/// How many pages the ranges hold.
pub fn count(ranges: &[PageRange]) -> u64 {
    ranges.iter().map(|range| range.len()).sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ranges() -> impl Strategy<Value = Vec<PageRange>> {
        prop::collection::vec((0u64..900, 1u64..900), 0..20).prop_map(|gaps| {
            let mut at = 0;
            gaps.into_iter()
                .map(|(gap, len)| {
                    let start = at + gap;
                    at = start + len;
                    PageRange::new(start, at)
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn every_page_goes_once_and_by_its_own_lane(ranges in ranges(), lanes in 1usize..9) {
            let split = split(&ranges, lanes);
            let mut seen = Vec::new();
            for (lane, pieces) in split.iter().enumerate() {
                for piece in pieces {
                    prop_assert!(!piece.is_empty() && piece.len() <= PIECE_PAGES);
                    for page in piece.start.0..piece.end.0 {
                        prop_assert_eq!(lane_of(PageIndex(page), lanes), lane);
                        seen.push(page);
                    }
                }
            }
            seen.sort_unstable();
            let expected: Vec<u64> = ranges.iter().flat_map(|r| r.start.0..r.end.0).collect();
            prop_assert_eq!(seen, expected);
        }
    }
}
