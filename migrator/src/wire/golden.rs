//! The bytes of every message, pinned; [`properties`] is what must hold for any bytes at all.

mod disks;
mod missing;
mod pages;
mod properties;

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use vm_runtime::pod::{PodNet, PodSpec};
use vm_runtime::spec::{Accel, VmSpec};
use vm_runtime::units::{self, Epoch, PAGE_SIZE, PageIndex};

use super::bulk::{Codec, Data, PacketKind, Urgent};
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
    control(VmWaits, "01000000 1e");
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
    let pod = PodPlace {
        mac: [1, 2, 3, 4, 5, 6],
        v4: Some([10, 77, 0, 9]),
        v6: None,
        epoch: Epoch(300),
    };
    let places = Places {
        seq: 1,
        vni: 7077,
        whole: true,
        here: vec![pod],
        gone: vec![[9; 6]],
    };
    control(
        places,
        "1b000000 31 01 a537 01 01 010203040506 01 0a4d0009 00 ac02 01 090909090909",
    );
    control(PlacesAck { seq: 300 }, "03000000 32 ac02");
    let wanted = EndWanted {
        pod,
        at: "b".to_owned(),
        nonce: 5,
    };
    control(
        wanted,
        "12000000 33 010203040506 01 0a4d0009 00 ac02 01 62 05",
    );
    control(Query { migration: ID }, &format!("11000000 14 {ID_HEX}"));
    for (verdict, byte) in [(Verdict::Running, "00"), (Verdict::Discarded, "01")] {
        let reply = QueryReply {
            migration: ID,
            verdict,
            wants_pages: verdict == Verdict::Running,
        };
        let wants = if byte == "00" { "01" } else { "00" };
        control(reply, &format!("13000000 15 {ID_HEX} {byte} {wants}"));
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
        RefuseCode::Topology,
        RefuseCode::Disk,
    ];
    for (number, code) in codes.into_iter().enumerate() {
        let reason = String::new();
        let frame = bytes(&Control::from(Refuse { code, reason }));
        assert_eq!(frame, [3, 0, 0, 0, 3, number as u8, 0]);
    }
}

/// An offer of a pod of 512 MiB.
pub(crate) fn offer() -> Offer {
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
            hugepages: false,
            vcpus: 1,
            volumes: Vec::new(),
            containers: Vec::new(),
            cold_start: false,
            storage_class: None,
            settings: Default::default(),
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
            writable: Vec::new(),
            free_page_reporting: true,
            announced_images: false,
            hugepages: false,
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
        routed: None,
        disks: Vec::new(),
        lists: None,
    }
}

/// The pod and the VM travel as JSON text, whose fields are their crates' affair; everything around them is pinned here.
#[test]
fn the_offer_has_these_bytes() {
    let mut offer = offer();
    let pods = vec!["10.77.0.0/24".parse().unwrap()];
    offer.routed = Some(RoutedOffer {
        pods: pods.try_into().unwrap(),
        mtu: 1450,
    });
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
    let framed = |payload: &[u8]| {
        let mut frame = ((payload.len() + 1) as u32).to_le_bytes().to_vec();
        frame.push(0x01);
        frame.extend(payload);
        frame
    };
    let on_a_bridge = Offer {
        routed: None,
        ..offer.clone()
    };
    let frame = framed(&payload);
    assert_eq!(bytes(&Control::from(on_a_bridge.clone())), frame);
    assert_eq!(parse::<Control>(&frame).unwrap(), on_a_bridge.into());
    let short = payload.len();
    payload.push(1);
    text(&mut payload, "10.77.0.0/24");
    payload.extend([0xaa, 0x0b]);
    let frame = framed(&payload);
    assert_eq!(bytes(&Control::from(offer.clone())), frame);
    assert_eq!(parse::<Control>(&frame).unwrap(), offer.clone().into());
    payload.push(0);
    assert!(parse::<Control>(&framed(&payload)).is_err());

    let disk = DiskOffer {
        name: "root".to_owned(),
        size: 1 << 30,
        allocated: 300,
    };
    offer.disks = vec![disk];
    payload.truncate(short);
    payload.extend([0, 1, 1]);
    text(&mut payload, "10.77.0.0/24");
    payload.extend([0xaa, 0x0b, 1]);
    text(&mut payload, "root");
    payload.extend([0x80, 0x80, 0x80, 0x80, 0x04, 0xac, 0x02]);
    let frame = framed(&payload);
    assert_eq!(bytes(&Control::from(offer.clone())), frame);
    assert_eq!(parse::<Control>(&frame).unwrap(), offer.into());
    // What version 4 adds is behind a tag.
    let mut later = self::offer();
    let list = |chunks, order| ListLengths { chunks, order };
    later.lists = Some(ImageLists {
        later: true,
        lengths: vec![list(300, 2), list(1, 0)],
    });
    payload.truncate(short);
    payload.extend([0, 0, 0, 1, 1, 2, 0xac, 0x02, 2, 1, 0]);
    let frame = framed(&payload);
    assert_eq!(bytes(&Control::from(later.clone())), frame);
    assert_eq!(parse::<Control>(&frame).unwrap(), later.into());
    for (at, byte) in [(3, 0), (3, 99)] {
        let mut wrong = payload.clone();
        wrong[short + at] = byte;
        assert!(parse::<Control>(&framed(&wrong)).is_err());
    }
    let mut twice = payload.clone();
    twice.extend([1, 1, 0]);
    assert!(parse::<Control>(&framed(&twice)).is_err());
    payload.truncate(short);
    payload.extend([0, 0, 0]);
    assert!(
        parse::<Control>(&framed(&payload)).is_err(),
        "one offer has one form"
    );
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
    let digest = [0xcd; 32];
    let absent = Data::Absent { digest };
    golden::<Data>(absent, &format!("21000000 4a {}", "cd".repeat(32)));
    let digests = vec![digest];
    control(
        ChunksWanted { digests },
        &format!("22000000 26 01 {}", "cd".repeat(32)),
    );
    let moved = ImagesMoved {
        size: 300,
        here: 1,
        before_resume: 2,
    };
    control(moved, "05000000 27 ac02 01 02");
    let piece = ListPiece(Bytes::from_static(b"xyz"));
    control(piece, "04000000 28 78797a");
    for (codec, byte) in [(Codec::Lz4, "01"), (Codec::Zstd, "02")] {
        let packed = Data::Packed {
            first,
            count: 2,
            codec,
            raw: Bytes::from_static(b"xyz"),
        };
        golden::<Data>(
            packed,
            &format!("11000000 45 0201000000000000 02000000 {byte} 78797a"),
        );
    }
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
    let flows = Flows(Bytes::from_static(b"xyz"));
    golden::<Urgent>(Urgent::Flows(flows.clone()), "04000000 63 78797a");
    control(flows, "04000000 20 78797a");
    let taken = FlowsTaken {
        moved: 300,
        failed: 1,
        untracked: 2,
    };
    control(taken, "05000000 21 ac02 01 02");
    let bound = Bound(Bytes::from_static(b"xyz"));
    golden::<Urgent>(Urgent::Bound(bound.clone()), "04000000 64 78797a");
    control(bound, "04000000 24 78797a");
    let taken = BoundTaken {
        served: 300,
        unserved: 1,
    };
    control(taken, "04000000 25 ac02 01");
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
