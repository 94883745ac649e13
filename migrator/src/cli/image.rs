//! `migrator image import|ls|rm`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use vm_runtime::units::Bytes;

use super::failure::{Exit, Failure};
use super::{Context, Output, output};
use crate::api::client::encode;
use crate::api::types::{ImageList, ImageSummary, ImportRequest};

#[derive(Debug, Args)]
pub(super) struct ImageArgs {
    #[command(subcommand)]
    verb: ImageVerb,
}

#[derive(Debug, Subcommand)]
enum ImageVerb {
    /// Import an OCI image layout (folder) or archive (file)
    Import {
        /// The layout or archive, on the service's machine
        path: PathBuf,
        /// Its name; the one in the layout if absent
        #[arg(long)]
        name: Option<String>,
    },
    /// List the node's images
    Ls,
    /// Remove an image that no pod uses
    Rm {
        /// Its name or digest
        image: String,
    },
}

impl ImageArgs {
    pub(super) async fn run(self, context: &Context) -> Result<ExitCode, Failure> {
        match self.verb {
            ImageVerb::Import { path, name } => {
                let path = std::path::absolute(&path).map_err(|error| {
                    Failure::new(Exit::Failed, format!("{}: {error}", path.display()))
                })?;
                let request = ImportRequest { path, name };
                let image: ImageSummary = context.client.post("/v1/images", &request).await?;
                match context.output {
                    Output::Json => output::json(&image)?,
                    Output::Text => output::line(&format!(
                        "{} {} ({}, {} chunks)",
                        image.name,
                        image.digest,
                        Bytes(image.size_bytes),
                        image.chunks
                    ))?,
                }
            }
            ImageVerb::Ls => {
                let list: ImageList = context.client.get("/v1/images").await?;
                match context.output {
                    Output::Json => output::json(&list)?,
                    Output::Text => {
                        let rows: Vec<Vec<String>> = list
                            .images
                            .iter()
                            .map(|image| {
                                vec![
                                    image.name.clone(),
                                    short(&image.digest),
                                    Bytes(image.size_bytes).to_string(),
                                    image.used_by.join(","),
                                ]
                            })
                            .collect();
                        output::table(&["IMAGE", "DIGEST", "SIZE", "USED BY"], &rows)?;
                    }
                }
            }
            ImageVerb::Rm { image } => {
                let path = format!("/v1/images/{}", encode(&image));
                let answer: serde_json::Value = context.client.delete(&path).await?;
                match context.output {
                    Output::Json => output::json(&answer)?,
                    Output::Text => output::line(&format!("{image} removed"))?,
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The digest's start: enough to tell images apart by eye.
fn short(digest: &str) -> String {
    digest.chars().take("sha256:".len() + 12).collect()
}
