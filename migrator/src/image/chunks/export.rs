//! An image as a VM reads it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::order::UseOrder;
use super::shelf::{Chunks, NoChunk};
use crate::block::{DiskError, ReadOnly};
use crate::image::record::ImageRecord;

/// One VM's view of an image: reads that find a chunk missing wait for it.
#[derive(Debug)]
pub struct ImageExport {
    record: Arc<ImageRecord>,
    chunks: Arc<Chunks>,
    order: Arc<UseOrder>,
    /// For messages.
    path: PathBuf,
    closed: AtomicBool,
}

impl ImageExport {
    pub(crate) fn new(
        record: Arc<ImageRecord>,
        chunks: Arc<Chunks>,
        order: Arc<UseOrder>,
        path: PathBuf,
    ) -> Self {
        Self {
            record,
            chunks,
            order,
            path,
            closed: AtomicBool::new(false),
        }
    }

    /// The image.
    pub fn record(&self) -> &Arc<ImageRecord> {
        &self.record
    }

    /// The chunks of the node.
    pub fn chunks(&self) -> &Chunks {
        &self.chunks
    }

    /// The VM is gone: who waits for a chunk need not.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        self.chunks.nudge();
    }

    /// The chunks of these bytes, by index.
    fn indices(&self, offset: u64, len: u64) -> Result<std::ops::RangeInclusive<u32>, DiskError> {
        let size = self.record.erofs_size;
        let end = offset.checked_add(len).filter(|end| *end <= size);
        let (Some(end), 1..) = (end, len) else {
            return Err(DiskError::Range { offset, len, size });
        };
        let index = |at: u64| (at / u64::from(self.record.chunk_size)) as u32;
        Ok(index(offset)..=index(end - 1))
    }
}

impl ReadOnly for ImageExport {
    fn path(&self) -> &Path {
        &self.path
    }

    fn size(&self) -> u64 {
        self.record.erofs_size
    }

    fn is_ready(&self, offset: u64, len: u64) -> bool {
        let digest = |index: u32| &self.record.chunks[index as usize];
        self.indices(offset, len)
            .is_ok_and(|mut indices| indices.all(|index| self.chunks.has(digest(index))))
    }

    fn read_at(&self, data: &mut [u8], offset: u64) -> Result<(), DiskError> {
        if data.is_empty() {
            return Ok(());
        }
        let mut left = data;
        let mut at = offset;
        for index in self.indices(offset, left.len() as u64)? {
            self.order.mark(index);
            let over = || self.closed.load(Ordering::Relaxed);
            let chunk = self
                .chunks
                .wait(&self.record, index, &over)
                .map_err(|no_chunk| match no_chunk {
                    NoChunk::Over => DiskError::Closed,
                    NoChunk::Misfit { .. } => DiskError::Io {
                        verb: "read",
                        offset,
                        len: count_of(left),
                        source: std::io::Error::other(no_chunk),
                    },
                })?;
            let from = (at - self.record.chunk_offset(index)) as usize;
            let count = left.len().min(chunk.len() - from);
            let (now, later) = left.split_at_mut(count);
            now.copy_from_slice(&chunk[from..from + count]);
            left = later;
            at += count as u64;
        }
        Ok(())
    }
}

fn count_of(data: &[u8]) -> u64 {
    data.len() as u64
}
