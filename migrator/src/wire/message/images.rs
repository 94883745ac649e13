//! Images that follow their pod, and chunks of images for whoever asks. From version 4 on.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// The lists of the offer's images follow it, in [`ListPiece`]s: see [`crate::wire::lists`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageLists {
    /// The destination may run the guest before all of its images are there. What it lacks it asks of any node that has it, over sessions of the
    /// shape [`Chunks`](crate::wire::Shape::Chunks).
    pub later: bool,
    /// Of each image of the offer.
    pub lengths: Vec<ListLengths>,
}

/// How long the lists of an image are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListLengths {
    /// Chunks that it has.
    pub chunks: u32,
    /// Those of them that were read.
    pub order: u32,
}

/// A piece of the images' lists, in order. Raw bytes on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListPiece(pub Bytes);

/// Chunks that are wanted. Each is answered on the data connection, by a `Chunk` or by `Absent`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunksWanted {
    /// SHA-256 of each.
    pub digests: Vec<[u8; 32]>,
}

impl ChunksWanted {
    /// Most digests in one message.
    pub const MAX: usize = 64;
}

/// What of the pod's images was at the destination, and what had come, when its guest resumed there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImagesMoved {
    /// Size of the images in bytes.
    pub size: u64,
    /// Bytes of them that were there when the pod was offered.
    pub here: u64,
    /// Bytes of chunks that had come since then, from whichever node.
    pub before_resume: u64,
}
