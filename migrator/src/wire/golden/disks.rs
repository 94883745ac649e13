//! Frames of writable disks.

use bytes::Bytes;
use proptest::prelude::*;

use super::{bytes, control, golden, parse};
use crate::wire::bulk::{BLOCK, Blocks, Codec, Data, MAX_BLOCKS, Place};
use crate::wire::codec::DecodeError;
use crate::wire::message::{DiskAck, DisksDone};

const AT: Place = Place {
    disk: 2,
    offset: 0x3000,
};

#[test]
fn messages_of_disks_have_these_bytes() {
    let raw = Bytes::from(vec![0xee; BLOCK as usize]);
    let content = "ee".repeat(BLOCK as usize);
    golden::<Data>(
        Data::Disk(Blocks::Raw { at: AT, raw }),
        &format!("0f100000 46 0200 0030000000000000 00100000 {content}"),
    );
    for (codec, byte) in [(Codec::Lz4, "01"), (Codec::Zstd, "02")] {
        let packed = Blocks::Packed {
            at: AT,
            len: 0x2000,
            codec,
            raw: Bytes::from_static(b"xyz"),
        };
        golden::<Data>(
            Data::Disk(packed),
            &format!("13000000 47 0200 0030000000000000 00200000 {byte} 78797a"),
        );
    }
    golden::<Data>(
        Data::Disk(Blocks::Hole {
            at: AT,
            len: 1 << 40,
        }),
        "13000000 48 0200 0030000000000000 0000000000010000",
    );
    golden::<Data>(
        Data::Disk(Blocks::Barrier { round: 7 }),
        "05000000 49 07000000",
    );
    control(DiskAck { round: 300 }, "03000000 22 ac02");
    let done = DisksDone {
        round: 3,
        bytes: 300,
    };
    control(done, "04000000 23 03 ac02");
}

#[test]
fn the_longest_frame_fits_the_lane() {
    let raw = Bytes::from(vec![1; MAX_BLOCKS as usize]);
    let longest = Data::Disk(Blocks::Raw { at: AT, raw });
    assert_eq!(parse::<Data>(&bytes(&longest)), Ok(longest));
}

#[test]
fn what_is_no_whole_block_of_any_file_is_refused() {
    let bad = Err(DecodeError::Malformed("Blocks"));
    let hole = |offset: u64, len: u64| {
        let at = Place { disk: 0, offset };
        parse::<Data>(&bytes(&Data::Disk(Blocks::Hole { at, len })))
    };
    assert!(hole(0, BLOCK).is_ok());
    for (offset, len) in [
        (1, BLOCK),
        (0, BLOCK + 1),
        (0, 0),
        (i64::MAX as u64 + 1 - BLOCK, 2 * BLOCK),
        (u64::MAX - BLOCK + 1, BLOCK),
    ] {
        assert_eq!(hole(offset, len), bad, "{offset} {len}");
    }
    // A length that is not that of the content, content that is not smaller, a codec that nobody has, bytes behind the end.
    let raw = Bytes::from(vec![1; BLOCK as usize]);
    let mut frame = bytes(&Data::Disk(Blocks::Raw { at: AT, raw }));
    frame[16] = 0x20;
    assert_eq!(parse::<Data>(&frame), bad);
    let packed = |len: usize| {
        let raw = Bytes::from(vec![1; len]);
        let (len, codec) = (BLOCK as u32, Codec::Lz4);
        let at = AT;
        bytes(&Data::Disk(Blocks::Packed {
            at,
            len,
            codec,
            raw,
        }))
    };
    for len in [0, BLOCK as usize] {
        assert_eq!(parse::<Data>(&packed(len)), bad);
    }
    let mut frame = packed(1);
    frame[19] = 3;
    assert_eq!(parse::<Data>(&frame), bad);
    let frame = b"\x06\0\0\0\x49\x01\0\0\0\0";
    assert_eq!(parse::<Data>(frame), bad);
}

proptest! {
    #[test]
    fn what_parses_has_the_same_bytes_again(kind in 0x46u8..=0x49, payload in proptest::collection::vec(any::<u8>(), 0..40)) {
        let mut frame = crate::wire::frame::header(kind, payload.len()).to_vec();
        frame.extend(payload);
        if let Ok(message) = parse::<Data>(&frame) {
            prop_assert_eq!(bytes(&message), frame);
        }
    }
}
