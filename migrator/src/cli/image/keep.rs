//! `migrator image save|lease|gc`.

use std::path::PathBuf;

use clap::Args;
use vm_runtime::units::Bytes;

use super::super::failure::Failure;
use super::super::{Context, Output, output};
use super::{absolute, short, span};
use crate::api::image_types::{GcRequest, GcResult, Lease, LeaseRequest, SaveRequest, Saved};

#[derive(Debug, Args)]
pub(super) struct SaveArgs {
    /// An image of the node whose layers are kept
    image: String,
    /// The OCI archive to make, on the service's machine
    file: PathBuf,
}

impl SaveArgs {
    pub(super) async fn run(self, context: &Context) -> Result<(), Failure> {
        let request = SaveRequest {
            image: self.image,
            path: absolute(&self.file)?,
        };
        let saved: Saved = context.client.post("/v1/saves", &request).await?;
        match context.output {
            Output::Json => output::json(&saved)?,
            Output::Text => output::line(&format!(
                "{} ({})",
                saved.path.display(),
                Bytes(saved.size_bytes)
            ))?,
        }
        Ok(())
    }
}

#[derive(Debug, Args)]
pub(super) struct LeaseArgs {
    /// Its name or digest
    image: String,
    /// For how long from now on, such as 90s, 10m, 12h or 7d; 0 ends the lease
    #[arg(long = "for", value_name = "TIME", value_parser = span::seconds)]
    time: u64,
}

impl LeaseArgs {
    pub(super) async fn run(self, context: &Context) -> Result<(), Failure> {
        let request = LeaseRequest {
            image: self.image,
            seconds: self.time,
        };
        let lease: Lease = context.client.post("/v1/leases", &request).await?;
        match context.output {
            Output::Json => output::json(&lease)?,
            Output::Text => output::line(&match lease.until_unix_ms {
                Some(until) => format!("{} is kept for {}", lease.image, span::until(until)),
                None => format!("{} has no lease", lease.image),
            })?,
        }
        Ok(())
    }
}

#[derive(Debug, Args)]
pub(super) struct GcArgs {
    /// Only say what would go
    #[arg(long)]
    dry_run: bool,
}

impl GcArgs {
    pub(super) async fn run(self, context: &Context) -> Result<(), Failure> {
        let request = GcRequest {
            dry_run: self.dry_run,
        };
        let gone: GcResult = context.client.post("/v1/gc", &request).await?;
        if context.output == Output::Json {
            output::json(&gone)?;
            return Ok(());
        }
        for image in &gone.images {
            let size = Bytes(image.size_bytes);
            output::line(&format!("{} {} {size}", image.name, short(&image.digest)))?;
        }
        let verb = if gone.dry_run { "would go" } else { "went" };
        output::line(&format!(
            "{} images and {} blobs {verb}: {}",
            gone.images.len(),
            gone.blobs,
            Bytes(gone.bytes)
        ))?;
        Ok(())
    }
}
