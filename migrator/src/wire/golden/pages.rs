//! Frames of pages: a batch has the bytes of the messages that it stands for, and what a peer packed is looked at first.

use bytes::Bytes;
use vm_runtime::units::{PAGE_SIZE, PageIndex};

use super::bytes;
use crate::wire::batch::Batch;
use crate::wire::bulk::{Codec, Data};
use crate::wire::codec::{DecodeError, Message};

/// Appends a page of that byte, or leaves it out.
fn page(batch: &mut Batch, page: u64, byte: u8, keep: bool) {
    let filled = batch.page(PageIndex(page), |content| {
        content.fill(byte);
        Ok::<bool, ()>(keep)
    });
    assert_eq!(filled, Ok(keep));
}

#[test]
fn a_batch_has_the_bytes_of_its_messages() {
    let mut batch = Batch::new();
    let zeros = Data::Zeros {
        first: PageIndex(6),
        count: 1,
    };
    let pages = |first, count, byte| {
        let raw = Bytes::from(vec![byte; count * PAGE_SIZE]);
        let first = PageIndex(first);
        bytes(&Data::Pages { first, raw })
    };
    for _ in 0..2 {
        page(&mut batch, 4, 5, true);
        page(&mut batch, 5, 5, true);
        page(&mut batch, 6, 9, false);
        page(&mut batch, 7, 6, true);
        batch.push(&zeros);
        page(&mut batch, 8, 7, true);
        page(&mut batch, 6, 9, false);
        let failed: Result<bool, &str> = batch.page(PageIndex(9), |_| Err("failed"));
        assert_eq!(failed, Err("failed"));
        page(&mut batch, 9, 7, true);
        let expected = [
            pages(4, 2, 5),
            pages(7, 1, 6),
            bytes(&zeros),
            pages(8, 2, 7),
        ];
        assert_eq!(batch.as_bytes(), expected.concat());
        batch.clear();
        assert!(batch.is_empty());
    }
}

#[test]
fn packed_pages_have_the_bytes_of_their_message() {
    let mut batch = Batch::new();
    page(&mut batch, 1, 5, true);
    let content = |out: &mut [u8]| {
        out[..3].copy_from_slice(b"xyz");
        Some(3)
    };
    let (first, count, codec) = (PageIndex(2), 2, Codec::Zstd);
    assert_eq!(batch.packed(first, count, codec, 100, content), Some(3));
    assert!(batch.last_pages().is_empty());
    assert_eq!(batch.packed(PageIndex(4), 1, codec, 100, |_| None), None);
    // Page 2 would follow page 1, but for the frame between them.
    page(&mut batch, 2, 6, true);
    assert_eq!(batch.last_pages(), [6; PAGE_SIZE]);
    let pages = |first, byte| {
        let raw = Bytes::from(vec![byte; PAGE_SIZE]);
        let first = PageIndex(first);
        bytes(&Data::Pages { first, raw })
    };
    let raw = Bytes::from_static(b"xyz");
    let packed = bytes(&Data::Packed {
        first,
        count,
        codec,
        raw,
    });
    assert_eq!(
        batch.as_bytes(),
        [pages(1, 5), packed, pages(2, 6)].concat()
    );
}

#[test]
fn a_frame_of_a_batch_is_never_longer_than_the_wire_allows() {
    let mut batch = Batch::new();
    for index in 0..300 {
        page(&mut batch, index, 1, true);
    }
    let pages = |first, count| {
        let raw = Bytes::from(vec![1; count * PAGE_SIZE]);
        let first = PageIndex(first);
        bytes(&Data::Pages { first, raw })
    };
    assert_eq!(batch.as_bytes(), [pages(0, 256), pages(256, 44)].concat());
}

/// A frame of packed pages is refused before anything is unpacked, or room made for it.
#[test]
fn packed_pages_that_cannot_be_are_refused() {
    let malformed = Err(DecodeError::Malformed("Packed"));
    let packed = |first: u64, count: u32, codec: u8, raw: &[u8]| {
        let mut payload = first.to_le_bytes().to_vec();
        payload.extend(count.to_le_bytes());
        payload.push(codec);
        payload.extend(raw);
        Data::decode(0x45, Bytes::from(payload))
    };
    assert!(packed(0, 256, 2, &[1]).is_ok());
    // No pages, more than a frame may have, a count that would overflow.
    for count in [0, 257, u32::MAX] {
        assert_eq!(packed(0, count, 1, &[1]), malformed, "{count} pages");
    }
    // Codecs that there are not.
    for codec in [0, 3, 255] {
        assert_eq!(packed(0, 1, codec, &[1]), malformed, "codec {codec}");
    }
    // Nothing, or as much as the pages have: then they would come as they are.
    for bytes in [0, PAGE_SIZE, 2 * PAGE_SIZE] {
        assert_eq!(packed(0, 1, 1, &vec![1; bytes]), malformed, "{bytes} bytes");
    }
    assert_eq!(packed(u64::MAX, 1, 1, &[1]), malformed);
    assert_eq!(Data::decode(0x45, Bytes::from_static(&[0; 12])), malformed);
}
