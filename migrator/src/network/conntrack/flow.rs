//! A flow as connection tracking knows it, and what must hold of one that a peer has sent. Pure.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// linux/netfilter/nf_conntrack_common.h `IPS_*`: what a new entry may be given. The others are the kernel's own business: it sets those
/// of address translation when it is told the translation.
const STATUS_KEPT: u32 = SEEN_REPLY | ASSURED | CONFIRMED | FIXED_TIMEOUT;
/// linux/netfilter/nf_conntrack_common.h `IPS_SEEN_REPLY`.
pub(super) const SEEN_REPLY: u32 = 1 << 1;
/// linux/netfilter/nf_conntrack_common.h `IPS_ASSURED`.
pub(super) const ASSURED: u32 = 1 << 2;
/// linux/netfilter/nf_conntrack_common.h `IPS_CONFIRMED`.
pub(super) const CONFIRMED: u32 = 1 << 3;
/// linux/netfilter/nf_conntrack_common.h `IPS_FIXED_TIMEOUT`.
const FIXED_TIMEOUT: u32 = 1 << 10;
/// net/netfilter/nf_conntrack_labels.h `NF_CT_LABELS_MAX_SIZE`.
const LABELS_MAX: usize = 16;
/// net/netfilter/nf_conntrack_helper.h `NF_CT_HELPER_NAME_LEN`, with its NUL.
const HELPER_MAX: usize = 16;
/// linux/netfilter/nf_conntrack_tcp.h and nf_conntrack_sctp.h: fewer states than this in either.
const STATES: u8 = 16;
/// RFC 7323, 2.3.
const SCALE_MAX: u8 = 14;

/// What tells flows of one pair of addresses apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Key {
    /// The kernel tells none apart.
    None,
    /// TCP, UDP, SCTP and their like; of GRE, its keys.
    Ports {
        /// The sender's.
        source: u16,
        /// The receiver's.
        destination: u16,
    },
    /// ICMP and ICMPv6.
    Icmp {
        /// Type.
        kind: u8,
        /// Code.
        code: u8,
        /// Identifier.
        id: u16,
    },
}

/// What the packets of one direction look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Tuple {
    /// The sender's address.
    pub source: IpAddr,
    /// The receiver's.
    pub destination: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// The rest.
    pub key: Key,
    /// Zone that counts in this direction alone; 0 if there is none.
    pub zone: u16,
}

/// What connection tracking remembers of the protocol itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum State {
    /// Nothing.
    None,
    /// TCP. Each pair: the original direction, the reply's.
    Tcp {
        /// linux/netfilter/nf_conntrack_tcp.h `enum tcp_conntrack`.
        state: u8,
        /// `IP_CT_TCP_FLAG_*` there.
        flags: [u8; 2],
        /// Window scale.
        scale: [u8; 2],
    },
    /// SCTP. The pair as above.
    Sctp {
        /// linux/netfilter/nf_conntrack_sctp.h `enum sctp_conntrack`.
        state: u8,
        /// Verification tags.
        tags: [u32; 2],
    },
}

/// How a helper has moved TCP's sequence numbers of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SeqAdj {
    /// From which number on.
    pub position: u32,
    /// By how much before it.
    pub before: u32,
    /// And after it.
    pub after: u32,
}

/// One entry of connection tracking.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Flow {
    /// Its first packet's direction, before any translation.
    pub original: Tuple,
    /// What comes back, before it is translated back.
    pub reply: Tuple,
    /// Zone of both directions; 0 is the default one.
    pub zone: u16,
    /// `IPS_*`.
    pub status: u32,
    /// Seconds until it is forgotten, if no packet comes.
    pub timeout_s: u32,
    /// The mark that rules have set.
    pub mark: u32,
    /// Labels, a bit each; empty if there are none.
    pub labels: Vec<u8>,
    /// Name of the helper that follows it; empty if none does.
    pub helper: String,
    /// The protocol's own.
    pub state: State,
    /// Original direction and reply's, if any is moved.
    pub seq_adj: Option<[SeqAdj; 2]>,
}

/// A flow that came from a peer and cannot be one of the pod's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FlowError {
    /// The bytes are no list of flows.
    #[error("the source sent connection-tracking entries that cannot be read")]
    Malformed,
    /// A value is out of its range.
    #[error("the source sent a connection-tracking entry whose {0} makes no sense")]
    Field(&'static str),
    /// Neither end is the pod.
    #[error("the source sent a connection-tracking entry that is not the pod's")]
    NotOurs,
}

impl Tuple {
    /// What comes back if nothing is translated. A zone of one direction stays behind.
    pub fn inverted(self) -> Self {
        let key = match self.key {
            Key::None => Key::None,
            Key::Ports {
                source,
                destination,
            } => Key::Ports {
                source: destination,
                destination: source,
            },
            Key::Icmp { kind, code, id } => Key::Icmp {
                kind: answer(self.protocol, kind),
                code,
                id,
            },
        };
        Self {
            source: self.destination,
            destination: self.source,
            key,
            zone: 0,
            ..self
        }
    }

