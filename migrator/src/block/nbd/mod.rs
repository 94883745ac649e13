//! The NBD server: fixed newstyle handshake, simple replies, one disk a socket
//! (<https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>).
//!
//! Supported are read, write, flush, FUA, trim and write zeroes, on as many connections as a disk's users need: a successor of a VMM
//! connects while its predecessor still is. A flush on one covers what was answered on each (`NBD_FLAG_CAN_MULTI_CONN`): all write to
//! the same file. Structured replies, and thus block status, are not offered: a guest's disk has no use for them.
//!
//! Every length is checked before anything is read or allocated for it; a client that breaks the protocol loses its connection, and
//! nobody else notices.

mod codec;
mod negotiate;
mod replies;
mod server;
mod session;

#[cfg(test)]
mod tests;

pub use server::{Server, ServerError};
