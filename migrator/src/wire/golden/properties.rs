//! What must hold for any message, and for any bytes at all.

use bytes::Bytes;
use proptest::prelude::*;
use vm_runtime::units::{Epoch, PAGE_SIZE, PageIndex};

use super::{bytes, offer, parse};
use crate::wire::bulk::{Codec, Data, PacketKind, Urgent};
use crate::wire::codec::Message;
use crate::wire::id::MigrationId;
use crate::wire::message::*;

fn any_control() -> impl Strategy<Value = Control> {
    let ledger =
        any::<[u64; 6]>().prop_map(|[seen, delivered, held, forwarded, refused, lost]| Ledger {
            seen,
            delivered,
            held,
            forwarded,
            refused,
            lost,
        });
    let id = || any::<[u8; 16]>().prop_map(MigrationId);
    let wants = proptest::collection::vec(
        (any::<u32>(), proptest::collection::vec(any::<u32>(), 0..9)),
        0..4,
    );
    prop_oneof![
        (any::<u64>(), ".{0,20}", ".{0,20}", any::<bool>()).prop_map(
            |(epoch, source, record, verify)| {
                Offer {
                    epoch: Epoch(epoch),
                    source,
                    record,
                    options: OfferOptions { verify },
                    ..offer()
                }
                .into()
            }
        ),
        wants.prop_map(|wants| {
            let wants = wants
                .into_iter()
                .map(|(image, chunks)| ImageWant { image, chunks });
            Accept {
                wants: wants.collect(),
            }
            .into()
        }),
        ".{0,40}".prop_map(|reason| Refuse {
            code: RefuseCode::Busy,
            reason
        }
        .into()),
        ".{0,40}".prop_map(|reason| Abort { reason }.into()),
        (any::<u32>(), any::<u64>()).prop_map(|(round, pages)| RoundEnd { round, pages }.into()),
        (any::<u32>(), any::<u64>()).prop_map(|(round, pages)| MemoryDone { round, pages }.into()),
        (any::<u64>(), any::<u64>()).prop_map(|(verified, mismatched)| Ready {
            verified,
            mismatched
        }
        .into()),
        proptest::collection::vec(any::<u8>(), 0..99).prop_map(|raw| StateChunk(raw.into()).into()),
        (any::<u64>(), proptest::collection::vec(any::<u8>(), 0..99)).prop_map(
            |(stopped_at_unix_us, agent)| Handover {
                stopped_at_unix_us,
                agent
            }
            .into()
        ),
        (any::<u64>(), proptest::collection::vec(any::<u64>(), 0..9))
            .prop_map(|(first, hashes)| PageHashes::new(PageIndex(first), &hashes).into()),
        (
            any::<u64>(),
            any::<u64>(),
            proptest::option::of(".{0,20}"),
            ".{0,9}"
        )
            .prop_map(|(epoch, at, failed, name)| {
                let steps = vec![(name, at)];
                let epoch = Epoch(epoch);
                Running {
                    epoch,
                    resumed_at_unix_us: at,
                    steps,
                    failed,
                }
                .into()
            }),
        (id(), ledger.clone())
            .prop_map(|(migration, ledger)| Released { migration, ledger }.into()),
        (id(), ledger).prop_map(|(migration, ledger)| Bye { migration, ledger }.into()),
        id().prop_map(|migration| Query { migration }.into()),
        (
            any::<bool>(),
            proptest::collection::vec((any::<u32>(), any::<u32>()), 0..4)
        )
            .prop_map(|(later, lengths)| {
                let list = |(chunks, order)| ListLengths { chunks, order };
                let lengths = lengths.into_iter().map(list).collect();
                let lists = Some(ImageLists { later, lengths });
                Offer { lists, ..offer() }.into()
            }),
        proptest::collection::vec(any::<u8>(), 0..99).prop_map(|raw| ListPiece(raw.into()).into()),
    ]
}

fn any_bulk() -> impl Strategy<Value = (Option<Data>, Option<Urgent>)> {
    let raw = || proptest::collection::vec(any::<u8>(), 0..99).prop_map(Bytes::from);
    let kind = proptest::sample::select(vec![
        PacketKind::Residue,
        PacketKind::Frame,
        PacketKind::ResidueEnd,
        PacketKind::End,
    ]);
    let page = (0u64..1 << 40).prop_map(PageIndex);
    prop_oneof![
        (page.clone(), 1usize..4, any::<u8>()).prop_map(|(first, count, byte)| {
            let raw = Bytes::from(vec![byte; count * PAGE_SIZE]);
            (Some(Data::Pages { first, raw }), None)
        }),
        (
            page.clone(),
            1u32..257,
            any::<bool>(),
            proptest::collection::vec(any::<u8>(), 1..99)
        )
            .prop_map(|(first, count, lz4, raw)| {
                let codec = if lz4 { Codec::Lz4 } else { Codec::Zstd };
                let raw = Bytes::from(raw);
                (
                    Some(Data::Packed {
                        first,
                        count,
                        codec,
                        raw,
                    }),
                    None,
                )
            }),
        (page, 1u64..1 << 40).prop_map(|(first, count)| (Some(Data::Zeros { first, count }), None)),
        any::<u32>().prop_map(|round| (Some(Data::Barrier { round }), None)),
        (any::<[u8; 32]>(), raw())
            .prop_map(|(digest, raw)| (Some(Data::Chunk { digest, raw }), None)),
        (any::<u64>(), kind, raw())
            .prop_map(|(seq, kind, frame)| { (None, Some(Urgent::Packet { seq, kind, frame })) }),
        any::<u64>().prop_map(|seq| (None, Some(Urgent::PacketAck { seq }))),
    ]
}

proptest! {
    #[test]
    fn control_round_trip(message in any_control()) {
        prop_assert_eq!(parse::<Control>(&bytes(&message)).unwrap(), message);
    }

    #[test]
    fn bulk_round_trip((data, urgent) in any_bulk()) {
        if let Some(message) = data {
            prop_assert_eq!(parse::<Data>(&bytes(&message)).unwrap(), message);
        }
        if let Some(message) = urgent {
            prop_assert_eq!(parse::<Urgent>(&bytes(&message)).unwrap(), message);
        }
    }

    #[test]
    fn junk_never_panics(kind: u8, junk in proptest::collection::vec(any::<u8>(), 0..200)) {
        let junk = Bytes::from(junk);
        let _ = Control::decode(kind, junk.clone());
        let _ = Control::decode(kind % 0x19, junk.clone());
        let _ = Data::decode(0x41 + kind % 5, junk.clone());
        let _ = Urgent::decode(0x61 + kind % 2, junk);
    }

    #[test]
    fn a_damaged_message_never_panics(message in any_control(), at: proptest::sample::Index, byte: u8) {
        let mut frame = bytes(&message);
        let at = 5 + at.index(frame.len());
        if let Some(place) = frame.get_mut(at) {
            *place = byte;
        }
        let _ = parse::<Control>(&frame);
    }

    #[test]
    fn whatever_parses_has_one_encoding(kind in 0x41u8..0x46, junk in proptest::collection::vec(any::<u8>(), 0..64)) {
        let mut frame = crate::wire::frame::header(kind, junk.len()).to_vec();
        frame.extend_from_slice(&junk);
        if let Ok(message) = parse::<Data>(&frame) {
            prop_assert_eq!(bytes(&message), frame);
        }
    }
}
