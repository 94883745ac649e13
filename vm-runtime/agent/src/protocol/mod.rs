//! The agent protocol, over a virtio-serial port that moves with the VM.
//!
//! Three layers, each in its own file:
//!
//! ```text
//!   message   what is said: requests, replies, events (postcard)
//!   link      exactly once, in order: sequence numbers, acknowledgement, Attach
//!   frame     where a frame begins and ends, and that it is whole: COBS, 0x00, CRC-32
//! ```
//!
//! A port is a stream of bytes that may be cut anywhere, in both directions, at any moment: the
//! host's service dies, or the VM moves and what was in the socket stays behind. So a host that has
//! (re)connected begins with `Attach`:
//!
//! ```text
//!   host                                         guest
//!    | 00 Attach{session, nonce, next_rx, fresh} 00 |   the delimiter ends a frame that was cut
//!    |--------------------------------------------->|   drop what the host has; send the rest again
//!    | 00 Attached{version, nonce, next_rx} 00      |
//!    |<---------------------------------------------|   until here the host ignores everything
//!    | Data{seq, ack, payload} ...                  |
//!    |<-------------------------------------------->|   both sides from the other's `next_rx` on
//! ```
//!
//! A *session* is the host's memory of the link. It moves with the pod ([`link::HostLinkState`]), so a
//! migration resumes it and loses nothing. A service that was killed has forgotten it and attaches
//! with a `fresh` one: both sides number from 0, and the guest sends again what was never
//! acknowledged; container output carries byte offsets, so the host drops what it has already stored.
//!
//! What is absent: any timer (only the host retries), and any trust. Lengths are checked before
//! anything is allocated, and a frame that fails its checks is dropped and counted.

mod blob;
pub mod frame;
pub mod link;
pub mod message;
pub mod settings;

/// The name of the virtio-serial port, as the guest sees it in `/sys/class/virtio-ports/*/name`.
pub const PORT_NAME: &str = "migrator.agent";

/// The oldest protocol version this build speaks.
pub const MIN_VERSION: u16 = 1;

/// The newest protocol version this build speaks.
pub const MAX_VERSION: u16 = 3;

/// From this version on there are [`settings`], and a guest tells how its containers fare.
pub const CONDITIONS: u16 = 3;
