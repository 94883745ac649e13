//! LZ4 blocks, without a length before them. Here, because this crate is optimised in every build profile.

use std::io;

use lz4_flex::block::{compress_into, decompress_into, get_maximum_output_size};

/// Bytes that `raw` bytes may take, however badly they compress.
pub fn lz4_room(raw: usize) -> usize {
    get_maximum_output_size(raw)
}

/// Packs `raw` into `out`, which has [`lz4_room`]. Returns the packed size; `None` if `out` is too small.
pub fn lz4_pack(raw: &[u8], out: &mut [u8]) -> Option<usize> {
    compress_into(raw, out).ok()
}

/// Unpacks into `out`, and never beyond it. Returns how many bytes came out.
///
/// # Errors
/// `packed` is no LZ4 block, or more than `out` holds.
pub fn lz4_unpack(packed: &[u8], out: &mut [u8]) -> io::Result<usize> {
    decompress_into(packed, out).map_err(io::Error::other)
}
