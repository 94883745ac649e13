//! How far a pull or a push is: the last state, for whoever looks.

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::image::manifest::Blob;

/// What is being done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The registry is asked what there is.
    #[default]
    Resolve,
    /// The chunks of an image are packed.
    Pack,
    /// Blobs cross.
    Transfer,
    /// The layers become a block device.
    Import,
}

/// One blob.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobProgress {
    /// Its digest.
    pub digest: String,
    /// Its size in bytes.
    pub size: u64,
    /// Bytes of it that are where they are to be, also those of an earlier try.
    pub done: u64,
}

impl BlobProgress {
    fn of(blob: &Blob) -> Self {
        Self {
            digest: blob.digest.to_string(),
            size: blob.size,
            done: 0,
        }
    }
}

/// How far it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What is being done.
    pub phase: Phase,
    /// The blobs.
    pub blobs: Vec<BlobProgress>,
    /// Bytes of blobs that crossed the network in this pull or push, also those that were of no use.
    pub transferred_bytes: u64,
    /// What went wrong last and is tried again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// Where progress is written to.
#[derive(Clone, Debug)]
pub struct Meter(watch::Sender<Progress>);

impl Meter {
    /// A meter, and who watches it.
    pub fn new() -> (Self, watch::Receiver<Progress>) {
        let (sender, receiver) = watch::channel(Progress::default());
        (Self(sender), receiver)
    }

    pub(super) fn phase(&self, phase: Phase) {
        self.0.send_modify(|progress| progress.phase = phase);
    }

    pub(super) fn blobs(&self, blobs: &[Blob]) {
        self.0.send_modify(|progress| {
            progress.phase = Phase::Transfer;
            progress.blobs = blobs.iter().map(BlobProgress::of).collect();
        });
    }

    /// Further blobs, beside those of [`Meter::blobs`].
    pub(super) fn more_blobs(&self, blobs: &[Blob]) {
        self.0.send_modify(|progress| {
            progress.phase = Phase::Transfer;
            progress.blobs.extend(blobs.iter().map(BlobProgress::of));
        });
    }

    /// `done` bytes of a blob are there.
    pub(super) fn done(&self, blob: &Blob, done: u64) {
        let digest = blob.digest.to_string();
        self.0.send_modify(|progress| {
            let mut blobs = progress.blobs.iter_mut();
            if let Some(blob) = blobs.find(|blob| blob.digest == digest) {
                blob.done = done;
            }
        });
    }

    pub(super) fn transferred(&self, bytes: u64) {
        self.0
            .send_modify(|progress| progress.transferred_bytes += bytes);
    }

    pub(super) fn note(&self, note: String) {
        tracing::info!(note, "registry");
        self.0.send_modify(|progress| progress.note = Some(note));
    }

    /// Bytes that crossed so far.
    pub(super) fn transferred_so_far(&self) -> u64 {
        self.0.borrow().transferred_bytes
    }
}
