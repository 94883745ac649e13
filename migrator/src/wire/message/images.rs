//! Images that follow their pod, and chunks of images for whoever asks. From version 4 on.

use serde::{Deserialize, Serialize};

/// The destination may run the guest before all of its images are there. What it lacks it asks of any node that has it, over sessions of the shape
/// [`Chunks`](crate::wire::Shape::Chunks).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImagesLater {
    /// Of each image of the offer, which chunks were read, in the order in which they first were. A hint.
    pub order: Vec<Vec<u32>>,
}

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
