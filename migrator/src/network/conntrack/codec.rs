//! ctnetlink's messages: attributes to flows and back. Pure. Numbers are those of linux/netfilter/nfnetlink_conntrack.h and linux/netlink.h.
//!
//! The crate for netfilter's messages (netlink-packet-netfilter 0.4) knows neither translation, zones, helpers, labels nor ICMP, so these are
//! this project's own.

use std::net::IpAddr;

use super::flow::{Flow, Key, SeqAdj, State, Tuple};

/// linux/netlink.h `NLA_F_NESTED`, and the mask of both flags of an attribute's type.
const NESTED: u16 = 1 << 15;
const TYPE: u16 = !(1 << 15 | 1 << 14);

const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const STATUS: u16 = 3;
const PROTOINFO: u16 = 4;
const HELP: u16 = 5;
const NAT_SOURCE: u16 = 6;
const TIMEOUT: u16 = 7;
const MARK: u16 = 8;
const NAT_DESTINATION: u16 = 13;
const SEQ_ADJ_ORIGINAL: u16 = 15;
const SEQ_ADJ_REPLY: u16 = 16;
const ZONE: u16 = 18;
const LABELS: u16 = 22;
const FILTER: u16 = 25;

const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
const TUPLE_ZONE: u16 = 3;
const V4_SOURCE: u16 = 1;
const V4_DESTINATION: u16 = 2;
const V6_SOURCE: u16 = 3;
const V6_DESTINATION: u16 = 4;
const PROTO_NUMBER: u16 = 1;
const SOURCE_PORT: u16 = 2;
const DESTINATION_PORT: u16 = 3;
const ICMP_ID: u16 = 4;
const ICMP_TYPE: u16 = 5;
const ICMP_CODE: u16 = 6;
/// From ICMP's numbers to ICMPv6's.
const ICMPV6: u16 = 3;

const PROTOINFO_TCP: u16 = 1;
const PROTOINFO_SCTP: u16 = 3;
const TCP_STATE: u16 = 1;
const TCP_SCALE: [u16; 2] = [2, 3];
const TCP_FLAGS: [u16; 2] = [4, 5];
const SCTP_STATE: u16 = 1;
const SCTP_TAGS: [u16; 2] = [2, 3];
const HELP_NAME: u16 = 1;
const SEQ_POSITION: u16 = 1;
const SEQ_BEFORE: u16 = 2;
const SEQ_AFTER: u16 = 3;
const NAT_V4: [u16; 2] = [1, 2];
const NAT_PROTO: u16 = 3;
const NAT_V6: [u16; 2] = [4, 5];
const NAT_PORTS: [u16; 2] = [1, 2];
const FILTER_FLAGS: [u16; 2] = [1, 2];
/// net/netfilter/nf_internals.h `CTA_FILTER_F_CTA_IP_SRC`.
const FILTER_SOURCE: u32 = 1;

/// linux/netfilter/nf_conntrack_tcp.h `IP_CT_TCP_FLAG_BE_LIBERAL`: packets beyond the known windows are no reason to call the flow invalid. The
/// windows themselves do not travel: the kernel tells them to nobody, and learns them again from the next packets.
const TCP_LIBERAL: u8 = 0x08;
/// `IP_CT_TCP_FLAG_MAXACK_SET` and `IP_CT_TCP_EXP_CHALLENGE_ACK` there: they tell of numbers that do not travel either. With the former and without its
/// number, the kernel would call a good RST invalid.
const TCP_STAYS: u8 = 0x20 | 0x40;

/// Attributes that are being written.
#[derive(Debug, Default)]
pub(super) struct Attributes(Vec<u8>);

