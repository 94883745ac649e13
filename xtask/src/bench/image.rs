//! `cargo xtask bench image`: how soon a pod runs where its image is not, what its disks cost while they are used, and what moving them costs.
//!
//! Records, options and table are those of `bench memory`. docs/benchmarks.md says how each figure is taken.

mod rows;

use std::process::ExitCode;

use anyhow::Result;

use super::plain;
use super::plan::Args;
use crate::project::Project;
use crate::setup;

/// The form.
///
/// # Errors
/// As for [`plain::form`].
pub(super) fn main(project: &Project, args: &Args) -> Result<ExitCode> {
    plain::form(project, args, "image", rows::all, || {
        let peers = setup::Args {
            bench: true,
            ..setup::Args::default()
        };
        setup::ensure(project, &peers)
    })
}
