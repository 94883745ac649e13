//! The bytes of every message, pinned; and what must hold for any bytes at all.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;
use vm_runtime::pod::{PodNet, PodSpec};
use vm_runtime::spec::{Accel, VmSpec};
use vm_runtime::units::{self, Epoch, PAGE_SIZE, PageIndex};

use super::bulk::{Batch, Data, PacketKind, Urgent};
use super::codec::{DecodeError, Message, encode};
use super::frame::{Lane, take_frame};
use super::id::MigrationId;
use super::message::*;

const ID: MigrationId = MigrationId([0xab; 16]);

fn bytes<M: Message>(message: &M) -> Vec<u8> {
    let mut out = Vec::new();
    encode(message, &mut out);
    out
}

fn parse<M: Message>(frame: &[u8]) -> Result<M, DecodeError> {
    let mut buf = BytesMut::from(frame);
    let frame = take_frame(&mut buf, M::LANE).unwrap().unwrap();
    assert!(buf.is_empty());
    M::decode(frame.kind, frame.payload)
}

/// `text` is hex with spaces.
fn golden<M: Message + PartialEq + std::fmt::Debug>(message: impl Into<M>, text: &str) {
    let message = message.into();
    let hex: String = bytes(&message).iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(hex, text.replace(' ', ""), "{message:?}");
    assert_eq!(parse::<M>(&bytes(&message)).unwrap(), message);
}

fn control(message: impl Into<Control>, text: &str) {
    golden::<Control>(message, text);
}

const ID_HEX: &str = "abababababababababababababababab";

#[test]
fn control_messages_have_these_bytes() {
    let want = ImageWant {
        image: 1,
        chunks: vec![0, 300],
    };
    control(Accept { wants: vec![want] }, "07000000 02 01 01 02 00 ac02");
    let refuse = Refuse {
        code: RefuseCode::Image,
        reason: "no".to_owned(),
    };
    control(refuse, "05000000 03 06 02 6e6f");
    control(ImageDone, "01000000 04");
    control(Prepared, "01000000 05");
    control(
        RoundEnd {
            round: 2,
            pages: 300,
        },
        "04000000 06 02 ac02",
    );
    control(RoundAck { round: 2 }, "02000000 07 02");
    control(MemoryDone { round: 3, pages: 1 }, "03000000 08 03 01");
    control(StateBegin, "01000000 09");
    control(
        StateChunk(Bytes::from_static(b"\x01\x02")),
        "03000000 0a 0102",
    );
    control(StateEnd { bytes: 2 }, "02000000 0b 02");
    let handover = Handover {
        stopped_at_unix_us: 1,
        agent: vec![9],
    };
    control(handover, "04000000 0c 01 01 09");
    let hashes = PageHashes::new(PageIndex(2), &[1, u64::MAX]);
    control(
        hashes,
        "19000000 0d 0200000000000000 0100000000000000 ffffffffffffffff",
    );
    control(HashesEnd { pages: 2 }, "02000000 0e 02");
    let ready = Ready {
        verified: 2,
        mismatched: 0,
    };
    control(ready, "03000000 0f 02 00");
    control(Grant { epoch: Epoch(5) }, "02000000 10 05");
    let running = Running {
        epoch: Epoch(5),
        resumed_at_unix_us: 2,
        steps: vec![("load".to_owned(), 300)],
        failed: None,
    };
    control(running, "0c000000 11 05 02 01 04 6c6f6164 ac02 00");
    let ledger = Ledger {
        seen: 1,
        delivered: 2,
        held: 3,
        forwarded: 4,
        refused: 5,
        lost: 6,
    };
    let released = Released {
        migration: ID,
        ledger,
    };
    control(released, &format!("17000000 12 {ID_HEX} 010203040506"));
    let abort = Abort {
        reason: "x".to_owned(),
    };
    control(abort, "03000000 13 01 78");
    control(Query { migration: ID }, &format!("11000000 14 {ID_HEX}"));
    for (verdict, byte) in [(Verdict::Running, "00"), (Verdict::Discarded, "01")] {
        let reply = QueryReply {
            migration: ID,
            verdict,
        };
        control(reply, &format!("12000000 15 {ID_HEX} {byte}"));
    }
    control(Ping { stamp_us: 300 }, "03000000 16 ac02");
    control(Pong { stamp_us: 300 }, "03000000 17 ac02");
    let bye = Bye {
        migration: ID,
        ledger,
    };
    control(bye, &format!("17000000 18 {ID_HEX} 010203040506"));
}

