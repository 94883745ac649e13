//! `migrator image`.

mod course;
mod keep;
mod pull;
mod push;
mod span;
mod verify;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use vm_runtime::units::Bytes;

use super::failure::{Exit, Failure};
use super::{Context, Output, output};
use crate::api::client::encode;
use crate::api::image_types::{ImageList, ImageSummary, ImportRequest};

#[derive(Debug, Args)]
pub(super) struct ImageArgs {
    #[command(subcommand)]
    verb: ImageVerb,
}

#[derive(Debug, Subcommand)]
enum ImageVerb {
    /// Pull an image from a registry
    Pull(pull::PullArgs),
    /// Import an OCI image layout (folder) or archive (file)
    Import {
        /// The layout or archive, on the service's machine
        path: PathBuf,
        #[command(flatten)]
        options: ImportOptions,
    },
    /// Import an archive: `import` by another name
    Load {
        /// The archive, on the service's machine
        file: PathBuf,
        #[command(flatten)]
        options: ImportOptions,
    },
    /// Push an image whose layers are kept to a registry
    Push(push::PushArgs),
    /// Save an image whose layers are kept as an OCI archive
    Save(keep::SaveArgs),
    /// Keep an image from `gc` for a while
    Lease(keep::LeaseArgs),
    /// Remove the images that no pod and no lease needs
    Gc(keep::GcArgs),
    /// Read and hash every chunk of images, and say what is damaged or missing
    Verify(verify::VerifyArgs),
    /// List the node's images
    Ls,
    /// Remove an image that no pod uses
    Rm {
        /// Its name or digest
        image: String,
    },
}

#[derive(Debug, Args)]
struct ImportOptions {
    /// Its name; the one in the layout if absent
    #[arg(long)]
    name: Option<String>,
    /// Keep the layers, so that the image can be pushed and saved
    #[arg(long)]
    keep_layers: bool,
}

impl ImageArgs {
    pub(super) async fn run(self, context: &Context) -> Result<ExitCode, Failure> {
        match self.verb {
            ImageVerb::Pull(args) => args.run(context).await?,
            ImageVerb::Push(args) => args.run(context).await?,
            ImageVerb::Save(args) => args.run(context).await?,
            ImageVerb::Lease(args) => args.run(context).await?,
            ImageVerb::Gc(args) => args.run(context).await?,
            ImageVerb::Verify(args) => args.run(context).await?,
            ImageVerb::Import { path, options }
            | ImageVerb::Load {
                file: path,
                options,
            } => {
                let request = ImportRequest {
                    path: absolute(&path)?,
                    name: options.name,
                    keep_layers: options.keep_layers,
                };
                let image: ImageSummary = context.client.post("/v1/images", &request).await?;
                match context.output {
                    Output::Json => output::json(&image)?,
                    Output::Text => print(&image)?,
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
                                    part(image.here_bytes, image.size_bytes),
                                    image
                                        .leased_until_unix_ms
                                        .map_or_else(String::new, span::until),
                                    image.used_by.join(","),
                                ]
                            })
                            .collect();
                        output::table(
                            &["IMAGE", "DIGEST", "SIZE", "HERE", "LEASE", "USED BY"],
                            &rows,
                        )?;
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

/// The service has another working directory than we.
fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path)
        .map_err(|error| Failure::new(Exit::Failed, format!("{}: {error}", path.display())))
}

fn print(image: &ImageSummary) -> std::io::Result<()> {
    output::line(&format!(
        "{} {} ({}, {} chunks)",
        image.name,
        image.digest,
        Bytes(image.size_bytes),
        image.chunks
    ))
}

/// How much of it is on the node.
fn part(here: u64, size: u64) -> String {
    match here >= size {
        true => "all".to_owned(),
        // Never 100 before it is all.
        false => format!("{}%", here.saturating_mul(100) / size.max(1)),
    }
}

/// The digest's start: enough to tell images apart by eye.
fn short(digest: &str) -> String {
    digest.chars().take("sha256:".len() + 12).collect()
}
