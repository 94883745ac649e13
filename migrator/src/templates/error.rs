//! Why something about a template fails.

use std::io;
use std::path::PathBuf;

use vm_runtime::units::Bytes;

use crate::pods::error::Cause;

/// Why something about a template fails.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The configuration says that there are none.
    #[error(
        "templates are off on this node: set `templates` to `auto` or `manual` in its configuration"
    )]
    Off,
    /// There is none of that name.
    #[error("there is no template `{0}` on this node")]
    NotFound(String),
    /// Not enough memory to make one.
    #[error("not enough memory to make a template: {need} are needed, {available} available")]
    Memory {
        /// What is needed.
        need: Bytes,
        /// What is there.
        available: Bytes,
    },
    /// The pod to make one for is not valid, or its images are not here.
    #[error("no template can be made for this pod")]
    Pod(#[source] Box<crate::pods::PodError>),
    /// A step of making one.
    #[error("cannot {step} of the template")]
    Step {
        /// Which.
        step: &'static str,
        /// Why not.
        #[source]
        source: Cause,
    },
    /// A file of it.
    #[error("cannot {verb} {}", path.display())]
    File {
        /// What was tried.
        verb: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Its content is not what was written.
    #[error("the template's {0} is damaged")]
    Damaged(&'static str),
    /// The service ends.
    #[error("the service is shutting down")]
    ShuttingDown,
}

impl TemplateError {
    pub(super) fn step(step: &'static str, source: impl Into<Cause>) -> Self {
        Self::Step {
            step,
            source: source.into(),
        }
    }
}
