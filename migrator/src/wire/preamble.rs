//! The first bytes of a connection, and the answer to them. They never change: versions are negotiated with them.

use crate::wire::id::SessionId;

/// `migratr` and a zero: no text protocol starts like this.
pub const MAGIC: [u8; 8] = *b"migratr\0";
/// The oldest version this program speaks.
pub const VERSION_MIN: u16 = 1;
/// The newest version this program speaks.
pub const VERSION_MAX: u16 = 4;
/// The first version with [`Flows`](crate::wire::message::Flows) on the control and urgent lanes, and the answer to them.
pub const VERSION_FLOWS: u16 = 2;
/// The first version with [`Bound`](crate::wire::message::Bound) on the control and urgent lanes, and the answer to them.
pub const VERSION_BOUND: u16 = 3;
/// The first version that moves writable disks: [`Offer::disks`](crate::wire::message::Offer::disks) and what follows from them.
pub const VERSION_DISKS: u16 = 3;
/// The first version with sessions of the shape [`Shape::Chunks`], and with images that come after the guest.
pub const VERSION_CHUNKS: u16 = 4;
/// The first version that knows disks on shared storage ([`SharedDisk`](vm_runtime::spec::SharedDisk) in an offer's VM), which do not move.
pub const VERSION_SHARED: u16 = 4;
/// Data connections that one session may have: what it takes to fill a long path whose single streams are held down by loss.
/// The command line, the API and the configuration have the same bound.
pub const MAX_DATA_CONNECTIONS: u8 = 64;
/// Fault connections of a session that has data connections: whoever waits for a page on one of them does not wait for those
/// on the other.
pub const FAULT_CONNECTIONS: u8 = 2;
/// Size of a [`Preamble`] in bytes.
pub const PREAMBLE_LEN: usize = 32;
/// Size of a [`Reply`] in bytes.
pub const REPLY_LEN: usize = 12;

/// What this connection is to its session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The control connection.
    Control,
    /// The data connection with this index, from 0.
    Data(u8),
    /// The urgent connection.
    Urgent,
    /// The fault connection with this index, from 0.
    Fault(u8),
}

/// Which connections make up a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Shape {
    /// Control, `data` data connections, urgent, fault connections: a migration.
    Migration {
        /// 1 to [`MAX_DATA_CONNECTIONS`].
        data: u8,
    },
    /// The same after a lost link, to learn how it stands, and to bring the parked packets and the missing pages across.
    Resume {
        /// 0 to [`MAX_DATA_CONNECTIONS`]; 0 where no page can be missing.
        data: u8,
    },
    /// Control alone: a question.
    Query,
    /// Control alone, for as long as both nodes live: where the dialer's pods are.
    Places,
    /// Control and one data connection: the dialer asks for chunks of images. From version 4 on.
    Chunks,
}

impl Shape {
    /// Data connections of the session.
    pub const fn data(self) -> u8 {
        match self {
            Self::Migration { data } | Self::Resume { data } => data,
            Self::Query | Self::Places => 0,
            Self::Chunks => 1,
        }
    }

    /// Fault connections of the session.
    pub const fn faults(self) -> u8 {
        match self {
            Self::Migration { .. } => FAULT_CONNECTIONS,
            Self::Resume { data: 0 } | Self::Query | Self::Places | Self::Chunks => 0,
            Self::Resume { .. } => FAULT_CONNECTIONS,
        }
    }

    /// Whether it has an urgent connection.
    pub const fn urgent(self) -> bool {
        match self {
            Self::Migration { .. } | Self::Resume { .. } => true,
            Self::Query | Self::Places | Self::Chunks => false,
        }
    }
}

/// The 32 bytes that open a connection, once TLS is up:
///
/// ```text
/// 0   8  magic "migratr\0"
/// 8   2  lowest version, little-endian
/// 10  2  highest version
/// 12  1  role: 1 control, 2 data, 3 urgent, 4 fault
/// 13  1  index of the data or fault connection, else 0
/// 14  1  shape: 1 migration, 2 resume, 3 query, 4 places, 5 chunks
/// 15  1  data connections of the session
/// 16 16  session id, the same on all its connections
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preamble {
    /// Lowest version that the dialer speaks.
    pub version_min: u16,
    /// Highest version that the dialer speaks.
    pub version_max: u16,
    /// What this connection is.
    pub role: Role,
    /// What the session is.
    pub shape: Shape,
    /// The session.
    pub session: SessionId,
}

