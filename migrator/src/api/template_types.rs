//! What `/v1/templates` says.

use serde::{Deserialize, Serialize};

/// A saved guest that pods of its shape start from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateInfo {
    /// Its name, 32 hex digits: of everything that the saved state depends on.
    pub key: String,
    /// Guest RAM, in bytes.
    pub memory_bytes: u64,
    /// Whether that is of huge pages.
    pub hugepages: bool,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Disks: images and those that can be written, together.
    pub disks: usize,
    /// Version of the QEMU that saved it, and loads it.
    pub qemu: String,
    /// Pages of its memory that are not zero: what a start copies.
    pub pages: u64,
    /// What it takes on the node, in bytes.
    pub allocated_bytes: u64,
    /// When it was made, in milliseconds of Unix time.
    pub made_unix_ms: u64,
    /// When a pod started from it last, or else when it was made, in milliseconds of Unix time.
    pub used_unix_ms: u64,
    /// Pods that started from it since the service was started.
    pub starts: u64,
}

/// `GET /v1/templates`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateList {
    /// The one used last first.
    pub templates: Vec<TemplateInfo>,
}
