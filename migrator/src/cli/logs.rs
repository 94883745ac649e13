//! `migrator logs POD [CONTAINER]`.

use std::process::ExitCode;

use clap::Args;

use super::failure::Failure;
use super::{Context, Output, output};
use crate::api::client::encode;

#[derive(Debug, Args)]
pub(super) struct LogsArgs {
    /// The pod
    pod: String,
    /// Only this container; without, lines of pods with several containers start with `[CONTAINER]`
    container: Option<String>,
    /// Go on with what is printed from now on, until the pod leaves this node
    #[arg(short, long)]
    follow: bool,
    /// Start with the last LINES lines only
    #[arg(long, value_name = "LINES")]
    tail: Option<usize>,
}

impl LogsArgs {
    pub(super) async fn run(self, context: &Context) -> Result<ExitCode, Failure> {
        let mut path = format!("/v1/pods/{}/logs?follow={}", encode(&self.pod), self.follow);
        if let Some(container) = &self.container {
            path.push_str(&format!("&container={}", encode(container)));
        }
        if let Some(lines) = self.tail {
            path.push_str(&format!("&tail={lines}"));
        }
        if context.output == Output::Json {
            path.push_str("&format=ndjson");
        }
        let mut pieces = context.client.stream(&path).await?;
        while let Some(piece) = pieces.next().await? {
            output::bytes(&piece)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