/// Bytes that do not open a connection of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PreambleError {
    /// The magic is wrong.
    #[error(
        "the first bytes are not those of a migrator node: check the address and port of the peer"
    )]
    Magic,
    /// A role, index, shape or count out of its range.
    #[error(
        "the connection's role or its session's shape is out of range: the peer is broken or not ours"
    )]
    Role,
}

impl Preamble {
    /// The bytes.
    pub fn encode(&self) -> [u8; PREAMBLE_LEN] {
        let mut out = [0; PREAMBLE_LEN];
        out[..8].copy_from_slice(&MAGIC);
        out[8..10].copy_from_slice(&self.version_min.to_le_bytes());
        out[10..12].copy_from_slice(&self.version_max.to_le_bytes());
        (out[12], out[13]) = match self.role {
            Role::Control => (1, 0),
            Role::Data(index) => (2, index),
            Role::Urgent => (3, 0),
            Role::Fault(index) => (4, index),
        };
        out[14] = match self.shape {
            Shape::Migration { .. } => 1,
            Shape::Resume { .. } => 2,
            Shape::Query => 3,
            Shape::Places => 4,
            Shape::Chunks => 5,
        };
        out[15] = self.shape.data();
        out[16..].copy_from_slice(&self.session.0);
        out
    }

    /// Parses the bytes; a role that the shape has no place for is refused.
    ///
    /// # Errors
    ///
    /// See [`PreambleError`].
    pub fn decode(bytes: &[u8; PREAMBLE_LEN]) -> Result<Self, PreambleError> {
        if bytes[..8] != MAGIC {
            return Err(PreambleError::Magic);
        }
        let shape = match (bytes[14], bytes[15]) {
            (1, data @ 1..=MAX_DATA_CONNECTIONS) => Shape::Migration { data },
            (2, data @ 0..=MAX_DATA_CONNECTIONS) => Shape::Resume { data },
            (3, 0) => Shape::Query,
            (4, 0) => Shape::Places,
            (5, 1) => Shape::Chunks,
            _ => return Err(PreambleError::Role),
        };
        let role = match (bytes[12], bytes[13]) {
            (1, 0) => Role::Control,
            (2, index) if index < shape.data() => Role::Data(index),
            (3, 0) if shape.urgent() => Role::Urgent,
            (4, index) if index < shape.faults() => Role::Fault(index),
            _ => return Err(PreambleError::Role),
        };
        let mut session = [0; 16];
        session.copy_from_slice(&bytes[16..]);
        Ok(Self {
            version_min: u16::from_le_bytes([bytes[8], bytes[9]]),
            version_max: u16::from_le_bytes([bytes[10], bytes[11]]),
            role,
            shape,
            session: SessionId(session),
        })
    }

    /// The highest version that both ends speak.
    pub fn common_version(&self) -> Option<u16> {
        let version = self.version_max.min(VERSION_MAX);
        (version >= self.version_min.max(VERSION_MIN)).then_some(version)
    }
}

/// Why a connection is turned away after TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turned {
    /// No version in common.
    Version,
    /// The certificate's name is not among the listener's peers.
    NotAPeer,
    /// Too many sessions are under way, or the place in the session is taken.
    Busy,
    /// The preamble made no sense.
    Malformed,
}

/// The 12 bytes that answer a preamble:
///
/// ```text
/// 0   8  magic
/// 8   2  chosen version, little-endian; 0 is a refusal
/// 10  1  0, or why: 1 version, 2 not a peer, 3 busy, 4 malformed
/// 11  1  0
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The version to speak.
    Welcome(u16),
    /// Turned away.
    Turned(Turned),
}

impl Reply {
    /// The bytes.
    pub fn encode(self) -> [u8; REPLY_LEN] {
        let mut out = [0; REPLY_LEN];
        out[..8].copy_from_slice(&MAGIC);
        match self {
            Self::Welcome(version) => out[8..10].copy_from_slice(&version.to_le_bytes()),
            Self::Turned(why) => {
                out[10] = match why {
                    Turned::Version => 1,
                    Turned::NotAPeer => 2,
                    Turned::Busy => 3,
                    Turned::Malformed => 4,
                }
            }
        }
        out
    }

