//! What moves a disk's content to another node, apart from the connections: which pieces, in what order, and when it is enough.
//!
//! ```text
//! source                                              destination
//!   Outgoing ── read a piece, leave zeros out ──▶ data connection ──▶ Incoming ── write, punch ──▶ file
//!      ▲ take_dirty, round after round                                   │ all barriers of a round: fdatasync
//!      └────────────────────────── DiskAck ──────────────────────────────┘
//! ```
//!
//! The first round is what the file has allocated when tracking has begun; each later one is what was written since the one before. Content of
//! two rounds never meets on the way: a round begins when the one before is acknowledged.
//!
//! Nothing of this is kept: what is broken off begins again with all of the disk. Until the grant the source's file is the disk; from then on
//! the destination's is, which has all of it by then, durably.

mod incoming;
mod outgoing;
mod pieces;
mod rounds;

pub use incoming::{Incoming, IncomingError};
pub use outgoing::{Outgoing, OutgoingError, Piece, Turn};
pub use pieces::PIECE;
pub use rounds::{Rounds, Sample};
