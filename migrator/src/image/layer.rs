//! One layer, verified while it is applied to a tree.

use std::io::Read;

use super::compression::decompress;
use super::digest::{Digest, HashingReader};
use super::rootfs::{Rootfs, RootfsError};
use super::tar::{Kind, TarError, TarReader};

/// What an entry costs against the byte budget beside its content: roughly its inode.
const ENTRY_COST: u64 = 512;

/// What an image may still take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Budget {
    pub(super) entries: u64,
    pub(super) bytes: u64,
}

/// Why a layer is not applied.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The compressed stream.
    #[error("cannot be uncompressed")]
    Compression(#[source] std::io::Error),
    /// The tar stream.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// An entry.
    #[error(transparent)]
    Entry(#[from] RootfsError),
    /// More entries than an image may have.
    #[error(
        "the image has more files than the limit allows: raise image.max_entries if it is right"
    )]
    TooManyEntries,
    /// More bytes than an image may have.
    #[error(
        "the image unpacks to more bytes than the limit allows: raise image.max_unpacked if it is right"
    )]
    TooLarge,
    /// The uncompressed bytes are not those that the image's configuration promises.
    #[error("unpacks to {found}, the image's configuration says {expected}: the image is damaged")]
    DiffId {
        /// As computed.
        found: Digest,
        /// As promised.
        expected: Digest,
    },
}

/// Applies the layer read from `blob`, whose uncompressed bytes must hash to `diff_id`.
pub(super) fn apply(
    blob: impl Read,
    diff_id: Digest,
    rootfs: &mut Rootfs,
    budget: &mut Budget,
) -> Result<(), LayerError> {
    let (_, stream) = decompress(blob, stream_limit(budget)).map_err(LayerError::Compression)?;
    let mut stream = HashingReader::new(stream);
    let mut archive = TarReader::new(&mut stream);
    rootfs.begin_layer();
    while let Some(entry) = archive.next_entry()? {
        budget.entries = budget
            .entries
            .checked_sub(1)
            .ok_or(LayerError::TooManyEntries)?;
        let content = if entry.kind == Kind::File {
            entry.size
        } else {
            0
        };
        budget.bytes = content
            .checked_add(ENTRY_COST)
            .and_then(|cost| budget.bytes.checked_sub(cost))
            .ok_or(LayerError::TooLarge)?;
        rootfs.apply(&entry, &mut archive)?;
    }
    archive.drain()?;
    let (found, _) = stream.finish();
    if found != diff_id {
        return Err(LayerError::DiffId {
            found,
            expected: diff_id,
        });
    }
    Ok(())
}

/// Most bytes a layer's stream may have: its files' and, for each entry, header, padding and extensions.
fn stream_limit(budget: &Budget) -> u64 {
    budget
        .entries
        .saturating_mul(4096)
        .saturating_add(budget.bytes)
}
