//! Unsafe island: `PAGEMAP_SCAN`, the ioctl that tells which pages were written.
//!
//! Layouts and numbers are those of `linux/fs.h` (Linux 6.7 and later).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::maps::Mapping;

/// `PM_SCAN_WP_MATCHING`: write-protect what is reported, in the same walk.
const SCAN_WP_MATCHING: u64 = 1 << 0;
/// `PM_SCAN_CHECK_WPASYNC`: fail rather than scan a mapping that is not tracked.
const SCAN_CHECK_WPASYNC: u64 = 1 << 1;
/// `PAGE_IS_WRITTEN`.
const PAGE_IS_WRITTEN: u64 = 1 << 1;

/// `struct page_region`: addresses `start..end`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Region {
    pub(super) start: u64,
    pub(super) end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<Region>() == 24);
const _: () = assert!(size_of::<ScanArg>() == 96);

/// The generated function is as unsafe as the ioctl it issues.
mod raw {
    #![allow(missing_docs, unreachable_pub)]
    use super::ScanArg;

    nix::ioctl_readwrite!(pagemap_scan, b'f', 16, ScanArg);
}

/// Reports the pages of `mapping` from address `from` on that were written since the last call,
/// and write-protects them again in the same walk, so that no write falls between the two.
///
/// Fills `regions` from its start; gives back how many it filled and the address where the walk
/// ended (the mapping's end, unless `regions` was too small).
pub(super) fn scan_written(
    pagemap: &File,
    mapping: Mapping,
    from: u64,
    regions: &mut [Region],
) -> io::Result<(usize, u64)> {
    let mut arg = ScanArg {
        size: size_of::<ScanArg>() as u64,
        flags: SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC,
        start: from,
        end: mapping.end,
        vec: regions.as_mut_ptr() as u64,
        vec_len: regions.len() as u64,
        category_mask: PAGE_IS_WRITTEN,
        return_mask: PAGE_IS_WRITTEN,
        ..ScanArg::default()
    };
    // SAFETY: `arg` is a live, properly sized and aligned struct, and its `vec` and `vec_len`
    // describe exactly the slice `regions`, borrowed mutably for the whole call.
    let filled = unsafe { raw::pagemap_scan(pagemap.as_raw_fd(), &raw mut arg) }?;
    Ok((filled as usize, arg.walk_end))
}
