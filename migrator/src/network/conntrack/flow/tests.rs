use proptest::prelude::*;

use super::*;

pub(in crate::network::conntrack) fn ports(
    from: (&str, u16),
    to: (&str, u16),
    protocol: u8,
) -> Tuple {
    Tuple {
        source: from.0.parse().unwrap(),
        destination: to.0.parse().unwrap(),
        protocol,
        key: Key::Ports {
            source: from.1,
            destination: to.1,
        },
        zone: 0,
    }
}

pub(in crate::network::conntrack) fn tcp(original: Tuple, reply: Tuple) -> Flow {
    Flow {
        original,
        reply,
        zone: 0,
        status: SEEN_REPLY | ASSURED | CONFIRMED,
        timeout_s: 300,
        mark: 7,
        labels: vec![1, 0, 0, 0],
        helper: String::new(),
        state: State::Tcp {
            state: 3,
            flags: [0x23, 0x23],
            scale: [7, 10],
        },
        seq_adj: None,
    }
}

fn plain() -> Flow {
    let original = ports(("10.77.0.1", 40000), ("10.77.0.10", 80), 6);
    tcp(original, original.inverted())
}

const POD: [&str; 2] = ["10.77.0.10", "fd77::10"];
const NODE: [&str; 1] = ["10.77.0.2"];

fn addresses(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

#[test]
fn a_flow_has_these_bytes() {
    let hex: String = Flow::encode_all(&[plain()])
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let expected = "01 00 0a4d0001 00 0a4d000a 06 01 c0b802 50 00 00 0a4d000a 00 0a4d0001 06 01 50 c0b802 00 00 0e ac02 07 04 01000000 00 01 03 23 23 07 0a 00";
    assert_eq!(hex, expected.replace(' ', ""));
}

#[test]
fn translation_is_read_from_the_two_tuples() {
    let flow = plain();
    assert_eq!((flow.source_nat(), flow.destination_nat()), (None, None));
    assert!(!flow.is_bound_to(&addresses(&NODE)));

    let out = ports(("10.77.0.10", 5000), ("192.0.2.1", 443), 6);
    let masqueraded = tcp(out, ports(("192.0.2.1", 443), ("10.77.0.2", 61000), 6));
    let to = ("10.77.0.2".parse().unwrap(), Some(61000));
    assert_eq!(masqueraded.source_nat(), Some(to));
    assert_eq!(masqueraded.destination_nat(), None);
    assert!(masqueraded.concerns(&addresses(&POD)) && masqueraded.is_bound_to(&addresses(&NODE)));
    assert!(!masqueraded.is_bound_to(&addresses(&["10.77.0.3"])));

    let node_port = tcp(
        ports(("10.77.0.1", 40000), ("10.77.0.2", 30080), 6),
        ports(("10.77.0.10", 80), ("10.77.0.1", 40000), 6),
    );
    assert_eq!(
        node_port.destination_nat(),
        Some(("10.77.0.10".parse().unwrap(), Some(80)))
    );
    assert!(node_port.concerns(&addresses(&POD)) && node_port.is_bound_to(&addresses(&NODE)));

    // A service's address that every node translates is bound to none.
    let service = tcp(
        ports(("10.77.0.10", 5000), ("10.96.0.1", 443), 6),
        ports(("10.77.0.20", 6443), ("10.77.0.10", 5000), 6),
    );
    assert!(service.destination_nat().is_some() && !service.is_bound_to(&addresses(&NODE)));
}

#[test]
fn an_icmp_identifier_is_translated_with_the_sender() {
    let original = Tuple {
        key: Key::Icmp {
            kind: 8,
            code: 0,
            id: 77,
        },
        ..ports(("10.77.0.10", 0), ("192.0.2.1", 0), 1)
    };
    let mut reply = original.inverted();
    assert!(matches!(reply.key, Key::Icmp { kind: 0, .. }));
    reply.destination = "10.77.0.2".parse().unwrap();
    reply.key = Key::Icmp {
        kind: 0,
        code: 0,
        id: 99,
    };
    let flow = Flow {
        state: State::None,
        ..tcp(original, reply)
    };
    assert_eq!(
        flow.source_nat(),
        Some(("10.77.0.2".parse().unwrap(), Some(99)))
    );
    assert_eq!(flow.destination_nat(), None);
}

#[test]
fn what_is_not_the_pods_or_makes_no_sense_is_refused() {
    let pod = addresses(&POD);
    let decode =
        |flow: &Flow| Flow::decode_all(&Flow::encode_all(std::slice::from_ref(flow)), &pod);
    assert_eq!(decode(&plain()), Ok(vec![plain()]));
    let others = ports(("10.77.0.1", 40000), ("10.77.0.11", 80), 6);
    assert_eq!(
        decode(&tcp(others, others.inverted())),
        Err(FlowError::NotOurs)
    );
    let mut mixed = plain();
    mixed.reply.destination = "fd77::1".parse().unwrap();
    assert_eq!(decode(&mixed), Err(FlowError::Field("addresses")));
    for (field, spoil) in [
        ("reply", (|flow| flow.reply.protocol = 17) as fn(&mut Flow)),
        ("labels", |flow| flow.labels = vec![0; 20]),
        ("labels", |flow| flow.labels = vec![0; 3]),
        ("helper", |flow| flow.helper = "a/very/long/path".to_owned()),
        ("helper", |flow| flow.helper = "a b".to_owned()),
        ("state", |flow| {
            flow.state = State::Sctp {
                state: 200,
                tags: [0; 2],
            };
        }),
    ] {
        let mut flow = plain();
        spoil(&mut flow);
        assert_eq!(decode(&flow), Err(FlowError::Field(field)));
    }
}

#[test]
fn a_list_that_claims_more_than_its_bytes_hold_is_refused() {
    let mut bytes = vec![0xff; 9];
    bytes.push(1);
    assert_eq!(
        Flow::decode_all(&bytes, &addresses(&POD)),
        Err(FlowError::Malformed)
    );
    let mut more = Flow::encode_all(&[plain()]);
    more.push(0);
    assert_eq!(
        Flow::decode_all(&more, &addresses(&POD)),
        Err(FlowError::Malformed)
    );
}

proptest! {
    #[test]
    fn junk_never_panics(junk in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = Flow::decode_all(&junk, &addresses(&POD));
    }
}
