//! Writable disks: one sparse file each, served to QEMU over NBD on a Unix socket.
//!
//! ```text
//!   guest ── virtio-blk ── QEMU ── NBD, Unix socket ──▶ nbd::Server ──▶ Disk ── pread, pwrite ──▶ file
//!                                                                       │ dirty granules   ▶ the mover at the source
//!                                                                       └ missing granules ◀ the mover at the destination
//! ```
//!
//! QEMU reconnects when the service is restarted, and repeats what was not answered: so a guest only waits. A write that was answered
//! is in the page cache, which outlives the service; one that was flushed outlives a power cut.
//!
//! # Dirty granules
//!
//! [`Disk::take_dirty`] swaps the marks for none. A write is marked *after* its data is in the file and *before* it is answered. So a
//! mover that takes first and reads then gets everything that was answered before it took, and what it may have read by half is marked
//! later: it comes with the next take. The last take is that after [`Disk::quiesce`], or after the VM stopped: QEMU then has nothing
//! under way.
//!
//! While a mover has trouble to keep up, [`Disk::limit_dirty`] has writes wait for it.
//!
//! # Missing granules
//!
//! A destination may run the guest before all of a disk is there ([`Disk::expect`]). Requests that need a missing granule wait and
//! have it asked for; one that overwrites it whole makes it present, and what comes for it later is dropped ([`Disk::supply`]).

pub mod disk;
pub mod error;
pub mod export;
pub mod granule;
pub mod mkfs;
pub mod nbd;
pub mod transfer;

mod admission;
mod backing;
mod dirty;
mod limit;
mod missing;
mod pipe;
mod sys;

#[cfg(test)]
mod tests;

pub use admission::{Admitted, Quiet};
pub use dirty::{Generation, StaleGeneration};
pub use disk::{Disk, Supplied};
pub use error::DiskError;
pub use export::{Export, ReadOnly};
pub use granule::{Extent, GRANULE, MAX_SIZE};
pub use pipe::Pipe;
