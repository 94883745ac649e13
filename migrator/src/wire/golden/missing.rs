//! Frames about pages that are missing at the destination.

use bytes::Bytes;
use vm_runtime::units::{PAGE_SIZE, PageIndex};

use super::{control, golden, parse};
use crate::wire::fault::Fault;
use crate::wire::message::{
    Control, FaultFigures, MemoryComplete, PageBits, StaleAck, StaleEnd, Wanted,
};

#[test]
fn messages_about_missing_pages_have_these_bytes() {
    let bits = PageBits::of(&[0, 5, 0]).remove(0);
    control(
        bits,
        "19000000 19 0000000000000000 0000000000000000 0500000000000000",
    );
    control(StaleEnd { last: true }, "02000000 1a 01");
    control(StaleAck, "01000000 1b");
    control(Wanted { pages: 300 }, "03000000 1c ac02");
    let faults = FaultFigures {
        missing: 1,
        count: 2,
        max_us: 3,
        buckets: vec![(4, 5)],
        took_us: 6,
        mismatched: 7,
    };
    control(
        MemoryComplete { faults },
        "09000000 1d 01 02 03 01 04 05 06 07",
    );
    golden::<Fault>(
        Fault::Request { page: PageIndex(7) },
        "09000000 71 0700000000000000",
    );
    let raw = Bytes::from(vec![0xcd; PAGE_SIZE]);
    let first = PageIndex(7);
    let pages = Fault::Pages { first, raw };
    golden::<Fault>(
        pages,
        &format!("09100000 72 0700000000000000 {}", "cd".repeat(PAGE_SIZE)),
    );
}

#[test]
fn bad_messages_about_pages_are_refused() {
    let frames: [&[u8]; 4] = [
        // Not a multiple of 64, and half a word.
        b"\x09\0\0\0\x19\x01\0\0\0\0\0\0\0",
        b"\x0d\0\0\0\x19\0\0\0\0\0\0\0\0\0\0\0\0",
        // Beyond any file offset.
        b"\x09\0\0\0\x19\0\0\0\0\0\0\0\x80",
        b"\x01\0\0\0\x1a",
    ];
    for frame in frames {
        assert!(parse::<Control>(frame).is_err(), "{frame:?}");
    }
    let frames: [&[u8]; 3] = [
        b"\x0a\0\0\0\x71\0\0\0\0\0\0\0\0\0",
        b"\x09\0\0\0\x72\0\0\0\0\0\0\0\0",
        b"\x0a\0\0\0\x72\0\0\0\0\0\0\0\0\x01",
    ];
    for frame in frames {
        assert!(parse::<Fault>(frame).is_err(), "{frame:?}");
    }
}
