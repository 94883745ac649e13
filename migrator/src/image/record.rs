//! What is known of an image: the record that the store keeps and that travels with a migration.

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::digest::Digest;
use super::name::{self, BadName};

/// Size of a chunk in bytes, of every image made here. Large enough that the list stays short (4,096
/// chunks a GiB, 128 KiB of digests), small enough that a small change of an image leaves most chunks as they are.
pub const CHUNK_SIZE: u32 = 256 << 10;

/// Largest image file accepted from a peer, in bytes.
pub const MAX_EROFS_SIZE: u64 = 64 << 30;

/// Bounds of the chunk size that a peer's record may name, in bytes: its own choice may differ from ours.
const CHUNK_SIZE_RANGE: std::ops::RangeInclusive<u32> = (64 << 10)..=MAX_CHUNK_SIZE;

/// Largest chunk, in bytes.
pub(super) const MAX_CHUNK_SIZE: u32 = 4 << 20;

/// Block size of the EROFS files made here, in bytes.
const EROFS_BLOCK: u64 = 4096;

/// Most text that an image's configuration may carry, in bytes.
const MAX_CONFIG_TEXT: usize = 1 << 20;

/// An image, as the store keeps it and as a migration's offer carries it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// The name it was imported under, such as `redis:7`.
    pub name: String,
    /// Digest of the OCI manifest that it was made from. Tells where it came from, not what its bytes are.
    pub manifest_digest: Digest,
    /// How its process is started.
    pub config: ImageConfig,
    /// Size of the EROFS file in bytes: the size of the block device.
    pub erofs_size: u64,
    /// Size of every chunk but the last, in bytes.
    pub chunk_size: u32,
    /// SHA-256 of each chunk, in order.
    pub chunks: Vec<Digest>,
    /// Digest of the bytes: over size, chunk size and `chunks`. A VM's disk is known by it on every node.
    pub erofs_digest: Digest,
}

/// What the image says of its process: the part of the OCI image configuration that is used.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// `Entrypoint`.
    pub entrypoint: Vec<String>,
    /// `Cmd`.
    pub cmd: Vec<String>,
    /// `Env`, split at the first `=`.
    pub env: Vec<(String, String)>,
    /// `WorkingDir`; empty if the image names none.
    pub working_dir: String,
    /// `User`, as written; empty if the image names none.
    pub user: String,
    /// Numeric user of `user`, looked up in the image's /etc/passwd at import.
    pub uid: u32,
    /// Numeric group of `user`, looked up in the image's /etc/passwd and /etc/group at import.
    pub gid: u32,
    /// Supplementary groups of `user`, from the image's /etc/group.
    pub groups: Vec<u32>,
    /// `StopSignal`, such as `SIGQUIT`; empty if the image names none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub stop_signal: String,
}

/// Why a record that came from elsewhere is not used.
#[derive(Debug, thiserror::Error)]
pub enum BadRecord {
    /// The name.
    #[error(transparent)]
    Name(#[from] BadName),
    /// The size of the chunks.
    #[error("chunk size {0} is not a power of two from 64 KiB to 4 MiB")]
    ChunkSize(u32),
    /// The size of the file.
    #[error("image size {0} is not a whole number of 4096-byte blocks up to 64 GiB")]
    Size(u64),
    /// The number of chunks.
    #[error("{found} chunks listed where the size asks for {expected}")]
    ChunkCount {
        /// As listed.
        found: u64,
        /// As the size asks.
        expected: u64,
    },
    /// A short last chunk that claims the bytes of a whole one.
    #[error("the last chunk, which is shorter, has the digest of another one")]
    LastChunk,
    /// The digest over the chunks.
    #[error("the chunk list hashes to {found}, the record says {expected}")]
    Digest {
        /// As computed.
        found: Digest,
        /// As the record says.
        expected: Digest,
    },
    /// The configuration's text.
    #[error("the image's configuration is too long, or has a NUL byte in it")]
    Config,
}

impl ImageRecord {
    /// The image's key in a store: its bytes and where they came from. Two images may have the same files and
    /// differ in how their process is started.
    pub fn id(&self) -> Digest {
        let mut hash = Sha256::new();
        hash.update(self.manifest_digest.0);
        hash.update(self.erofs_digest.0);
        Digest(hash.finalize().into())
    }

    /// Computes what [`ImageRecord::erofs_digest`] must be.
    pub fn digest_of(erofs_size: u64, chunk_size: u32, chunks: &[Digest]) -> Digest {
        let mut hash = Sha256::new();
        hash.update(b"migrator image 1\0");
        hash.update(erofs_size.to_le_bytes());
        hash.update(chunk_size.to_le_bytes());
        for chunk in chunks {
            hash.update(chunk.0);
        }
        Digest(hash.finalize().into())
    }

    /// How many bytes chunk `index` has; 0 past the end.
    pub fn chunk_len(&self, index: u32) -> usize {
        let start = self.chunk_offset(index);
        let left = self.erofs_size.saturating_sub(start);
        left.min(u64::from(self.chunk_size)) as usize
    }

    /// Where chunk `index` begins in the file, in bytes.
    pub fn chunk_offset(&self, index: u32) -> u64 {
        u64::from(index) * u64::from(self.chunk_size)
    }

    /// Checks a record that came from a peer or from a disk: sizes and counts agree, the digest matches,
    /// names and texts are harmless.
    pub fn validate(&self) -> Result<(), BadRecord> {
        name::check(&self.name)?;
        if !self.chunk_size.is_power_of_two() || !CHUNK_SIZE_RANGE.contains(&self.chunk_size) {
            return Err(BadRecord::ChunkSize(self.chunk_size));
        }
        if self.erofs_size == 0
            || self.erofs_size > MAX_EROFS_SIZE
            || !self.erofs_size.is_multiple_of(EROFS_BLOCK)
        {
            return Err(BadRecord::Size(self.erofs_size));
        }
        let expected = self.erofs_size.div_ceil(u64::from(self.chunk_size));
        let found = self.chunks.len() as u64;
        if found != expected {
            return Err(BadRecord::ChunkCount { found, expected });
        }
        if let Some((last, others)) = self.chunks.split_last()
            && self.chunk_len(others.len() as u32) != self.chunk_size as usize
            && others.contains(last)
        {
            return Err(BadRecord::LastChunk);
        }
        let found = Self::digest_of(self.erofs_size, self.chunk_size, &self.chunks);
        if found != self.erofs_digest {
            return Err(BadRecord::Digest {
                found,
                expected: self.erofs_digest,
            });
        }
        self.config.validate()
    }
}

impl ImageConfig {
    /// Checks that its text can be handed to a process: bounded, and without NUL bytes.
    pub fn validate(&self) -> Result<(), BadRecord> {
        let texts = self
            .entrypoint
            .iter()
            .chain(&self.cmd)
            .chain(self.env.iter().flat_map(|(name, value)| [name, value]))
            .chain([&self.working_dir, &self.user, &self.stop_signal]);
        let mut total = self.groups.len() * 4;
        for text in texts {
            // One byte more than the text: empty strings count too.
            total += text.len() + 1;
            if total > MAX_CONFIG_TEXT || text.contains('\0') {
                return Err(BadRecord::Config);
            }
        }
        Ok(())
    }
}