    /// Parses the bytes.
    ///
    /// # Errors
    ///
    /// See [`PreambleError`].
    pub fn decode(bytes: &[u8; REPLY_LEN]) -> Result<Self, PreambleError> {
        if bytes[..8] != MAGIC {
            return Err(PreambleError::Magic);
        }
        match (u16::from_le_bytes([bytes[8], bytes[9]]), bytes[10]) {
            (0, 1) => Ok(Self::Turned(Turned::Version)),
            (0, 2) => Ok(Self::Turned(Turned::NotAPeer)),
            (0, 3) => Ok(Self::Turned(Turned::Busy)),
            (0, 4) => Ok(Self::Turned(Turned::Malformed)),
            (version, 0) if version != 0 => Ok(Self::Welcome(version)),
            _ => Err(PreambleError::Role),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// These bytes are for ever: a node of any version must be able to read them.
    #[test]
    fn handshake_bytes_never_change() {
        let preamble = Preamble {
            version_min: 1,
            version_max: 2,
            role: Role::Data(1),
            shape: Shape::Migration { data: 2 },
            session: SessionId([0xab; 16]),
        };
        let mut golden = *b"migratr\0\x01\0\x02\0\x02\x01\x01\x02................";
        golden[16..].fill(0xab);
        assert_eq!(preamble.encode(), golden);
        assert_eq!(Preamble::decode(&golden), Ok(preamble));
        assert_eq!(Reply::Welcome(1).encode(), *b"migratr\0\x01\0\0\0");
        assert_eq!(
            Reply::Turned(Turned::Version).encode(),
            *b"migratr\0\0\0\x01\0"
        );
        assert_eq!(
            Reply::Turned(Turned::NotAPeer).encode(),
            *b"migratr\0\0\0\x02\0"
        );
        assert_eq!(
            Reply::Turned(Turned::Busy).encode(),
            *b"migratr\0\0\0\x03\0"
        );
        assert_eq!(
            Reply::Turned(Turned::Malformed).encode(),
            *b"migratr\0\0\0\x04\0"
        );
    }

    #[test]
    fn a_session_for_chunks_has_one_data_connection_and_no_others() {
        let preamble = Preamble {
            version_min: 1,
            version_max: 4,
            role: Role::Data(0),
            shape: Shape::Chunks,
            session: SessionId([0xab; 16]),
        };
        let mut golden = *b"migratr\0\x01\0\x04\0\x02\0\x05\x01................";
        golden[16..].fill(0xab);
        assert_eq!(preamble.encode(), golden);
        assert_eq!(Preamble::decode(&golden), Ok(preamble));
        for (role, index) in [(2, 1), (3, 0), (4, 0)] {
            (golden[12], golden[13]) = (role, index);
            assert_eq!(Preamble::decode(&golden), Err(PreambleError::Role));
        }
    }

    #[test]
    fn the_highest_common_version_is_chosen() {
        let mut preamble = Preamble {
            version_min: 0,
            version_max: VERSION_MAX + 5,
            role: Role::Control,
            shape: Shape::Query,
            session: SessionId([0; 16]),
        };
        assert_eq!(preamble.common_version(), Some(VERSION_MAX));
        preamble.version_min = VERSION_MAX + 1;
        assert_eq!(preamble.common_version(), None);
        preamble.version_min = 0;
        preamble.version_max = 0;
        assert_eq!(preamble.common_version(), None);
    }

    proptest! {
        #[test]
        fn what_parses_encodes_to_the_same_bytes(tail in proptest::array::uniform24(0u8..4)) {
            let mut bytes = [0; PREAMBLE_LEN];
            bytes[..8].copy_from_slice(&MAGIC);
            bytes[8..].copy_from_slice(&tail);
            if let Ok(preamble) = Preamble::decode(&bytes) {
                prop_assert_eq!(preamble.encode(), bytes);
            }
        }

        #[test]
        fn junk_replies_never_panic(bytes in proptest::array::uniform12(any::<u8>())) {
            let _ = Reply::decode(&bytes);
        }
    }
}
