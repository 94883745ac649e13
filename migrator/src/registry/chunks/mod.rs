//! Images in chunks, beside the ordinary ones in a registry: a node that does not have an image reads the parts of it that it needs.
//!
//! ```text
//!   image manifest  ◀── subject ── artifact manifest ──▶ index      what the image is, where each chunk lies
//!   (the tag's)                                     ├──▶ pack 0     chunks, each a zstd frame of its own
//!                                                   └──▶ pack 1 ..  a chunk is one HTTP range
//!
//!   push --chunks:  store ─pack─▶ packs, index ─publish─▶ registry
//!   pull --lazy:    registry ─find─▶ index ─remote─▶ ranges ─▶ verified chunks
//! ```
//!
//! Whoever may push to the repository may say what the chunks of an image are, as they may say what its tag stands for: that they are those
//! of the layers is not checked. Everything below that is: the manifest by its digest, the index by its own, each chunk by the index's.
//! Lengths are checked before anything is allocated or unpacked.
//!
//! The formats: `index.rs` and docs/images.md.

mod artifact;
pub(super) mod find;
mod index;
mod pack;
mod publish;
mod queue;
mod ranges;
mod remote;

pub use artifact::BadArtifact;
pub use find::OpenError;
pub use index::{BadIndex, ChunkIndex};
pub use pack::PackError;
pub use publish::Published;
pub use remote::{ChunkError, RemoteChunks};
