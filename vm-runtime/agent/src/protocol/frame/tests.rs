use proptest::prelude::*;

use super::*;

fn all(bytes: &[u8]) -> Vec<Frame> {
    let mut frames = Vec::new();
    Decoder::new().push(bytes, |f| frames.push(f));
    frames
}

fn any_frame() -> impl Strategy<Value = Frame> {
    let payload = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..600),
        proptest::collection::vec(Just(0u8), 0..600),
        proptest::collection::vec(Just(7u8), 250..1024),
    ];
    prop_oneof![
        any::<(u16, u16, [u8; 16], u64, u64, bool)>().prop_map(
            |(min, max, session, nonce, next_rx, fresh)| Frame::Attach {
                min,
                max,
                session,
                nonce,
                next_rx,
                fresh
            }
        ),
        any::<(u16, u64, u64)>().prop_map(|(version, nonce, next_rx)| Frame::Attached {
            version,
            nonce,
            next_rx
        }),
        any::<u64>().prop_map(|nonce| Frame::Refused {
            nonce,
            reason: Refusal::UnknownSession
        }),
        (any::<u64>(), any::<u64>(), payload).prop_map(|(seq, ack, payload)| Frame::Data {
            seq,
            ack,
            payload
        }),
        any::<u64>().prop_map(|ack| Frame::Ack { ack }),
        Just(Frame::Gap),
    ]
}

#[test]
fn the_handshake_has_these_bytes_for_ever() {
    let mut wire = Vec::new();
    encode(
        &Frame::Attach {
            min: 1,
            max: 2,
            session: [0xaa; 16],
            nonce: 3,
            next_rx: 4,
            fresh: true,
        },
        &mut wire,
    );
    let hex: String = wire.iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(
        hex,
        "00030101020212aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa030101010101010204010101010101060174b82f8f00"
    );
    wire.clear();
    encode(
        &Frame::Attached {
            version: 1,
            nonce: 3,
            next_rx: 4,
        },
        &mut wire,
    );
    let hex: String = wire.iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(hex, "00030201020301010101010102040101010101010577c36cec00");
}

#[test]
fn the_longest_payload_fits_and_a_longer_frame_is_dropped() {
    let data = |len| Frame::Data {
        seq: 1,
        ack: 0,
        payload: vec![9; len],
    };
    let mut wire = Vec::new();
    encode(&data(MAX_PAYLOAD), &mut wire);
    encode(&data(MAX_PAYLOAD + 4096), &mut wire);
    encode(&Frame::Gap, &mut wire);
    assert_eq!(all(&wire), vec![data(MAX_PAYLOAD), Frame::Gap]);
}

proptest! {
    #[test]
    fn frames_come_back_whatever_the_pieces(
        frames in proptest::collection::vec(any_frame(), 0..8),
        piece in 1usize..40,
    ) {
        let mut wire = Vec::new();
        for frame in &frames {
            encode(frame, &mut wire);
        }
        let mut decoder = Decoder::new();
        let mut seen = Vec::new();
        for bytes in wire.chunks(piece) {
            decoder.push(bytes, |f| seen.push(f));
        }
        prop_assert_eq!(seen, frames);
        prop_assert_eq!(decoder.dropped(), 0);
    }

    #[test]
    fn junk_never_panics_and_the_next_frame_is_found(junk in proptest::collection::vec(any::<u8>(), 0..3000)) {
        let mut wire = junk;
        wire.push(0);
        encode(&Frame::Ack { ack: 77 }, &mut wire);
        prop_assert_eq!(all(&wire).pop(), Some(Frame::Ack { ack: 77 }));
    }

    #[test]
    fn a_flipped_bit_is_noticed(frame in any_frame(), at in any::<proptest::sample::Index>(), bit in 0u32..8) {
        let mut wire = Vec::new();
        encode(&frame, &mut wire);
        let at = at.index(wire.len());
        wire[at] ^= 1 << bit;
        wire.push(0);
        // A flipped delimiter before the frame leaves the frame's beginning spoilt as well.
        let seen = all(&wire);
        prop_assert!(seen.is_empty() || (seen == vec![frame] && wire[at] == 0), "{:?}", seen);
    }
}
