//! `migrator start POD`.

use std::process::ExitCode;

use clap::Args;

use super::failure::Failure;
use super::{Context, output};
use crate::api::client::encode;
use crate::api::types::PodSummary;

#[derive(Debug, Args)]
pub(super) struct StartArgs {
    /// The pod
    pod: String,
    /// How long the containers may take to start, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    timeout: u32,
}

impl StartArgs {
    pub(super) async fn run(self, context: &Context) -> Result<ExitCode, Failure> {
        let path = format!(
            "/v1/pods/{}/start?timeout_s={}",
            encode(&self.pod),
            self.timeout
        );
        let pod: PodSummary = context.client.post(&path, &()).await?;
        output::pod(&pod, context.output)?;
        Ok(ExitCode::SUCCESS)
    }
}
