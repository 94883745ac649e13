//! Container images as read-only block devices.
//!
//! ```text
//!  OCI layout / archive ──source──▶ manifest ──oci──▶ layers ──tar──▶ rootfs ──mkfs──▶ image.erofs
//!  (dir, .tar, .tar.gz)             verified          verified        openat2           cut in chunks
//!                                                                                          ▼
//!  destination:  adopt(record), with or without its chunks ─────────────────────────────▶ chunks ──▶ export ──▶ a VM
//!                begin(record) ─▶ missing chunks ─▶ place(verified) ─▶ finish()
//! ```
//!
//! An image is imported once: its layers are merged into a private tree, the tree becomes one EROFS
//! file, and the file is cut into chunks of equal size, each known by its SHA-256 and kept once ([`chunks`]). A pod's VM
//! gets them as a block device. Because a migrated guest keeps the device's blocks in its page cache, both
//! nodes must have *the same bytes*: a disk is known by [`ImageRecord::erofs_digest`], and not by the
//! OCI manifest's digest (two versions of mkfs.erofs lay the same manifest out differently).
//!
//! Everything here blocks; call it from `spawn_blocking`.
//!
//! What is absent: no network, no async. `registry` fetches blobs into [`content`], and has them imported from here.

pub mod chunks;
pub mod config;
pub(crate) mod content;
pub mod digest;
pub mod incoming;
pub(crate) mod json;
pub(crate) mod layout;
pub(crate) mod manifest;
pub mod name;
pub(crate) mod oci;
pub mod record;
pub mod store;

mod arriving;
mod attributes;
mod compression;
mod docker;
mod entries;
mod gc;
mod holds;
mod import;
mod kept;
mod layer;
mod mkfs;
mod origin;
pub(crate) mod partial;
mod passwd;
mod path;
mod pax;
mod rootfs;
mod save;
mod source;
mod store_chunks;
mod store_files;
mod store_load;
mod sys;
mod tar;
mod xattr;

#[cfg(test)]
mod tests;

pub use chunks::{Chunk, Chunks, ImageExport, NoChunk, Supplied, UseOrder, Verified, Waiting};
pub use config::{ResolvedProcess, resolve};
pub use content::ContentError;
pub use digest::Digest;
pub use gc::Garbage;
pub use holds::ImageHold;
pub use import::{ImportError, ImportLimits};
pub use incoming::{HandoverError, Incoming, check_room};
pub use kept::KeptError;
pub use manifest::{BadPlatform, ManifestError, Platform};
pub use mkfs::find_mkfs;
pub use record::{CHUNK_SIZE, ImageConfig, ImageRecord};
pub use save::{KeepError, SaveError};
pub use store::{ImageStore, StoreError};
