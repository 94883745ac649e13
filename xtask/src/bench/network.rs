//! `cargo xtask bench network`: what the gate costs while nothing moves, what parking costs when something does, and what a client sees.
//!
//! Records, options and table are those of `bench memory`. The first rows run `packet-path` (tests/src/bin), which measures a port on
//! real devices without any guest; the last moves guests. docs/benchmarks.md says how each figure is taken.

mod program;
mod rows;
mod tail;

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
    plain::form(project, args, "network", rows::all, || {
        setup::ensure(project, &setup::Args::default())?;
        program::build(project)
    })
}
