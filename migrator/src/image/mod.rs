//! Container images as read-only block devices.
//!
//! ```text
//!  OCI layout / archive ──source──▶ manifest ──oci──▶ layers ──tar──▶ rootfs ──mkfs──▶ image.erofs
//!  (dir, .tar, .tar.gz)             verified          verified        openat2           cut in chunks
//!                                                                                          │
//!  destination:  begin(record) ─▶ missing chunks ─▶ place(verified) ─▶ finish() ◀──────────┘
//! ```
//!
//! An image is imported once: its layers are merged into a private tree, the tree becomes one EROFS
//! file, and the file is cut into chunks of equal size, each known by its SHA-256. A pod's VM gets the
//! file as a block device. Because a migrated guest keeps the device's blocks in its page cache, both
//! nodes must have *the same bytes*: a disk is known by [`ImageRecord::erofs_digest`], and not by the
//! OCI manifest's digest (two versions of mkfs.erofs lay the same manifest out differently).
//!
//! Everything here blocks; call it from `spawn_blocking`.
//!
//! What is absent: no registry client, no network, no async.

pub mod config;
pub mod digest;
pub mod incoming;
pub mod name;
pub mod record;
pub mod store;

mod attributes;
mod compression;
mod docker;
mod entries;
mod import;
mod json;
mod layer;
mod mkfs;
mod oci;
mod passwd;
mod path;
mod pax;
mod rootfs;
mod source;
mod store_files;
mod sys;
mod tar;
mod xattr;

#[cfg(test)]
mod tests;

pub use config::{ResolvedProcess, resolve};
pub use digest::Digest;
pub use import::{ImportError, ImportLimits};
pub use incoming::{HandoverError, Incoming};
pub use mkfs::find_mkfs;
pub use record::{CHUNK_SIZE, ImageConfig, ImageRecord};
pub use store::{ImageStore, StoreError};
