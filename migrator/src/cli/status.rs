//! `migrator status [ID]` and `migrator cancel ID`.

use std::process::ExitCode;

use clap::Args;
use vm_runtime::units::Bytes;

use super::failure::{Exit, Failure};
use super::{Context, Output, output};
use crate::api::client::encode;
use crate::api::types::MigrationList;
use crate::migration::status::{MigrationReport, MigrationStatus, Outcome, Phase};

#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    /// The migration; all of them if absent
    id: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct CancelArgs {
    /// The migration
    id: String,
}

impl StatusArgs {
    pub(super) async fn run(self, context: &Context) -> Result<ExitCode, Failure> {
        if let Some(id) = self.id {
            let path = format!("/v1/migrations/{}", encode(&id));
            let status: MigrationStatus = context.client.get(&path).await?;
            match context.output {
                Output::Json => output::json(&status)?,
                Output::Text => match &status.report {
                    Some(report) => output::bytes(super::migrate::summary(report).as_bytes())?,
                    None => output::line(&progress(&status))?,
                },
            }
            return Ok(ExitCode::SUCCESS);
        }
        let list: MigrationList = context.client.get("/v1/migrations").await?;
        match context.output {
            Output::Json => output::json(&list)?,
            Output::Text => {
                let rows: Vec<Vec<String>> = list.migrations.iter().map(row).collect();
                output::table(
                    &["ID", "POD", "FROM", "TO", "PHASE", "SENT", "DOWNTIME"],
                    &rows,
                )?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl CancelArgs {
    pub(super) async fn run(self, context: &Context) -> Result<ExitCode, Failure> {
        let path = format!("/v1/migrations/{}", encode(&self.id));
        let before: MigrationStatus = context.client.get(&path).await?;
        let _: serde_json::Value = context.client.delete(&path).await?;
        // It ends in an instant; a destination that does not answer may take some seconds.
        let report = super::migrate::wait(&context.client, &self.id, false).await?;
        match context.output {
            Output::Json => output::json(&report)?,
            Output::Text => output::line(&cancelled(&report, before.phase))?,
        }
        match report.outcome {
            Outcome::Refused(_) | Outcome::Failed(_) => Ok(ExitCode::SUCCESS),
            Outcome::Completed => Err(Failure::new(
                Exit::Refused,
                "the guest was handed over before the wish to cancel came",
            )),
        }
    }
}

/// What a cancel did, for people.
fn cancelled(report: &MigrationReport, phase: Phase) -> String {
    let MigrationReport { pod, from, to, .. } = report;
    let phase = phase_name(phase);
    match &report.outcome {
        Outcome::Completed => format!("{pod} moved from {from} to {to}: it was too late to cancel"),
        Outcome::Refused(_) | Outcome::Failed(_) => {
            let was = match report.frozen_at_unix_us {
                0 => "its guest was not stopped".to_owned(),
                _ => "its guest goes on, after a stop".to_owned(),
            };
            format!(
                "{pod} stays on {from}: cancelled in {phase}, {was}, and {to} keeps nothing of it"
            )
        }
    }
}

pub(super) fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Handshake => "handshake",
        Phase::Image => "image",
        Phase::Precopy => "precopy",
        Phase::Switchover => "switchover",
        Phase::Postcopy => "postcopy",
        Phase::Forwarding => "forwarding",
        Phase::InDoubt => "in doubt",
        Phase::Done => "done",
    }
}

fn row(status: &MigrationStatus) -> Vec<String> {
    let (phase, downtime) = match &status.report {
        None => (phase_name(status.phase), "-".to_owned()),
        Some(report) => match report.outcome {
            Outcome::Completed => ("completed", format!("{:.1} ms", report.downtime_ms)),
            Outcome::Refused(_) => ("refused", "-".to_owned()),
            Outcome::Failed(_) => ("failed", "-".to_owned()),
        },
    };
    vec![
        status.id.clone(),
        status.pod.clone(),
        status.from.clone(),
        status.to.clone(),
        phase.to_owned(),
        Bytes(status.bytes_sent).to_string(),
        downtime,
    ]
}

/// One line about a migration that is under way.
pub(super) fn progress(status: &MigrationStatus) -> String {
    let mut text = format!(
        "{} {} -> {}: {}",
        status.pod,
        status.from,
        status.to,
        phase_name(status.phase)
    );
    if status.phase == Phase::Precopy {
        text.push_str(&format!(
            " round {}, {} sent at {}/s, {} pages left, dirtied at {}/s, downtime would be {:.1} ms",
            status.round,
            Bytes(status.bytes_sent),
            Bytes(status.bandwidth_bytes_per_s),
            status.pages_left,
            Bytes(status.dirty_bytes_per_s),
            status.predicted_downtime_ms,
        ));
        if status.disk_bytes_sent > 0 {
            text.push_str(&format!(
                ", {} of disks sent and {} left",
                Bytes(status.disk_bytes_sent),
                Bytes(status.disk_bytes_left),
            ));
        }
    }
    text
}
