//! `migrator image push`.

use std::path::PathBuf;

use clap::Args;
use vm_runtime::units::Bytes;

use super::super::failure::Failure;
use super::super::{Context, Output, output};
use super::{absolute, course};
use crate::api::image_types::{PushRequest, TransferEvent};

#[derive(Debug, Args)]
pub(super) struct PushArgs {
    /// An image of the node whose layers are kept
    image: String,
    /// Where it goes: `[HOST[:PORT]/]REPOSITORY[:TAG]`; the image's own name if absent
    to: Option<String>,
    /// Credentials, as `skopeo login --authfile FILE` and `docker login` write them; a file on the service's machine
    #[arg(long, value_name = "FILE")]
    creds_file: Option<PathBuf>,
    /// Speak to the registry without TLS
    #[arg(long)]
    plain_http: bool,
    /// Push the image's chunks, too, so that nodes can use it before all of it is there: `image pull --lazy`
    #[arg(long)]
    chunks: bool,
}

impl PushArgs {
    pub(super) async fn run(self, context: &Context) -> Result<(), Failure> {
        let request = PushRequest {
            to: self.to.unwrap_or_else(|| self.image.clone()),
            image: self.image,
            auth_file: self.creds_file.as_deref().map(absolute).transpose()?,
            plain_http: self.plain_http,
            chunks: self.chunks,
        };
        let last = course::follow(context, "/v1/pushes", &request).await?;
        match (last, context.output) {
            (last, Output::Json) => output::json(&last)?,
            (
                TransferEvent::Pushed {
                    to, digest, chunks, ..
                },
                Output::Text,
            ) => {
                output::line(&format!("{to} {digest}"))?;
                if let Some(chunks) = chunks {
                    let (packed, plain) = (Bytes(chunks.packed_bytes), Bytes(chunks.plain_bytes));
                    output::line(&format!("chunks {} ({packed} of {plain})", chunks.digest))?;
                }
            }
            (
                TransferEvent::Progress(_)
                | TransferEvent::Pulled { .. }
                | TransferEvent::Failed { .. },
                Output::Text,
            ) => {}
        }
        Ok(())
    }
}
