//! The messages as one type: which frame type each has, and how its payload is written and read.

use bytes::Bytes;
use vm_runtime::units::PageIndex;

use super::*;
use crate::wire::codec::{
    DecodeError, Message, get_postcard, put_postcard, split_postcard, split_u64,
};
use crate::wire::frame::Lane;

macro_rules! control {
    (
        postcard { $($code:literal => $name:ident,)* }
        boxed { $($boxed_code:literal => $boxed_name:ident,)* }
        raw { $($raw_code:literal => $raw_name:ident,)* }
    ) => {
        /// A message of the control connection. The frame type of each is fixed.
        #[derive(Clone, Debug, PartialEq, Eq)]
        #[allow(missing_docs)] // each variant holds the struct of its name, documented there
        pub enum Control {
            $($name($name),)*
            $($boxed_name(Box<$boxed_name>),)*
            $($raw_name($raw_name),)*
        }

        $(impl From<$name> for Control {
            fn from(message: $name) -> Self {
                Self::$name(message)
            }
        })*
        $(impl From<$boxed_name> for Control {
            fn from(message: $boxed_name) -> Self {
                Self::$boxed_name(Box::new(message))
            }
        })*
        $(impl From<$raw_name> for Control {
            fn from(message: $raw_name) -> Self {
                Self::$raw_name(message)
            }
        })*

        impl Control {
            /// The message's name, for logs: contents may be device state or page hashes.
            pub fn name(&self) -> &'static str {
                match self {
                    $(Self::$name(_) => stringify!($name),)*
                    $(Self::$boxed_name(_) => stringify!($boxed_name),)*
                    $(Self::$raw_name(_) => stringify!($raw_name),)*
                }
            }
        }

        impl Message for Control {
            const LANE: Lane = Lane::Control;

            fn kind(&self) -> u8 {
                match self {
                    $(Self::$name(_) => $code,)*
                    $(Self::$boxed_name(_) => $boxed_code,)*
                    $(Self::$raw_name(_) => $raw_code,)*
                }
            }

            fn head(&self, out: &mut Vec<u8>) {
                match self {
                    $(Self::$name(message) => put_postcard(message, out),)*
                    $(Self::$boxed_name(message) => message.head(out),)*
                    $(Self::$raw_name(message) => message.head(out),)*
                }
            }

            fn tail(&self) -> &[u8] {
                match self {
                    $(Self::$name(_) => &[],)*
                    $(Self::$boxed_name(_) => &[],)*
                    $(Self::$raw_name(message) => message.tail(),)*
                }
            }

            fn decode(kind: u8, payload: Bytes) -> Result<Self, DecodeError> {
                match kind {
                    $($code => get_postcard(stringify!($name), &payload).map(Self::$name),)*
                    $($boxed_code => $boxed_name::parse(&payload).map(|message| Self::$boxed_name(Box::new(message))),)*
                    $($raw_code => $raw_name::parse(payload).map(Self::$raw_name),)*
                    kind => Err(DecodeError::UnknownType { lane: Lane::Control, kind }),
                }
            }
        }
    };
}

control! {
    postcard {
        0x02 => Accept,
        0x03 => Refuse,
        0x04 => ImageDone,
        0x05 => Prepared,
        0x06 => RoundEnd,
        0x07 => RoundAck,
        0x08 => MemoryDone,
        0x09 => StateBegin,
        0x0b => StateEnd,
        0x0c => Handover,
        0x0e => HashesEnd,
        0x0f => Ready,
        0x10 => Grant,
        0x11 => Running,
        0x12 => Released,
        0x13 => Abort,
        0x14 => Query,
        0x15 => QueryReply,
        0x16 => Ping,
        0x17 => Pong,
        0x18 => Bye,
        0x1a => StaleEnd,
        0x1b => StaleAck,
        0x1c => Wanted,
        0x1d => MemoryComplete,
        0x1e => VmWaits,
        0x21 => FlowsTaken,
        0x22 => DiskAck,
        0x23 => DisksDone,
        0x25 => BoundTaken,
        0x26 => ChunksWanted,
        0x27 => ImagesMoved,
        0x31 => Places,
        0x32 => PlacesAck,
        0x33 => EndWanted,
    }
    boxed {
        0x01 => Offer,
    }
    raw {
        0x0a => StateChunk,
        0x0d => PageHashes,
        0x19 => PageBits,
        0x20 => Flows,
        0x24 => Bound,
        0x28 => ListPiece,
    }
}

/// How pods are routed follows the rest, and is left out where they are on a bridge: so an offer between bridges is the one of version 1.
/// Where there are writable disks (version 3), a zero follows instead, which no networks begin with, and then both. What version 4 adds follows
/// these, each behind its tag, in the order of the tags; what says nothing is left out.
impl Offer {
    /// [`Offer::lists`].
    const LISTS: u8 = 1;

    fn head(&self, out: &mut Vec<u8>) {
        put_postcard(self, out);
        let mut more = Vec::new();
        if let Some(lists) = &self.lists {
            more.push(Self::LISTS);
            put_postcard(lists, &mut more);
        }
        if !self.disks.is_empty() || !more.is_empty() {
            out.push(0);
            put_postcard(&(&self.routed, &self.disks), out);
            out.extend(more);
        } else if let Some(routed) = &self.routed {
            put_postcard(routed, out);
        }
    }

    fn parse(payload: &[u8]) -> Result<Self, DecodeError> {
        let name = "Offer";
        let (mut offer, rest) = split_postcard::<Self>(name, payload)?;
        match rest {
            [] => {}
            [0, rest @ ..] => {
                let (both, more) = split_postcard(name, rest)?;
                (offer.routed, offer.disks) = both;
                if offer.disks.is_empty() && more.is_empty() {
                    return Err(DecodeError::Malformed(name));
                }
                offer.parse_more(more)?;
            }
            rest => offer.routed = Some(get_postcard(name, rest)?),
        }
        Ok(offer)
    }
}

impl Offer {
    fn parse_more(&mut self, more: &[u8]) -> Result<(), DecodeError> {
        let name = "Offer";
        let mut more = more;
        let mut before = 0;
        while let [tag, rest @ ..] = more {
            if *tag <= before {
                return Err(DecodeError::Malformed(name));
            }
            before = *tag;
            more = match *tag {
                Self::LISTS => {
                    let (lists, rest) = split_postcard(name, rest)?;
                    self.lists = Some(lists);
                    rest
                }
                _ => return Err(DecodeError::Malformed(name)),
            };
        }
        Ok(())
    }
}

impl StateChunk {
    fn head(&self, _out: &mut Vec<u8>) {}

    fn tail(&self) -> &[u8] {
        &self.0
    }

    fn parse(payload: Bytes) -> Result<Self, DecodeError> {
        Ok(Self(payload))
    }
}

impl ListPiece {
    fn head(&self, _out: &mut Vec<u8>) {}

    fn tail(&self) -> &[u8] {
        &self.0
    }

    fn parse(payload: Bytes) -> Result<Self, DecodeError> {
        Ok(Self(payload))
    }
}

impl PageHashes {
    fn head(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.first.0.to_le_bytes());
    }

    fn tail(&self) -> &[u8] {
        &self.hashes
    }

    fn parse(mut payload: Bytes) -> Result<Self, DecodeError> {
        let first = PageIndex(split_u64("PageHashes", &mut payload)?);
        if !payload.len().is_multiple_of(8) {
            return Err(DecodeError::Malformed("PageHashes"));
        }
        Ok(Self {
            first,
            hashes: payload,
        })
    }
}