#[test]
fn refusal_codes_have_these_numbers() {
    let codes = [
        RefuseCode::Memory,
        RefuseCode::QemuVersion,
        RefuseCode::MachineType,
        RefuseCode::CpuModel,
        RefuseCode::Accel,
        RefuseCode::KernelFeature,
        RefuseCode::Image,
        RefuseCode::AddressTaken,
        RefuseCode::NameTaken,
        RefuseCode::GuestKernel,
        RefuseCode::Busy,
        RefuseCode::Version,
        RefuseCode::Internal,
    ];
    for (number, code) in codes.into_iter().enumerate() {
        let reason = String::new();
        let frame = bytes(&Control::from(Refuse { code, reason }));
        assert_eq!(frame, [3, 0, 0, 0, 3, number as u8, 0]);
    }
}

fn offer() -> Offer {
    let mac = "52:54:00:12:34:56".parse().unwrap();
    Offer {
        migration: ID,
        epoch: Epoch(2),
        source: "a".to_owned(),
        pod: PodSpec {
            name: "web".to_owned(),
            labels: BTreeMap::new(),
            net: PodNet {
                mac,
                ipv4: Some(("10.77.0.10".parse().unwrap(), 24)),
                ipv6: None,
                gateway4: None,
                gateway6: None,
            },
            memory: units::Bytes::mib(512),
            vcpus: 1,
            containers: Vec::new(),
        },
        vm: VmSpec {
            name: "web".to_owned(),
            uuid: "u".to_owned(),
            machine: "pc-q35-7.2".to_owned(),
            cpu: "max".to_owned(),
            accel: Accel::Tcg,
            memory: units::Bytes::mib(512),
            vcpus: 1,
            mac,
            disks: Vec::new(),
            cmdline: "quiet".to_owned(),
            kernel_sha256: String::new(),
            initramfs_sha256: String::new(),
        },
        ram: units::Bytes::mib(512),
        qemu_version: "7.2.22".to_owned(),
        options: OfferOptions { verify: true },
        record: "{}".to_owned(),
        images: vec![ImageOffer {
            record: "[1]".to_owned(),
        }],
    }
}

/// The pod and the VM travel as JSON text, whose fields are their crates' affair; everything around them is pinned here.
#[test]
fn the_offer_has_these_bytes() {
    let offer = offer();
    let text = |out: &mut Vec<u8>, text: &str| {
        let n = text.len();
        assert!((128..1 << 14).contains(&n) || n < 128);
        match n {
            0..128 => out.push(n as u8),
            _ => out.extend([n as u8 | 0x80, (n >> 7) as u8]),
        }
        out.extend(text.as_bytes());
    };
    let mut payload = vec![0xab; 16];
    payload.push(2);
    text(&mut payload, "a");
    text(&mut payload, &serde_json::to_string(&offer.pod).unwrap());
    text(&mut payload, &serde_json::to_string(&offer.vm).unwrap());
    payload.extend([0x80, 0x80, 0x80, 0x80, 0x02]);
    text(&mut payload, "7.2.22");
    payload.push(1);
    text(&mut payload, "{}");
    payload.push(1);
    text(&mut payload, "[1]");
    let mut frame = ((payload.len() + 1) as u32).to_le_bytes().to_vec();
    frame.push(0x01);
    frame.extend(payload);
    assert_eq!(bytes(&Control::from(offer.clone())), frame);
    assert_eq!(parse::<Control>(&frame).unwrap(), offer.into());
}