    /// The number that translation may change beside the sender's address: a port, or ICMP's identifier.
    pub fn source_number(self) -> Option<u16> {
        match self.key {
            Key::None => None,
            Key::Ports { source, .. } => Some(source),
            Key::Icmp { id, .. } => Some(id),
        }
    }

    /// The same of the receiver.
    pub fn destination_number(self) -> Option<u16> {
        match self.key {
            Key::None => None,
            Key::Ports { destination, .. } => Some(destination),
            Key::Icmp { id, .. } => Some(id),
        }
    }

    pub(super) fn check(&self) -> Result<(), FlowError> {
        let same_family = self.source.is_ipv4() == self.destination.is_ipv4();
        same_family
            .then_some(())
            .ok_or(FlowError::Field("addresses"))
    }
}

/// Type of the answer to an ICMP message, as the kernel pairs them (net/netfilter/nf_conntrack_proto_icmp.c `invmap`, and that of ICMPv6).
fn answer(protocol: u8, kind: u8) -> u8 {
    const PAIRS4: [(u8, u8); 4] = [(8, 0), (13, 14), (15, 16), (17, 18)];
    const PAIRS6: [(u8, u8); 2] = [(128, 129), (139, 140)];
    let pairs: &[(u8, u8)] = match i32::from(protocol) {
        libc::IPPROTO_ICMP => &PAIRS4,
        _ => &PAIRS6,
    };
    let found = pairs.iter().find_map(|(ask, tell)| match kind {
        kind if kind == *ask => Some(*tell),
        kind if kind == *tell => Some(*ask),
        _ => None,
    });
    found.unwrap_or(kind)
}

impl Flow {
    /// Whether one end of it, as that end knows itself, has one of these addresses.
    pub fn concerns(&self, pod: &[IpAddr]) -> bool {
        // Who begins sends with its own address, who answers too: translation comes after.
        pod.contains(&self.original.source) || pod.contains(&self.reply.source)
    }

    /// Address and number that the sender is translated to; `None` if it is not.
    pub fn source_nat(&self) -> Option<(IpAddr, Option<u16>)> {
        let to = (self.reply.destination, self.reply.destination_number());
        (to != (self.original.source, self.original.source_number())).then_some(to)
    }

    /// Address and number that the receiver is translated to; `None` if it is not. An ICMP identifier is the sender's to choose.
    pub fn destination_nat(&self) -> Option<(IpAddr, Option<u16>)> {
        let number = |number| match self.original.key {
            Key::Icmp { .. } => None,
            Key::None | Key::Ports { .. } => number,
        };
        let to = (self.reply.source, number(self.reply.source_number()));
        let from = number(self.original.destination_number());
        (to != (self.original.destination, from)).then_some(to)
    }

    /// Whether its translation needs the node of these addresses: only packets that come by that node are translated.
    pub fn is_bound_to(&self, node: &[IpAddr]) -> bool {
        let masqueraded = self.source_nat().is_some() && node.contains(&self.reply.destination);
        let published =
            self.destination_nat().is_some() && node.contains(&self.original.destination);
        masqueraded || published
    }

    /// The part of its status that another kernel may be told.
    pub fn kept_status(&self) -> u32 {
        self.status & STATUS_KEPT | CONFIRMED
    }

    /// As few bytes as say it all, in postcard.
    pub fn encode_all(flows: &[Self]) -> Vec<u8> {
        postcard::to_stdvec(flows).expect("a flow holds nothing that postcard cannot write")
    }

    /// Flows that a peer has sent for the pod with these addresses. The bytes are bounded by their frame, and what they claim by the bytes.
    ///
    /// # Errors
    /// See [`FlowError`]: the peer is broken or not one of ours.
    pub fn decode_all(bytes: &[u8], pod: &[IpAddr]) -> Result<Vec<Self>, FlowError> {
        let (flows, rest): (Vec<Self>, &[u8]) =
            postcard::take_from_bytes(bytes).map_err(|_| FlowError::Malformed)?;
        if !rest.is_empty() {
            return Err(FlowError::Malformed);
        }
        for flow in &flows {
            flow.check()?;
            if !flow.concerns(pod) {
                return Err(FlowError::NotOurs);
            }
        }
        Ok(flows)
    }

    fn check(&self) -> Result<(), FlowError> {
        self.original.check()?;
        self.reply.check()?;
        let alike = self.original.protocol == self.reply.protocol
            && self.original.source.is_ipv4() == self.reply.source.is_ipv4()
            && std::mem::discriminant(&self.original.key)
                == std::mem::discriminant(&self.reply.key);
        let labels = self.labels.len() <= LABELS_MAX && self.labels.len().is_multiple_of(4);
        let helper = self.helper.len() < HELPER_MAX
            && self.helper.bytes().all(|byte| byte.is_ascii_graphic());
        let state = match self.state {
            State::None => true,
            State::Tcp { state, scale, .. } => {
                state < STATES && scale.iter().all(|scale| *scale <= SCALE_MAX)
            }
            State::Sctp { state, .. } => state < STATES,
        };
        for (holds, field) in [
            (alike, "reply"),
            (labels, "labels"),
            (helper, "helper"),
            (state, "state"),
        ] {
            if !holds {
                return Err(FlowError::Field(field));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests;
