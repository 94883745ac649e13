//! `migrator node --config FILE`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::failure::{Exit, Failure};
use crate::api::error::chain;
use crate::config::Config;
use crate::daemon;

#[derive(Debug, Args)]
pub(super) struct NodeArgs {
    /// The node's configuration
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

impl NodeArgs {
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let config = Config::load(&self.config)
            .map_err(|error| Failure::new(Exit::Failed, chain(&error)))?;
        daemon::init_logging();
        daemon::run(config)
            .await
            .map_err(|error| Failure::new(Exit::Failed, chain(&error)))?;
        Ok(ExitCode::SUCCESS)
    }
}
