//! `migrator stop POD`.

use std::process::ExitCode;

use clap::Args;

use super::failure::Failure;
use super::{Context, Output, output};
use crate::api::client::encode;

#[derive(Debug, Args)]
pub(super) struct StopArgs {
    /// The pod
    pod: String,
    /// How long its containers get between the first signal and the last, in seconds [default: the pod's
    /// terminationGracePeriodSeconds, or 10]
    #[arg(long, value_name = "SECONDS")]
    grace: Option<u32>,
}

impl StopArgs {
    pub(super) async fn run(self, context: &Context) -> Result<ExitCode, Failure> {
        let mut path = format!("/v1/pods/{}", encode(&self.pod));
        if let Some(grace) = self.grace {
            path.push_str(&format!("?grace_ms={}", u64::from(grace) * 1000));
        }
        let answer: serde_json::Value = context.client.delete(&path).await?;
        match context.output {
            Output::Json => output::json(&answer)?,
            Output::Text => output::line(&format!("{} stopped and removed", self.pod))?,
        }
        Ok(ExitCode::SUCCESS)
    }
}
