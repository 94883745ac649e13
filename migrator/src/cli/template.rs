//! `migrator template ls`, `build` and `rm`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::Value;
use vm_runtime::units::Bytes;

use super::failure::Failure;
use super::{Context, Output, output, run};
use crate::api::client::encode;
use crate::api::template_types::{TemplateInfo, TemplateList};

#[derive(Debug, Args)]
pub(super) struct TemplateArgs {
    #[command(subcommand)]
    verb: TemplateVerb,
}

#[derive(Debug, Subcommand)]
enum TemplateVerb {
    /// List the node's templates
    Ls,
    /// Make the template that a pod would start from, in the place of one that is there
    Build {
        /// The pod's YAML; `-` reads standard input
        file: PathBuf,
    },
    /// Remove a template; pods that have started from it do not need it
    Rm {
        /// Its key
        key: String,
    },
}

impl TemplateArgs {
    pub(super) async fn run(self, context: &Context) -> Result<ExitCode, Failure> {
        match self.verb {
            TemplateVerb::Ls => {
                let list: TemplateList = context.client.get("/v1/templates").await?;
                match context.output {
                    Output::Json => output::json(&list)?,
                    Output::Text => table(&list)?,
                }
            }
            TemplateVerb::Build { file } => {
                let yaml = run::read(&file)?;
                let made: TemplateInfo = context.client.post_yaml("/v1/templates", yaml).await?;
                match context.output {
                    Output::Json => output::json(&made)?,
                    Output::Text => output::line(&format!(
                        "{} made, {}",
                        made.key,
                        Bytes(made.allocated_bytes)
                    ))?,
                }
            }
            TemplateVerb::Rm { key } => {
                let path = format!("/v1/templates/{}", encode(&key));
                let answer: Value = context.client.delete(&path).await?;
                match context.output {
                    Output::Json => output::json(&answer)?,
                    Output::Text => output::line(&format!("{key} removed"))?,
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn table(list: &TemplateList) -> std::io::Result<()> {
    let rows: Vec<Vec<String>> = list
        .templates
        .iter()
        .map(|template| {
            let pages = if template.hugepages { " huge" } else { "" };
            vec![
                template.key.clone(),
                format!("{}{pages}", Bytes(template.memory_bytes)),
                template.vcpus.to_string(),
                template.disks.to_string(),
                template.qemu.clone(),
                Bytes(template.allocated_bytes).to_string(),
                template.starts.to_string(),
            ]
        })
        .collect();
    let head = [
        "KEY",
        "MEMORY",
        "CPUS",
        "DISKS",
        "QEMU",
        "ALLOCATED",
        "STARTS",
    ];
    output::table(&head, &rows)
}
