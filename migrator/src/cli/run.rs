//! `migrator run FILE`.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use super::failure::{Exit, Failure};
use super::{Context, output};
use crate::api::types::PodSummary;

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// The pod's YAML; `-` reads standard input
    file: PathBuf,
    /// Return as soon as the VM was asked for, without waiting for its containers
    #[arg(long)]
    no_wait: bool,
    /// How long the containers may take to start, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    timeout: u32,
}

impl RunArgs {
    pub(super) async fn run(self, context: &Context) -> Result<ExitCode, Failure> {
        let yaml = read(&self.file)?;
        let path = format!("/v1/pods?wait={}&timeout_s={}", !self.no_wait, self.timeout);
        let pod: PodSummary = context.client.post_yaml(&path, yaml).await?;
        output::pod(&pod, context.output)?;
        Ok(ExitCode::SUCCESS)
    }
}

pub(super) fn read(file: &Path) -> Result<String, Failure> {
    let text = if file == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map(|_| text)
    } else {
        std::fs::read_to_string(file)
    };
    text.map_err(|error| {
        Failure::new(
            Exit::Failed,
            format!("cannot read {}: {error}", file.display()),
        )
    })
}
