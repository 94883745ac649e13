use proptest::prelude::*;

use super::super::flow::tests::{ports, tcp};
use super::*;

#[test]
fn what_is_written_for_a_plain_flow_reads_as_the_same_flow() {
    let original = ports(("10.77.0.1", 40000), ("10.77.0.10", 80), 6);
    let flow = Flow {
        zone: 5,
        helper: "ftp".to_owned(),
        seq_adj: Some([
            SeqAdj {
                position: 1,
                before: 2,
                after: 3,
            },
            SeqAdj::default(),
        ]),
        ..tcp(original, original.inverted())
    };
    let expected = Flow {
        // Less what does not travel, and liberal.
        state: State::Tcp {
            state: 3,
            flags: [0x0b, 0x0b],
            scale: [7, 10],
        },
        ..flow.clone()
    };
    assert_eq!(read(&create(&flow).into_bytes()), Some(expected));
}

#[test]
fn a_translated_flow_is_made_from_its_untranslated_reply() {
    let original = ports(("10.77.0.10", 5000), ("10.96.0.1", 443), 6);
    let reply = ports(("10.77.0.20", 6443), ("10.77.0.10", 5000), 6);
    let bytes = create(&tcp(original, reply)).into_bytes();
    assert_eq!(read(&bytes).unwrap().reply, original.inverted());
    let nat = find(&bytes, NAT_DESTINATION).unwrap();
    assert_eq!(
        address(nat, NAT_V4[0], NAT_V6[0]),
        Some("10.77.0.20".parse().unwrap())
    );
    assert_eq!(
        be16(find(nat, NAT_PROTO).unwrap(), NAT_PORTS[1]),
        Some(6443)
    );
    assert!(find(&bytes, NAT_SOURCE).is_none());
}

#[test]
fn icmp_of_both_families_is_read_back() {
    for (source, destination, protocol) in [("10.0.0.1", "10.0.0.2", 1), ("fd77::1", "fd77::2", 58)]
    {
        let original = Tuple {
            key: Key::Icmp {
                kind: 8,
                code: 0,
                id: 77,
            },
            ..ports((source, 0), (destination, 0), protocol)
        };
        let flow = Flow {
            state: State::None,
            ..tcp(original, original.inverted())
        };
        assert_eq!(read(&create(&flow).into_bytes()), Some(flow));
    }
}

proptest! {
    #[test]
    fn junk_never_panics(junk in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = read(&junk);
    }
}
