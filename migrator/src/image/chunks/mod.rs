//! The chunks of a node's images: one file each, shared by all images, verified whenever they are read.
//!
//! ```text
//!  export (a VM's reads) ──▶ Chunks::wait ──▶ cache ──▶ files ──▶ verified? ──▶ bytes
//!                               │                                   │ no: set aside
//!                               └── not here: asked for ◀───────────┘
//!                                       │                         supply(verified) wakes who waits
//!                                       ▼                                 ▲
//!                                 crate::supply ──── peers, registries ───┘
//! ```
//!
//! A chunk's file is `chunks/AB/DIGEST`. It appears there by a rename, and is hashed before anything of it is used: what a power cut left of it
//! is found out then, like any other damage. A wrong chunk is set aside in `chunks/bad/`, and counts as missing. Missing chunks are asked for from
//! [`crate::supply`]; whoever reads one waits until somebody has it.
//!
//! Everything here blocks. What is absent: no network, no async.

mod bits;
mod cache;
mod export;
mod files;
mod order;
mod shelf;
mod verify;
mod wants;

#[cfg(test)]
mod tests;

pub use export::ImageExport;
pub use files::{Chunk, ChunkError, Pin};
pub use order::UseOrder;
pub use shelf::{Chunks, NoChunk, Supplied};
pub use verify::Verified;
pub use wants::{Asked, Waiting};
