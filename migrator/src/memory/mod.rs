//! The memory mover: takes pages out of the source's RAM file, and places them in the destination's.
//!
//! # Why no page is lost, and none is overtaken by an older version of itself
//!
//! 1. Tracking starts before the first page is read. A round scans first (the kernel reports a page as
//!    written and write-protects it again in one step) and reads the pages after that. A write that
//!    comes after the scan faults, so the next scan reports it; a write that came before the scan is
//!    in the bytes that are read. A page may be sent once too often, never once too seldom.
//! 2. A page always takes the same connection ([`shard::lane_of`] looks at nothing but its index), and a
//!    connection keeps order. So two versions of a page arrive in the order in which they were read,
//!    with nothing to wait for between rounds.
//!    What the guest gives back to the host is a hole from one moment to the other, written or not: [`holes`] finds it.
//! 3. The last round's scan runs after the VM has stopped, and its barrier follows its last page on
//!    every connection. The destination is complete when it has seen that barrier on all of them.
//!
//! # How often a page is copied
//!
//! ```text
//! source       guest memory -> frame          a volatile copy that looks for zeros on the way (`MemoryView::copy`)
//!              frame -> TLS record            rustls; encrypted in place there
//!              record -> socket               the kernel
//! destination  socket -> rustls's buffer      the kernel; decrypted in place there
//!              -> plaintext queue             rustls
//!              -> frame                       `wire::conn::Reader`
//!              frame -> guest memory          pwrite: into a page of its own, without a fault, and without clearing it first
//! ```
//!
//! A codec adds one copy at each end: the pages wait for it in a buffer of their own, and it writes into the frame, or out of it.
//! Pages of zeros are never copied beyond the source's first step: they cross as a count, and are holes at the destination.
//!
//! What is absent: no decision when to go on or to freeze (`migration::rounds`), no VM, no QMP.

pub mod compress;
mod holes;
mod lane;
mod pace;
pub mod pageset;
pub mod postcopy;
pub mod receive;
pub mod send;
pub mod shard;
pub mod track;
pub mod verify;

#[cfg(test)]
mod tests;
