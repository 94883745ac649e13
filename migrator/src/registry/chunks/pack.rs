//! Makes the packs: files in which the chunks of an image lie one behind the other, each compressed by itself. Blocks.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;

use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

use super::index::{ChunkIndex, Place, Zeros};
use crate::image::manifest::Blob;
use crate::image::{Digest, ImageRecord, ImageStore, StoreError};

/// Largest pack, in bytes, unless one chunk has more: what a broken upload sends again, and what several uploads at a time share.
const PACK_SIZE: u64 = 64 << 20;

/// zstd's own default: higher levels win little on programs, and cost a multiple.
const LEVEL: i32 = 3;

/// Why there are no packs.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The image.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The disk.
    #[error("cannot write the packs of the image")]
    Write(#[from] io::Error),
}

/// The packs of an image and their index, in files that go with the value.
#[derive(Debug)]
pub(super) struct Packed {
    pub(super) index: Vec<u8>,
    pub(super) packs: Vec<(Blob, PathBuf)>,
    /// Bytes of the chunks that are stored, before they were compressed.
    pub(super) plain_bytes: u64,
    _folder: TempDir,
}

/// Packs an image: chunks in the order in which they are first used, then the others in theirs. Each is verified as it is read; of
/// equal ones one is stored, and none of zeros. The same image and order give the same packs.
pub(super) fn pack(
    store: &ImageStore,
    record: &ImageRecord,
    first_uses: &[u32],
) -> Result<Packed, PackError> {
    let folder = store.scratch()?;
    let zeros = Zeros::of(record.erofs_size, record.chunk_size);
    let mut packer = Packer {
        folder: &folder,
        done: Vec::new(),
        open: None,
    };
    let (mut seen, mut places, mut plain_bytes) = (HashSet::new(), Vec::new(), 0);
    let mut compressor = zstd::bulk::Compressor::new(LEVEL)?;
    let all = 0..record.chunks.len() as u32;
    for index in first_uses.iter().copied().chain(all) {
        let Some(digest) = record.chunks.get(index as usize).copied() else {
            continue;
        };
        if digest == zeros.digest(index) || !seen.insert(digest) {
            continue;
        }
        let plain = store.read_chunk(&record.erofs_digest, index)?;
        let small = compressor.compress(&plain)?;
        let bytes = if small.len() < plain.len() {
            &small[..]
        } else {
            &plain[..]
        };
        let (pack, offset) = packer.add(bytes)?;
        plain_bytes += plain.len() as u64;
        places.push(Place {
            digest,
            pack,
            offset,
            length: bytes.len() as u32,
            plain: plain.len() as u32,
        });
    }
    packer.close()?;
    let packs = packer.done;
    let first_uses: Vec<u32> = first_uses
        .iter()
        .copied()
        .filter(|index| (*index as usize) < record.chunks.len())
        .collect();
    let index = ChunkIndex::encode(record, &places, &first_uses).map_err(io::Error::from)?;
    Ok(Packed {
        index,
        packs,
        plain_bytes,
        _folder: folder,
    })
}

struct Packer<'a> {
    folder: &'a TempDir,
    done: Vec<(Blob, PathBuf)>,
    open: Option<Open>,
}

struct Open {
    path: PathBuf,
    file: BufWriter<File>,
    hash: Sha256,
    length: u64,
}

impl Packer<'_> {
    /// Where the bytes are: pack and offset.
    fn add(&mut self, bytes: &[u8]) -> io::Result<(u32, u64)> {
        let full = |open: &Open| open.length > 0 && open.length + bytes.len() as u64 > PACK_SIZE;
        if self.open.as_ref().is_some_and(full) {
            self.close()?;
        }
        let number = self.done.len() as u32;
        let open = match &mut self.open {
            Some(open) => open,
            None => {
                let path = self.folder.path().join(format!("pack-{number}"));
                let file = BufWriter::new(File::create_new(&path)?);
                self.open.insert(Open {
                    path,
                    file,
                    hash: Sha256::new(),
                    length: 0,
                })
            }
        };
        open.file.write_all(bytes)?;
        open.hash.update(bytes);
        let offset = open.length;
        open.length += bytes.len() as u64;
        Ok((number, offset))
    }

    fn close(&mut self) -> io::Result<()> {
        let Some(mut open) = self.open.take() else {
            return Ok(());
        };
        open.file.flush()?;
        let blob = Blob {
            digest: Digest(open.hash.finalize().into()),
            size: open.length,
        };
        self.done.push((blob, open.path));
        Ok(())
    }
}
