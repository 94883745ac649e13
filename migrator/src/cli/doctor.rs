//! `migrator doctor`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::failure::{Exit, Failure};
use super::{Context, Output, output};
use crate::api::client::ClientError;
use crate::api::error::chain;
use crate::config::Config;
use crate::doctor::{self, CheckResult, Report, Subject};

#[derive(Debug, Args)]
pub(super) struct DoctorArgs {
    /// Check for this configuration, in this process; without, a running service is asked, and where
    /// there is none this process checks what needs no configuration
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl DoctorArgs {
    pub(super) async fn run(self, context: &Context) -> Result<ExitCode, Failure> {
        let report: Report = if let Some(file) = self.config {
            let config =
                Config::load(&file).map_err(|error| Failure::new(Exit::Failed, chain(&error)))?;
            doctor::examine(&Subject::of_config(&config)).await
        } else {
            match context.client.get("/v1/doctor").await {
                Ok(report) => report,
                Err(ClientError::Unreachable { .. }) => {
                    eprintln!("no service answers: checking in this process");
                    doctor::examine(&Subject::default()).await
                }
                Err(error) => return Err(error.into()),
            }
        };
        match context.output {
            Output::Json => output::json(&report)?,
            Output::Text => output::bytes(text(&report).as_bytes())?,
        }
        if report.ok {
            Ok(ExitCode::SUCCESS)
        } else {
            let missing = report
                .checks
                .iter()
                .filter(|c| c.required && !c.result.is_ok())
                .count();
            Err(Failure::new(
                Exit::Failed,
                format!("{missing} of the requirements are not met"),
            ))
        }
    }
}

fn text(report: &Report) -> String {
    let mut out = String::new();
    for check in &report.checks {
        let (mark, detail) = match &check.result {
            CheckResult::Ok { found } => ("ok      ", found),
            CheckResult::Missing { why, .. } if check.required => ("MISSING ", why),
            CheckResult::Missing { why, .. } => ("absent  ", why),
        };
        out.push_str(&format!("{mark}{:<22} {detail}\n", check.name));
        if let CheckResult::Missing { remedy, .. } = &check.result {
            out.push_str(&format!("        {:<22} for: {}\n", "", check.purpose));
            out.push_str(&format!("        {:<22} get it: {remedy}\n", ""));
        }
    }
    out
}
