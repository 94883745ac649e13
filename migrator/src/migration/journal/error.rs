//! What can go wrong with a record.

use std::io;
use std::path::PathBuf;

use crate::wire::id::MigrationId;

/// Why a record could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// A file system call failed; the record on disk is the old one.
    #[error("cannot {action} {}: check the space and permissions of the state folder", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The file is not what was written.
    #[error(
        "{} is damaged ({why}): find out which node runs the pod (`migrator ps` on each), then remove the file if it is not this one, \
         or restore it from a backup; until then this node leaves the pod alone", path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A pod's name that cannot be a file's name.
    #[error("`{0}` cannot be a pod's name: use up to 63 lower-case letters, digits and hyphens")]
    PodName(String),
    /// The migration has been decided before.
    #[error("migration {0} was begun here before: start a new one")]
    Known(MigrationId),
    /// The migration belongs to another node.
    #[error("migration {migration} came from node {from}, and {asker} asks about it")]
    NotYours {
        /// The migration.
        migration: MigrationId,
        /// The node it came from.
        from: String,
        /// The node that asks.
        asker: String,
    },
    /// This node has no right to run the pod.
    #[error("this node does not own pod {0}: see `migrator inspect {0}` on the other nodes")]
    NotOwner(String),
}
