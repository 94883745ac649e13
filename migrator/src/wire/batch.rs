//! Encoded data frames in one buffer, which is filled in place and used again: pages go from the guest's memory into the
//! frame with one copy, and many small frames leave in one write.

use vm_runtime::units::{PAGE_SIZE, PageIndex};

use crate::wire::bulk::{Codec, Data, MAX_PAGES, PACKED, PACKED_HEAD, PAGES, PAGES_HEAD};
use crate::wire::codec;
use crate::wire::frame;

/// Bytes of a `Pages` frame before its content.
const HEAD: usize = frame::HEADER + PAGES_HEAD;

/// Encoded data frames.
#[derive(Debug, Default)]
pub struct Batch {
    /// Grows, and never shrinks: what lies beyond `len` is of no meaning, and need not be cleared again.
    buf: Vec<u8>,
    len: usize,
    open: Option<Open>,
    /// Where frames of other types are encoded.
    other: Vec<u8>,
}

/// The last frame, while it is one of pages that may get another one.
#[derive(Clone, Copy, Debug)]
struct Open {
    start: usize,
    first: PageIndex,
    count: u32,
}

impl Open {
    fn next(&self) -> Option<PageIndex> {
        (self.count < MAX_PAGES).then_some(PageIndex(self.first.0 + u64::from(self.count)))
    }
}

impl Batch {
    /// An empty batch, whose memory grows with its use.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets `fill` write the content of `page` where it belongs in a `Pages` frame, and appends it if `fill` returns true. Consecutive
    /// pages share a frame, up to [`MAX_PAGES`]. What `fill` is given holds anything. Returns what `fill` did.
    ///
    /// # Errors
    /// Those of `fill`; nothing is appended then.
    pub fn page<E>(
        &mut self,
        page: PageIndex,
        fill: impl FnOnce(&mut [u8; PAGE_SIZE]) -> Result<bool, E>,
    ) -> Result<bool, E> {
        let open = self.open.filter(|open| open.next() == Some(page));
        let start = open.map_or(self.len + HEAD, |_| self.len);
        let kept = match self.room(start, PAGE_SIZE).first_chunk_mut() {
            Some(content) => fill(content)?,
            None => false,
        };
        if kept {
            let mut open = open.unwrap_or(Open {
                start: self.len,
                first: page,
                count: 0,
            });
            open.count += 1;
            self.head(open);
            self.len = start + PAGE_SIZE;
            self.open = Some(open);
        }
        Ok(kept)
    }

    /// Lets `fill` write the packed content of `count` pages from `first` on, in `room` bytes, and appends it if `fill` says how many
    /// bytes it wrote: at least one, and fewer than the pages have. Returns what `fill` did.
    pub fn packed(
        &mut self,
        first: PageIndex,
        count: u32,
        codec: Codec,
        room: usize,
        fill: impl FnOnce(&mut [u8]) -> Option<usize>,
    ) -> Option<usize> {
        const HEAD: usize = frame::HEADER + PACKED_HEAD;
        let start = self.len;
        let packed = fill(self.room(start + HEAD, room))?;
        let (header, rest) = self.buf[start..start + HEAD].split_at_mut(frame::HEADER);
        header.copy_from_slice(&frame::header(PACKED, PACKED_HEAD + packed));
        rest[..8].copy_from_slice(&first.0.to_le_bytes());
        rest[8..12].copy_from_slice(&count.to_le_bytes());
        rest[12] = codec.byte();
        self.len = start + HEAD + packed;
        self.open = None;
        Some(packed)
    }

    /// The content of the last frame, if it is one of pages.
    pub fn last_pages(&self) -> &[u8] {
        match self.open {
            Some(open) => &self.buf[open.start + HEAD..self.len],
            None => &[],
        }
    }

    /// Appends any frame, with a copy.
    pub fn push(&mut self, message: &Data) {
        self.open = None;
        let mut other = std::mem::take(&mut self.other);
        other.clear();
        codec::encode(message, &mut other);
        let start = self.len;
        self.room(start, other.len()).copy_from_slice(&other);
        self.len += other.len();
        self.other = other;
    }

    /// Empties the batch and keeps its memory.
    pub fn clear(&mut self) {
        self.len = 0;
        self.open = None;
    }

    /// Encoded bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing was appended.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The encoded frames.
    pub fn as_bytes(&self) -> &[u8] {
        &self.buf[..self.len]
    }

    /// The buffer from `start` on, `len` bytes.
    fn room(&mut self, start: usize, len: usize) -> &mut [u8] {
        if self.buf.len() < start + len {
            self.buf.resize(start + len, 0);
        }
        &mut self.buf[start..start + len]
    }

    fn head(&mut self, open: Open) {
        let content = open.count as usize * PAGE_SIZE;
        let head = &mut self.buf[open.start..open.start + HEAD];
        head[..frame::HEADER].copy_from_slice(&frame::header(PAGES, PAGES_HEAD + content));
        head[frame::HEADER..][..8].copy_from_slice(&open.first.0.to_le_bytes());
        head[frame::HEADER + 8..].copy_from_slice(&open.count.to_le_bytes());
    }
}
