//! `migrator volume create`, `ls` and `rm`.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::Value;
use vm_runtime::pod::parse_bytes;
use vm_runtime::units::Bytes;

use super::failure::Failure;
use super::{Context, Output, output};
use crate::api::client::encode;
use crate::api::types::{ReleaseRequest, VolumeInfo, VolumeList, VolumeRequest};
use crate::config::LOCAL_CLASS;

#[derive(Debug, Args)]
pub(super) struct VolumeArgs {
    #[command(subcommand)]
    verb: VolumeVerb,
}

#[derive(Debug, Subcommand)]
enum VolumeVerb {
    /// Make a volume with an empty file system, for pods to claim by its name
    Create {
        /// Its name
        name: String,
        /// Its size, such as 10Gi; room is taken as it is written to
        #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
        size: Bytes,
        /// Where it is: a storage class of the node's configuration
        #[arg(long, value_name = "CLASS", default_value = "local")]
        class: String,
    },
    /// List the volumes that the node sees
    Ls,
    /// Prepare new shared storage, once for all nodes
    Init {
        /// The storage class
        class: String,
    },
    /// Give a shared volume free that a pod has which does not run any more
    Release {
        /// The volume
        name: String,
        /// Take it from a pod of another node. That pod must not run: switch the node off first, or two write to one file system
        #[arg(long)]
        force: bool,
    },
    /// Remove a volume and everything in it
    Rm {
        /// The volume
        name: String,
    },
}

impl VolumeArgs {
    pub(super) async fn run(self, context: &Context) -> Result<ExitCode, Failure> {
        match self.verb {
            VolumeVerb::Create { name, size, class } => {
                let request = VolumeRequest {
                    name,
                    size_bytes: size.0,
                    class: (class != LOCAL_CLASS).then_some(class),
                };
                let made: VolumeInfo = context.client.post("/v1/volumes", &request).await?;
                match context.output {
                    Output::Json => output::json(&made)?,
                    Output::Text => {
                        output::line(&format!("{} made, {}", made.name, Bytes(made.size_bytes)))?;
                    }
                }
            }
            VolumeVerb::Ls => {
                let list: VolumeList = context.client.get("/v1/volumes").await?;
                match context.output {
                    Output::Json => output::json(&list)?,
                    Output::Text => {
                        table(&list)?;
                        for problem in &list.problems {
                            eprintln!("warning: {problem}");
                        }
                    }
                }
            }
            VolumeVerb::Init { class } => {
                let path = format!("/v1/storage/{}/init", encode(&class));
                let answer: Value = context.client.post(&path, &()).await?;
                match context.output {
                    Output::Json => output::json(&answer)?,
                    Output::Text => output::line(&format!("{class} prepared"))?,
                }
            }
            VolumeVerb::Release { name, force } => {
                let path = format!("/v1/volumes/{}/release", encode(&name));
                let request = ReleaseRequest { force };
                let answer: Value = context.client.post(&path, &request).await?;
                match context.output {
                    Output::Json => output::json(&answer)?,
                    Output::Text => output::line(&match answer["from"]["pod"].as_str() {
                        Some(pod) => format!(
                            "{name} released from pod {pod} of node {}",
                            answer["from"]["node"].as_str().unwrap_or("?")
                        ),
                        None => format!("{name} was free"),
                    })?,
                }
            }
            VolumeVerb::Rm { name } => {
                let path = format!("/v1/volumes/{}", encode(&name));
                let answer: Value = context.client.delete(&path).await?;
                match context.output {
                    Output::Json => output::json(&answer)?,
                    Output::Text => output::line(&format!("{name} removed"))?,
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn table(list: &VolumeList) -> std::io::Result<()> {
    let rows: Vec<Vec<String>> = list
        .volumes
        .iter()
        .map(|volume| {
            vec![
                volume.name.clone(),
                Bytes(volume.size_bytes).to_string(),
                Bytes(volume.allocated_bytes).to_string(),
                volume.class.clone(),
                volume.used_by.clone().unwrap_or_else(|| "-".to_owned()),
                volume.node.clone().unwrap_or_else(|| "-".to_owned()),
            ]
        })
        .collect();
    output::table(
        &["NAME", "SIZE", "ALLOCATED", "CLASS", "POD", "NODE"],
        &rows,
    )
}
