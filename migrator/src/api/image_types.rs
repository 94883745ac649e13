//! What the API's JSON looks like where it is about images.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::types::ErrorInfo;
use crate::registry::Progress;

/// Body of `POST /v1/images`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImportRequest {
    /// An OCI image layout (folder) or archive (file) on the service's machine; absolute.
    pub path: PathBuf,
    /// The name to give it, where the one in the layout is absent or not wanted.
    #[serde(default)]
    pub name: Option<String>,
    /// Keep the layers, so that the image can be pushed and saved.
    #[serde(default)]
    pub keep_layers: bool,
}

/// An image of the node's store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSummary {
    /// Its name.
    pub name: String,
    /// The digest of its manifest.
    pub digest: String,
    /// Size of its file system in bytes.
    pub size_bytes: u64,
    /// Bytes of it that are on the node; the rest is fetched.
    #[serde(default)]
    pub here_bytes: u64,
    /// Chunks that it is cut into for the way to other nodes.
    pub chunks: usize,
    /// Pods of this node that use it.
    pub used_by: Vec<String>,
    /// Until when `POST /v1/gc` leaves it alone, milliseconds of Unix time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leased_until_unix_ms: Option<u64>,
    /// What holds up the rest, if anything does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// `GET /v1/images`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ImageList {
    /// By name.
    pub images: Vec<ImageSummary>,
}

/// Body of `POST /v1/pulls`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PullRequest {
    /// The image: `[HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]`.
    pub reference: String,
    /// The name to give it; the reference's if absent.
    #[serde(default)]
    pub name: Option<String>,
    /// Of an image for several platforms, which: `linux/amd64`, or a variant such as `linux/amd64/v3`.
    #[serde(default)]
    pub platform: Option<String>,
    /// A credentials file on the service's machine, absolute, instead of the configured one.
    #[serde(default)]
    pub auth_file: Option<PathBuf>,
    /// Speak to the registry without TLS.
    #[serde(default)]
    pub plain_http: bool,
    /// Keep the layers, so that the image can be pushed and saved.
    #[serde(default)]
    pub keep_layers: bool,
    /// Whether the image may be used while its chunks still come, if the registry has them; as configured if absent.
    #[serde(default)]
    pub lazy: Option<bool>,
    /// Seconds for which `POST /v1/gc` leaves the image alone.
    #[serde(default)]
    pub lease_s: u64,
}

/// Body of `POST /v1/pushes`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PushRequest {
    /// An image of the node whose layers are kept.
    pub image: String,
    /// Where it goes: `[HOST[:PORT]/]REPOSITORY[:TAG]`.
    pub to: String,
    /// As in [`PullRequest`].
    #[serde(default)]
    pub auth_file: Option<PathBuf>,
    /// As in [`PullRequest`].
    #[serde(default)]
    pub plain_http: bool,
    /// Push the image's chunks, too. Its layers need not be kept, if the registry has the image.
    #[serde(default)]
    pub chunks: bool,
}

/// What a push says of an image's chunks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PushedChunks {
    /// Digest of the manifest that leads to them.
    pub digest: String,
    /// Bytes that they have in the registry.
    pub packed_bytes: u64,
    /// Bytes that these are on a node.
    pub plain_bytes: u64,
}

/// Body of `POST /v1/saves`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SaveRequest {
    /// An image of the node whose layers are kept.
    pub image: String,
    /// The archive to make on the service's machine; absolute.
    pub path: PathBuf,
}

/// Answer of `POST /v1/saves`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// The archive.
    pub path: PathBuf,
    /// Its size.
    pub size_bytes: u64,
}

/// Body of `POST /v1/leases`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeaseRequest {
    /// An image of the node.
    pub image: String,
    /// Seconds from now on; 0 ends the lease.
    pub seconds: u64,
}

/// Answer of `POST /v1/leases`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The image.
    pub image: String,
    /// When it ends, milliseconds of Unix time; absent if there is none.
    pub until_unix_ms: Option<u64>,
}

/// Body of `POST /v1/gc`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GcRequest {
    /// Only say what would go.
    #[serde(default)]
    pub dry_run: bool,
}

/// Answer of `POST /v1/gc`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcResult {
    /// Images that went, or would.
    pub images: Vec<ImageSummary>,
    /// Blobs of registries that went, or would.
    pub blobs: usize,
    /// Bytes of all of them.
    pub bytes: u64,
    /// As asked for.
    pub dry_run: bool,
}

/// One line of the answer to a pull or a push. The last one is not `progress`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum TransferEvent {
    /// How far it is.
    Progress(Progress),
    /// The image is on the node.
    Pulled {
        /// The image.
        image: ImageSummary,
        /// Bytes of blobs that crossed the network.
        transferred_bytes: u64,
    },
    /// The image is in the registry.
    Pushed {
        /// Where.
        to: String,
        /// The manifest's digest.
        digest: String,
        /// Bytes of blobs that crossed the network.
        transferred_bytes: u64,
        /// Its chunks, if they were pushed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        chunks: Option<PushedChunks>,
    },
    /// It failed.
    Failed {
        /// Why.
        error: ErrorInfo,
    },
}

/// Body of `POST /v1/verify`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VerifyRequest {
    /// Images of the node; all if there is none.
    pub images: Vec<String>,
    /// Fetch what is damaged or missing again.
    pub repair: bool,
}

/// Answer of `POST /v1/verify`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyResult {
    /// Each image.
    pub images: Vec<VerifiedImage>,
}

/// An image whose chunks were read and hashed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifiedImage {
    /// Its name.
    pub name: String,
    /// The digest of its manifest.
    pub digest: String,
    /// Chunks that it has.
    pub chunks: usize,
    /// Of these, those that were damaged: they are set aside.
    pub damaged: Vec<u32>,
    /// And those that were not there.
    pub missing: Vec<u32>,
    /// Of both, how many are there now.
    pub repaired: usize,
    /// Why one of them is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

impl VerifiedImage {
    /// Whether all of it is there now.
    pub fn is_whole(&self) -> bool {
        self.damaged.len() + self.missing.len() == self.repaired
    }
}
