//! What goes wrong with shared storage.

use std::io;
use std::path::PathBuf;

use super::holder::{Holder, Refused};
use super::rbd::ToolError;
use crate::block::DiskError;
use crate::block::mkfs::MkfsError;

/// Why something about a volume of a shared class fails.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The node has no such class.
    #[error(
        "this node has no storage class `{class}` ({}): add it to storage.classes of its configuration",
        known_classes(known)
    )]
    NoClass {
        /// The class.
        class: String,
        /// Those that it has.
        known: Vec<String>,
    },
    /// The place carries no mark: it is not mounted, or was never prepared.
    #[error(
        "storage class `{class}`: {} is not there: mount the file system; if it is new, `migrator volume init {class}` prepares it, once for all nodes", path.display()
    )]
    NoMarker {
        /// The class.
        class: String,
        /// The mark.
        path: PathBuf,
    },
    /// It is prepared already.
    #[error("storage class `{class}` is prepared already")]
    Marked {
        /// The class.
        class: String,
    },
    /// The mark is another class's, or none.
    #[error("storage class `{class}`: {where_} is not its own: {problem}")]
    Marker {
        /// The class.
        class: String,
        /// The mark.
        where_: String,
        /// What is wrong.
        problem: String,
    },
    /// Two nodes call different places by one name.
    #[error(
        "storage class `{class}` is another storage here ({here}) than there ({there}): mount or name the same one on both nodes"
    )]
    OtherStorage {
        /// The class.
        class: String,
        /// What it is here.
        here: String,
        /// What it is at the other node.
        there: String,
    },
    /// There is none.
    #[error("there is no volume `{volume}` of class `{class}`")]
    NotFound {
        /// The class.
        class: String,
        /// The volume.
        volume: String,
    },
    /// There is one already.
    #[error("there is a volume `{0}` already")]
    Taken(String),
    /// Somebody has it.
    #[error("volume `{volume}` is not free")]
    Refused {
        /// The volume.
        volume: String,
        /// Who has it.
        source: Refused,
    },
    /// Somebody serves it.
    #[error("volume `{volume}` is being served by a node at this moment")]
    Served {
        /// The volume.
        volume: String,
    },
    /// Only force would do.
    #[error("volume `{volume}` is held by pod `{}` of node {}", holder.pod, holder.node)]
    NeedsForce {
        /// The volume.
        volume: String,
        /// Who has it.
        holder: Holder,
    },
    /// A file of it.
    #[error("cannot {verb} {}", path.display())]
    File {
        /// What was tried.
        verb: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Its record does not fit, or cannot be read.
    #[error("the record of volume `{volume}` is not valid: {problem}")]
    Record {
        /// The volume.
        volume: String,
        /// What is wrong.
        problem: String,
    },
    /// Its disk.
    #[error("volume `{volume}` cannot be made")]
    Disk {
        /// The volume.
        volume: String,
        /// Why not.
        source: DiskError,
    },
    /// Its file system.
    #[error("volume `{volume}` cannot be made")]
    Mkfs {
        /// The volume.
        volume: String,
        /// Why not.
        source: MkfsError,
    },
    /// Ceph's tools.
    #[error("storage class `{class}`: the Ceph cluster does not do it")]
    Tool {
        /// The class.
        class: String,
        /// Why not.
        source: ToolError,
    },
    /// The key of a Ceph user.
    #[error("storage class `{class}`: the key file {} {problem}", path.display())]
    Key {
        /// The class.
        class: String,
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        problem: String,
    },
}

impl StorageError {
    /// Whether the volume is another pod's.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }
}

fn known_classes(known: &[String]) -> String {
    match known {
        [] => "it has `local` only".to_owned(),
        known => format!("it has `local`, `{}`", known.join("`, `")),
    }
}
