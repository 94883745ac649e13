//! `migrator ps`.

use std::process::ExitCode;

use clap::Args;
use vm_runtime::units::Bytes;

use super::failure::Failure;
use super::{Context, Output, output};
use crate::api::types::{ContainerState, PodList, PodSummary};

#[derive(Debug, Args)]
pub(super) struct PsArgs {}

impl PsArgs {
    pub(super) async fn run(self, context: &Context) -> Result<ExitCode, Failure> {
        let list: PodList = context.client.get("/v1/pods").await?;
        match context.output {
            Output::Json => output::json(&list)?,
            Output::Text => {
                let rows: Vec<Vec<String>> = list.pods.iter().map(row).collect();
                output::table(
                    &[
                        "POD",
                        "STATE",
                        "CONTAINERS",
                        "IPV4",
                        "IPV6",
                        "MEMORY",
                        "CPUS",
                        "AGE",
                    ],
                    &rows,
                )?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn row(pod: &PodSummary) -> Vec<String> {
    let running = pod
        .containers
        .iter()
        .filter(|c| c.state == ContainerState::Running)
        .count();
    let text = |address: Option<String>| address.unwrap_or_else(|| "-".to_owned());
    vec![
        pod.name.clone(),
        pod.state.as_str().to_owned(),
        format!("{running}/{}", pod.containers.len()),
        text(pod.ipv4.map(|a| a.to_string())),
        text(pod.ipv6.map(|a| a.to_string())),
        Bytes(pod.memory_bytes).to_string(),
        pod.vcpus.to_string(),
        output::age(pod.created_unix_ms),
    ]
}
