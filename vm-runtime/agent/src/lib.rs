//! What the host and the agent inside the guest say to each other.
//!
//! The library is the protocol, pure: no sockets, no clock, no processes. The binary of the same
//! crate is PID 1 of the guest.

pub mod protocol;