#[test]
fn data_and_urgent_messages_have_these_bytes() {
    let raw = Bytes::from(vec![0xee; PAGE_SIZE]);
    let first = PageIndex(0x0102);
    let content = "ee".repeat(PAGE_SIZE);
    golden::<Data>(
        Data::Pages { first, raw },
        &format!("0d100000 41 0201000000000000 01000000 {content}"),
    );
    golden::<Data>(
        Data::Zeros { first, count: 3 },
        "11000000 42 0201000000000000 0300000000000000",
    );
    golden::<Data>(Data::Barrier { round: 7 }, "05000000 43 07000000");
    let chunk = Data::Chunk {
        digest: [0xcd; 32],
        raw: Bytes::from_static(b"x"),
    };
    golden::<Data>(chunk, &format!("22000000 44 {} 78", "cd".repeat(32)));
    for (kind, byte) in [
        (PacketKind::Residue, "01"),
        (PacketKind::Frame, "02"),
        (PacketKind::ResidueEnd, "03"),
        (PacketKind::End, "04"),
    ] {
        let frame = Bytes::from_static(b"f");
        let packet = Urgent::Packet {
            seq: 9,
            kind,
            frame,
        };
        golden::<Urgent>(packet, &format!("0b000000 61 0900000000000000 {byte} 66"));
    }
    golden::<Urgent>(Urgent::PacketAck { seq: 9 }, "09000000 62 0900000000000000");
}

#[test]
fn a_batch_has_the_bytes_of_its_messages() {
    let mut batch = Batch::new();
    batch.pages(PageIndex(4), 2).fill(5);
    let mark = batch.mark();
    batch.pages(PageIndex(6), 1);
    batch.rewind(mark);
    let zeros = Data::Zeros {
        first: PageIndex(6),
        count: 1,
    };
    batch.push(&zeros);
    let raw = Bytes::from(vec![5; 2 * PAGE_SIZE]);
    let first = PageIndex(4);
    let expected = [bytes(&Data::Pages { first, raw }), bytes(&zeros)].concat();
    assert_eq!(batch.as_bytes(), expected);
}

#[test]
fn trailing_bytes_and_unknown_types_are_errors() {
    let unknown = DecodeError::UnknownType {
        lane: Lane::Control,
        kind: 0x7f,
    };
    assert_eq!(parse::<Control>(&[1, 0, 0, 0, 0x7f]), Err(unknown));
    let trailing = parse::<Control>(&[3, 0, 0, 0, 0x10, 5, 0]);
    assert_eq!(trailing, Err(DecodeError::Malformed("Grant")));
    // Pages whose count does not match their bytes, zeros beyond any file.
    let mut pages = bytes(&Data::Pages {
        first: PageIndex(0),
        raw: Bytes::from(vec![0; PAGE_SIZE]),
    });
    pages[13] = 2;
    assert_eq!(parse::<Data>(&pages), Err(DecodeError::Malformed("Pages")));
    let zeros = bytes(&Data::Zeros {
        first: PageIndex(u64::MAX - 1),
        count: 9,
    });
    assert_eq!(parse::<Data>(&zeros), Err(DecodeError::Malformed("Zeros")));
}

#[test]
fn a_list_that_claims_more_than_its_frame_holds_is_an_error_and_not_an_allocation() {
    // Accept with 2^63 wants.
    let mut payload = vec![0xff; 9];
    payload.push(1);
    let claimed = Control::decode(0x02, Bytes::from(payload));
    assert_eq!(claimed, Err(DecodeError::Malformed("Accept")));
}

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
        let _ = Data::decode(0x41 + kind % 4, junk.clone());
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
    fn whatever_parses_has_one_encoding(kind in 0x41u8..0x45, junk in proptest::collection::vec(any::<u8>(), 0..64)) {
        let mut frame = super::frame::header(kind, junk.len()).to_vec();
        frame.extend_from_slice(&junk);
        if let Ok(message) = parse::<Data>(&frame) {
            prop_assert_eq!(bytes(&message), frame);
        }
    }
}
