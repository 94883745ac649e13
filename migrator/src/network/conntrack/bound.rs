//! What a node is told of a flow whose translation stays at another one. Pure.

use std::net::IpAddr;

use migrator_ebpf::{NO_SLOT, SentKey, has_ports, mapped};
use serde::{Deserialize, Serialize};

use super::flow::{Flow, FlowError, Key, Tuple};
use crate::network::gate::address_of;

/// RFC 792, RFC 4443: an echo's question and answer.
const ECHOES_V4: [u8; 2] = [8, 0];
const ECHOES_V6: [u8; 2] = [128, 129];

/// A flow of the pod that one node goes on translating, wherever the pod is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Bound {
    /// What the pod sends in it.
    pub sent: Tuple,
    /// The node that translates; `None`: the one that tells of it.
    pub home: Option<IpAddr>,
}

impl Bound {
    /// As few bytes as say it all, in postcard.
    pub fn encode_all(bound: &[Self]) -> Vec<u8> {
        postcard::to_stdvec(bound).expect("a flow holds nothing that postcard cannot write")
    }

    /// Flows that a peer has sent for the pod with these addresses. The bytes are bounded by their frame, and what they claim by the bytes.
    ///
    /// # Errors
    /// See [`FlowError`]: the peer is broken or not one of ours.
    pub fn decode_all(bytes: &[u8], pod: &[IpAddr]) -> Result<Vec<Self>, FlowError> {
        let (all, rest): (Vec<Self>, &[u8]) =
            postcard::take_from_bytes(bytes).map_err(|_| FlowError::Malformed)?;
        if !rest.is_empty() {
            return Err(FlowError::Malformed);
        }
        for bound in &all {
            bound.sent.check()?;
            if !pod.contains(&bound.sent.source) {
                return Err(FlowError::NotOurs);
            }
            key_of(&bound.sent, NO_SLOT).ok_or(FlowError::Field("protocol"))?;
        }
        Ok(all)
    }
}

impl Flow {
    /// What a pod with these addresses sends in it, as the pod knows it: before any translation of this direction.
    pub fn sent_by(&self, pod: &[IpAddr]) -> Option<Tuple> {
        let ways = [self.original, self.reply];
        ways.into_iter().find(|way| pod.contains(&way.source))
    }
}

fn bytes_of(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => mapped(address.octets()),
        IpAddr::V6(address) => address.octets(),
    }
}

/// The flow as the programs know it. `None`: they read no packets of its kind.
pub(super) fn key_of(sent: &Tuple, slot: u16) -> Option<SentKey> {
    let echoes = match sent.source {
        IpAddr::V4(_) => ECHOES_V4,
        IpAddr::V6(_) => ECHOES_V6,
    };
    let ports = match sent.key {
        Key::Ports {
            source,
            destination,
        } if has_ports(sent.protocol) => {
            let ([a, b], [c, d]) = (source.to_be_bytes(), destination.to_be_bytes());
            [a, b, c, d]
        }
        Key::Icmp { kind, id, .. } if echoes.contains(&kind) => {
            let [a, b] = id.to_be_bytes();
            [a, b, 0, 0]
        }
        Key::Ports { .. } | Key::Icmp { .. } | Key::None => return None,
    };
    Some(SentKey {
        source: bytes_of(sent.source),
        destination: bytes_of(sent.destination),
        ports,
        slot,
        protocol: sent.protocol,
        spare: 0,
    })
}

/// And back. Of an echo it is not known any more whether the pod asks or answers, which makes no difference.
pub(super) fn tuple_of(key: &SentKey) -> Tuple {
    let [a, b, c, d] = key.ports;
    let first = u16::from_be_bytes([a, b]);
    let source = address_of(key.source);
    let kind = match source {
        IpAddr::V4(_) => ECHOES_V4[0],
        IpAddr::V6(_) => ECHOES_V6[0],
    };
    Tuple {
        source,
        destination: address_of(key.destination),
        protocol: key.protocol,
        key: match has_ports(key.protocol) {
            true => Key::Ports {
                source: first,
                destination: u16::from_be_bytes([c, d]),
            },
            false => Key::Icmp {
                kind,
                code: 0,
                id: first,
            },
        },
        zone: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TCP: u8 = 6;

    fn tuple(source: &str, destination: &str, protocol: u8, key: Key) -> Tuple {
        Tuple {
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            protocol,
            key,
            zone: 0,
        }
    }

    fn ports(source: u16, destination: u16) -> Key {
        Key::Ports {
            source,
            destination,
        }
    }

    fn echo(kind: u8) -> Key {
        Key::Icmp {
            kind,
            code: 0,
            id: 77,
        }
    }

    fn pod() -> [IpAddr; 2] {
        ["10.77.0.10", "fd77::10"].map(|text| text.parse().unwrap())
    }

    #[test]
    fn a_flow_reads_back_from_what_the_programs_know_of_it() {
        for sent in [
            tuple("10.77.0.10", "192.0.2.1", TCP, ports(5000, 443)),
            tuple("fd77::10", "fd79::1", 17, ports(1, 65535)),
            tuple("10.77.0.10", "192.0.2.1", 1, echo(8)),
            tuple("fd77::10", "fd79::1", 58, echo(128)),
        ] {
            let key = key_of(&sent, 7).unwrap();
            assert_eq!(tuple_of(&key), sent);
        }
        for other in [
            tuple("10.77.0.10", "192.0.2.1", 47, ports(1, 2)),
            tuple("10.77.0.10", "192.0.2.1", 1, echo(13)),
            tuple("10.77.0.10", "192.0.2.1", 89, Key::None),
        ] {
            assert_eq!(key_of(&other, 7), None, "{other:?}");
        }
    }

    #[test]
    fn what_a_peer_sends_is_the_pods_and_of_a_known_kind_or_an_error() {
        let own = |sent| Bound { sent, home: None };
        let good = own(tuple("10.77.0.10", "192.0.2.1", TCP, ports(5000, 443)));
        let elsewhere = Bound {
            home: Some("10.78.0.3".parse().unwrap()),
            ..good
        };
        let bytes = Bound::encode_all(&[good, elsewhere]);
        assert_eq!(
            Bound::decode_all(&bytes, &pod()).unwrap(),
            [good, elsewhere]
        );
        assert_eq!(
            Bound::decode_all(&bytes[1..], &pod()),
            Err(FlowError::Malformed)
        );
        for (sent, error) in [
            (
                tuple("10.77.0.11", "192.0.2.1", TCP, ports(1, 2)),
                FlowError::NotOurs,
            ),
            (
                tuple("10.77.0.10", "fd79::1", TCP, ports(1, 2)),
                FlowError::Field("addresses"),
            ),
            (
                tuple("10.77.0.10", "192.0.2.1", 47, ports(1, 2)),
                FlowError::Field("protocol"),
            ),
        ] {
            let bytes = Bound::encode_all(&[own(sent)]);
            assert_eq!(Bound::decode_all(&bytes, &pod()), Err(error));
        }
    }
}
