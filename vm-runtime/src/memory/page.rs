//! What is asked of one page after it was copied out of the guest.

use twox_hash::XxHash3_64;

use crate::units::PAGE_SIZE;

/// 64 KiB of zeros to compare with: it stays in the first-level cache, and the comparison is the C
/// library's vectorised one in every build profile.
static ZEROS: [u8; 16 * PAGE_SIZE] = [0; 16 * PAGE_SIZE];

/// Whether every byte of `bytes` is zero. Any length, no alignment asked; an empty slice is zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(ZEROS.len())
        .all(|chunk| chunk == &ZEROS[..chunk.len()])
}

/// The 64-bit XXH3 hash of a page's content, seed 0: the same on both nodes.
pub fn page_hash(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_byte_anywhere_makes_a_page_nonzero() {
        let mut page = vec![0u8; PAGE_SIZE];
        assert!(is_zero(&page));
        for at in [0, 1, 7, 8, 63, 64, 2047, PAGE_SIZE - 1] {
            page[at] = 1;
            assert!(!is_zero(&page), "byte {at} went unseen");
            page[at] = 0;
        }
    }

    #[test]
    fn odd_lengths_are_looked_at_to_the_end() {
        let mut bytes = vec![0u8; 16 * PAGE_SIZE + 3];
        assert!(is_zero(&bytes));
        assert!(is_zero(&[]));
        *bytes.last_mut().unwrap() = 1;
        assert!(!is_zero(&bytes));
    }

    #[test]
    fn the_hash_is_pinned_because_two_nodes_compare_it() {
        assert_eq!(page_hash(&[]), 0x2d06_8005_38d3_94c2);
        assert_ne!(page_hash(&[0; PAGE_SIZE]), page_hash(&[1; PAGE_SIZE]));
    }
}
