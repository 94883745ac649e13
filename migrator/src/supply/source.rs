//! Where chunks come from.

use std::fmt::Debug;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;

use crate::image::{Digest, ImageRecord};

/// A chunk of an image that is not here.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The image.
    pub record: Arc<ImageRecord>,
    /// The chunk in it; within [`ImageRecord::chunks`].
    pub index: u32,
}

impl Wanted {
    /// The digest that its bytes must have.
    pub fn digest(&self) -> Digest {
        self.record.chunks[self.index as usize]
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.record.chunk_len(self.index)
    }

    /// Never: no chunk is without bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Why a source gives nothing, for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SourceError(pub String);

/// Something that may have chunks. Whoever asks it checks what it gives, and leaves it alone for a while after an error.
pub trait ChunkSource: Debug + Send + Sync {
    /// What is asked for a chunk, as it is called in messages: `peer b`, or `registry` with host and repository. After an error that one is left
    /// alone for a while, and no other.
    fn address<'a>(&'a self, wanted: &'a Wanted) -> BoxFuture<'a, String>;

    /// Fetches a chunk; `None`: it does not have it. Many may be under way: one that is `urgent` is waited for by somebody. Dropping the future
    /// gives up.
    fn fetch<'a>(
        &'a self,
        wanted: &'a Wanted,
        urgent: bool,
    ) -> BoxFuture<'a, Result<Option<Bytes>, SourceError>>;

    /// Somebody waits now for a chunk that is being fetched, if it is from here.
    fn hurry(&self, _wanted: &Wanted) {}
}
