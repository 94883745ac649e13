//! The record of a throttle in the VM's folder: what a service that was killed has left behind.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::ThrottleError;
use super::place::{Place, Version};

/// Name of the record in the VM's folder.
pub(super) const FILE: &str = "throttle.json";

/// What was set up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Content {
    /// Groups whose names begin so, in this folder, of this version.
    Groups {
        dir: PathBuf,
        unified: bool,
        prefix: String,
    },
    /// The guest may be in a slice, and stand still.
    Slices,
}

/// The record's file.
#[derive(Clone, Debug)]
pub(super) struct Mark {
    path: PathBuf,
}

impl Mark {
    pub(super) fn new(dir: &Path) -> Self {
        Self {
            path: dir.join(FILE),
        }
    }

    /// Before the first group is made.
    pub(super) fn groups(&self, place: &Place, prefix: &str) -> Result<(), ThrottleError> {
        self.write(&Content::Groups {
            dir: place.dir.clone(),
            unified: place.version == Version::V2,
            prefix: prefix.to_owned(),
        })
    }

    /// Before the first slice.
    pub(super) fn slices(&self) -> Result<(), ThrottleError> {
        self.write(&Content::Slices)
    }

    fn write(&self, content: &Content) -> Result<(), ThrottleError> {
        // A file that is cut short is not there for `read`; and nothing was set up then, because this comes first. It
        // need not outlive the machine: neither does what it tells of.
        let text = serde_json::to_vec(content).unwrap_or_default();
        std::fs::write(&self.path, text).map_err(self.failed("write"))
    }

    fn read(&self) -> Option<Content> {
        serde_json::from_slice(&std::fs::read(&self.path).ok()?).ok()
    }

    /// After everything is as before.
    pub(super) fn remove(&self) -> Result<(), ThrottleError> {
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(self.failed("remove")(error)),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn failed(&self, step: &'static str) -> impl Fn(std::io::Error) -> ThrottleError {
        let path = self.path.clone();
        move |source| ThrottleError::Mark {
            step,
            path: path.clone(),
            source,
        }
    }
}

/// Takes back what a killed service has left of a throttle in the VM of this folder; whether the guest may stand still
/// because of it, and has to be continued. It blocks, and does nothing where there is no record.
///
/// Call [`slices_cleared`] after the guest was continued.
pub(in crate::vm) fn clear(dir: &Path) -> Result<bool, ThrottleError> {
    let mark = Mark::new(dir);
    match mark.read() {
        None => Ok(false),
        Some(Content::Groups {
            dir,
            unified,
            prefix,
        }) => {
            let version = if unified { Version::V2 } else { Version::V1 };
            Place { version, dir }.remove(&prefix)?;
            mark.remove()?;
            Ok(false)
        }
        Some(Content::Slices) => Ok(true),
    }
}

/// Forgets the slices that [`clear`] has told of.
pub(in crate::vm) fn slices_cleared(dir: &Path) -> Result<(), ThrottleError> {
    Mark::new(dir).remove()
}