impl Attributes {
    fn put(&mut self, kind: u16, value: &[u8]) {
        // 4 bytes of header; none of ours is longer than some hundred bytes.
        let length = (4 + value.len()) as u16;
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let mut inner = Self::default();
        fill(&mut inner);
        self.put(kind | NESTED, &inner.0);
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    fn tuple(&mut self, kind: u16, tuple: &Tuple) {
        self.nest(kind, |at| {
            at.nest(TUPLE_IP, |at| {
                at.address(V4_SOURCE, V6_SOURCE, tuple.source);
                at.address(V4_DESTINATION, V6_DESTINATION, tuple.destination);
            });
            at.nest(TUPLE_PROTO, |at| {
                at.put(PROTO_NUMBER, &[tuple.protocol]);
                match tuple.key {
                    Key::None => {}
                    Key::Ports {
                        source,
                        destination,
                    } => {
                        at.put(SOURCE_PORT, &source.to_be_bytes());
                        at.put(DESTINATION_PORT, &destination.to_be_bytes());
                    }
                    Key::Icmp { kind, code, id } => {
                        let shift = if tuple.source.is_ipv4() { 0 } else { ICMPV6 };
                        at.put(ICMP_ID + shift, &id.to_be_bytes());
                        at.put(ICMP_TYPE + shift, &[kind]);
                        at.put(ICMP_CODE + shift, &[code]);
                    }
                }
            });
            if tuple.zone != 0 {
                at.put(TUPLE_ZONE, &tuple.zone.to_be_bytes());
            }
        });
    }

    fn address(&mut self, v4: u16, v6: u16, address: IpAddr) {
        match address {
            IpAddr::V4(address) => self.put(v4, &address.octets()),
            IpAddr::V6(address) => self.put(v6, &address.octets()),
        }
    }

    fn nat(&mut self, kind: u16, (address, number): (IpAddr, Option<u16>)) {
        self.nest(kind, |at| {
            for (v4, v6) in NAT_V4.into_iter().zip(NAT_V6) {
                at.address(v4, v6, address);
            }
            if let Some(number) = number {
                at.nest(NAT_PROTO, |at| {
                    for kind in NAT_PORTS {
                        at.put(kind, &number.to_be_bytes());
                    }
                });
            }
        });
    }

    fn state(&mut self, state: State) {
        match state {
            State::None => {}
            State::Tcp {
                state,
                flags,
                scale,
            } => self.nest(PROTOINFO, |at| {
                at.nest(PROTOINFO_TCP, |at| {
                    at.put(TCP_STATE, &[state]);
                    for way in [0, 1] {
                        at.put(TCP_SCALE[way], &[scale[way]]);
                        // `struct nf_ct_tcp_flags`: the flags, and which of them count.
                        let flags = flags[way] & !TCP_STAYS | TCP_LIBERAL;
                        at.put(TCP_FLAGS[way], &[flags, 0xff]);
                    }
                });
            }),
            State::Sctp { state, tags } => self.nest(PROTOINFO, |at| {
                at.nest(PROTOINFO_SCTP, |at| {
                    at.put(SCTP_STATE, &[state]);
                    for way in [0, 1] {
                        at.put(SCTP_TAGS[way], &tags[way].to_be_bytes());
                    }
                });
            }),
        }
    }
}

/// What names a flow to the kernel.
pub(super) fn name(flow: &Flow) -> Attributes {
    let mut at = Attributes::default();
    at.tuple(TUPLE_ORIGINAL, &flow.original);
    if flow.zone != 0 {
        at.put(ZONE, &flow.zone.to_be_bytes());
    }
    at
}

/// What makes the flow anew.
pub(super) fn create(flow: &Flow) -> Attributes {
    let mut at = name(flow);
    let (to_source, to_destination) = (flow.source_nat(), flow.destination_nat());
    match (to_source, to_destination) {
        (None, None) => at.tuple(TUPLE_REPLY, &flow.reply),
        // The kernel translates, and so changes it to the real one, and knows that it did.
        (Some(_), _) | (_, Some(_)) => {
            let zone = flow.reply.zone;
            let reply = Tuple {
                zone,
                ..flow.original.inverted()
            };
            at.tuple(TUPLE_REPLY, &reply);
        }
    }
    if let Some(to) = to_destination {
        at.nat(NAT_DESTINATION, to);
    }
    if let Some(to) = to_source {
        at.nat(NAT_SOURCE, to);
    }
    if !flow.helper.is_empty() {
        at.nest(HELP, |at| {
            at.put(HELP_NAME, format!("{}\0", flow.helper).as_bytes());
        });
    }
    if let Some(ways) = &flow.seq_adj {
        for (kind, way) in [SEQ_ADJ_ORIGINAL, SEQ_ADJ_REPLY].into_iter().zip(ways) {
            at.nest(kind, |at| {
                at.put(SEQ_POSITION, &way.position.to_be_bytes());
                at.put(SEQ_BEFORE, &way.before.to_be_bytes());
                at.put(SEQ_AFTER, &way.after.to_be_bytes());
            });
        }
    }
    fresh(&mut at, flow);
    at
}

/// What brings an entry up to date that is there already. Its translation cannot be changed, nor need it be.
pub(super) fn update(flow: &Flow) -> Attributes {
    let mut at = name(flow);
    fresh(&mut at, flow);
    at
}

fn fresh(at: &mut Attributes, flow: &Flow) {
    at.put(STATUS, &flow.kept_status().to_be_bytes());
    at.put(TIMEOUT, &flow.timeout_s.to_be_bytes());
    if flow.mark != 0 {
        at.put(MARK, &flow.mark.to_be_bytes());
    }
    if !flow.labels.is_empty() {
        at.put(LABELS, &flow.labels);
    }
    at.state(flow.state);
}

/// What lets an entry go after so many seconds, unless another packet comes.
pub(super) fn fade(flow: &Flow, seconds: u32) -> Attributes {
    let mut at = name(flow);
    at.put(TIMEOUT, &seconds.to_be_bytes());
    at
}

/// What keeps a dump (of IPv4) to flows that one end of sends with this address: who begins, or who answers.
pub(super) fn filter(address: IpAddr, answers: bool) -> Attributes {
    let mut at = Attributes::default();
    let (tuple, way) = match answers {
        false => (TUPLE_ORIGINAL, 0),
        true => (TUPLE_REPLY, 1),
    };
    at.nest(tuple, |at| {
        at.nest(TUPLE_IP, |at| at.address(V4_SOURCE, V6_SOURCE, address));
    });
    at.nest(FILTER, |at| {
        for index in [0, 1] {
            let flags = if index == way { FILTER_SOURCE } else { 0 };
            at.put(FILTER_FLAGS[index], &flags.to_ne_bytes());
        }
    });
    at
}

/// The attributes in these bytes, up to the first that is cut off.
pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let (length, tail) = rest.split_first_chunk()?;
        let (kind, _) = tail.split_first_chunk()?;
        let length = usize::from(u16::from_ne_bytes(*length));
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes(*kind) & TYPE, value))
    })
}

fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(found, value)| (found == kind).then_some(value))
}

fn byte(bytes: &[u8], kind: u16) -> Option<u8> {
    find(bytes, kind)?.first().copied()
}

fn be16(bytes: &[u8], kind: u16) -> Option<u16> {
    Some(u16::from_be_bytes(*find(bytes, kind)?.first_chunk()?))
}

fn be32(bytes: &[u8], kind: u16) -> Option<u32> {
    Some(u32::from_be_bytes(*find(bytes, kind)?.first_chunk()?))
}

fn address(bytes: &[u8], v4: u16, v6: u16) -> Option<IpAddr> {
    if let Some(found) = find(bytes, v4) {
        return Some(IpAddr::from(*found.first_chunk::<4>()?));
    }
    Some(IpAddr::from(*find(bytes, v6)?.first_chunk::<16>()?))
}

fn read_tuple(bytes: &[u8]) -> Option<Tuple> {
    let (ip, proto) = (find(bytes, TUPLE_IP)?, find(bytes, TUPLE_PROTO)?);
    let source = address(ip, V4_SOURCE, V6_SOURCE)?;
    let shift = if source.is_ipv4() { 0 } else { ICMPV6 };
    let ports = be16(proto, SOURCE_PORT).zip(be16(proto, DESTINATION_PORT));
    let icmp = byte(proto, ICMP_TYPE + shift).zip(byte(proto, ICMP_CODE + shift));
    let key = match (ports, icmp, be16(proto, ICMP_ID + shift)) {
        (Some((source, destination)), _, _) => Key::Ports {
            source,
            destination,
        },
        (None, Some((kind, code)), Some(id)) => Key::Icmp { kind, code, id },
        (None, _, _) => Key::None,
    };
    Some(Tuple {
        source,
        destination: address(ip, V4_DESTINATION, V6_DESTINATION)?,
        protocol: byte(proto, PROTO_NUMBER)?,
        key,
        zone: be16(bytes, TUPLE_ZONE).unwrap_or(0),
    })
}

fn read_state(bytes: &[u8]) -> Option<State> {
    let info = find(bytes, PROTOINFO)?;
    if let Some(tcp) = find(info, PROTOINFO_TCP) {
        return Some(State::Tcp {
            state: byte(tcp, TCP_STATE)?,
            flags: TCP_FLAGS.map(|kind| byte(tcp, kind).unwrap_or(0)),
            scale: TCP_SCALE.map(|kind| byte(tcp, kind).unwrap_or(0)),
        });
    }
    let sctp = find(info, PROTOINFO_SCTP)?;
    Some(State::Sctp {
        state: byte(sctp, SCTP_STATE)?,
        tags: SCTP_TAGS.map(|kind| be32(sctp, kind).unwrap_or(0)),
    })
}

fn read_seq_adj(bytes: &[u8]) -> Option<[SeqAdj; 2]> {
    let way = |kind| {
        let found = find(bytes, kind)?;
        Some(SeqAdj {
            position: be32(found, SEQ_POSITION)?,
            before: be32(found, SEQ_BEFORE)?,
            after: be32(found, SEQ_AFTER)?,
        })
    };
    let ways = [way(SEQ_ADJ_ORIGINAL), way(SEQ_ADJ_REPLY)];
    ways.iter()
        .any(Option::is_some)
        .then(|| ways.map(Option::unwrap_or_default))
}

/// The flow that the attributes of a message of the kernel tell of; `None` if they tell of none.
pub(super) fn read(bytes: &[u8]) -> Option<Flow> {
    let helper = find(bytes, HELP).and_then(|help| find(help, HELP_NAME));
    let helper =
        helper.map(|name| String::from_utf8_lossy(name.strip_suffix(b"\0").unwrap_or(name)));
    Some(Flow {
        original: read_tuple(find(bytes, TUPLE_ORIGINAL)?)?,
        reply: read_tuple(find(bytes, TUPLE_REPLY)?)?,
        zone: be16(bytes, ZONE).unwrap_or(0),
        status: be32(bytes, STATUS).unwrap_or(0),
        timeout_s: be32(bytes, TIMEOUT).unwrap_or(0),
        mark: be32(bytes, MARK).unwrap_or(0),
        labels: find(bytes, LABELS).map(<[u8]>::to_vec).unwrap_or_default(),
        helper: helper.unwrap_or_default().into_owned(),
        state: read_state(bytes).unwrap_or(State::None),
        seq_adj: read_seq_adj(bytes),
    })
}

#[cfg(test)]
mod tests;
