//! Gathers consecutive pages and turns them into one packed frame.

use std::time::{Duration, Instant};

use vm_runtime::units::{PAGE_SIZE, PageIndex};

use super::Compressor;
use crate::wire::batch::Batch;
use crate::wire::bulk::Codec;

/// Pages that are packed together: 256 KiB take a codec less than a millisecond.
const PACK_PAGES: usize = 64;
/// Of these, pages that a sample is made of.
const SAMPLE_PAGES: usize = 16;

/// How one packing went.
#[derive(Clone, Copy, Debug)]
pub(in crate::memory) struct Packing {
    pub(in crate::memory) codec: Codec,
    /// Bytes of pages.
    pub(in crate::memory) raw: usize,
    /// What they have become; as many as before where the codec did not help.
    pub(in crate::memory) packed: usize,
    pub(in crate::memory) took: Duration,
}

/// One connection's compressor, and the pages that wait for it.
#[derive(Debug, Default)]
pub(in crate::memory) struct Packer {
    compressor: Compressor,
    /// Grows to [`PACK_PAGES`] once it is used.
    pages: Vec<u8>,
    first: PageIndex,
    count: usize,
    /// Where samples are packed into.
    scrap: Vec<u8>,
}

impl Packer {
    /// Whether `page` must wait until those before it are packed.
    pub(in crate::memory) fn is_full_for(&self, page: PageIndex) -> bool {
        self.count > 0 && (self.count == PACK_PAGES || page.0 != self.first.0 + self.count as u64)
    }

    /// Takes a page in, if `fill` returns true. Pages before it that it does not follow must have been packed.
    pub(in crate::memory) fn page<E>(
        &mut self,
        page: PageIndex,
        fill: impl FnOnce(&mut [u8; PAGE_SIZE]) -> Result<bool, E>,
    ) -> Result<bool, E> {
        self.pages.resize(PACK_PAGES * PAGE_SIZE, 0);
        let (slots, _) = self.pages.as_chunks_mut::<PAGE_SIZE>();
        let kept = fill(&mut slots[self.count])?;
        if kept {
            if self.count == 0 {
                self.first = page;
            }
            self.count += 1;
        }
        Ok(kept)
    }

    /// Appends what was taken in to the batch: packed, or as it is where that does not help. `None` if there was nothing.
    pub(in crate::memory) fn pack(&mut self, codec: Codec, batch: &mut Batch) -> Option<Packing> {
        let count = std::mem::take(&mut self.count);
        if count == 0 {
            return None;
        }
        let raw = &self.pages[..count * PAGE_SIZE];
        let room = Compressor::room(codec, raw.len());
        let compressor = &mut self.compressor;
        let began = Instant::now();
        let packed = batch.packed(self.first, count as u32, codec, room, |out| {
            compressor.pack(codec, raw, out)
        });
        let took = began.elapsed();
        if packed.is_none() {
            let (pages, _) = raw.as_chunks::<PAGE_SIZE>();
            for (page, content) in (self.first.0..).zip(pages) {
                let Ok(_kept) = batch.page(PageIndex(page), |slot| {
                    slot.copy_from_slice(content);
                    Ok::<bool, std::convert::Infallible>(true)
                });
            }
        }
        Some(Packing {
            codec,
            raw: raw.len(),
            packed: packed.unwrap_or(raw.len()),
            took,
        })
    }

    /// Packs some of `pages` to see how it would go, and keeps nothing.
    pub(in crate::memory) fn sample(&mut self, codec: Codec, pages: &[u8]) -> Packing {
        let raw = &pages[..pages.len().min(SAMPLE_PAGES * PAGE_SIZE)];
        let room = Compressor::room(codec, raw.len());
        if self.scrap.len() < room {
            self.scrap.resize(room, 0);
        }
        let began = Instant::now();
        let packed = self.compressor.pack(codec, raw, &mut self.scrap);
        Packing {
            codec,
            raw: raw.len(),
            packed: packed.unwrap_or(raw.len()),
            took: began.elapsed(),
        }
    }
}
