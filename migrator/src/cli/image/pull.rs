//! `migrator image pull`.

use std::path::PathBuf;

use clap::Args;

use super::super::failure::Failure;
use super::super::{Context, Output, output};
use super::{absolute, course, span};
use crate::api::image_types::{PullRequest, TransferEvent};

#[derive(Debug, Args)]
pub(super) struct PullArgs {
    /// The image: `[HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]`; without a host it is on docker.io
    reference: String,
    /// The name to give it; the reference's if absent
    #[arg(long)]
    name: Option<String>,
    /// Of an image for several platforms, which: linux/amd64, or a variant such as linux/amd64/v3
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    platform: Option<String>,
    /// Credentials, as `skopeo login --authfile FILE` and `docker login` write them; a file on the service's machine
    #[arg(long, value_name = "FILE")]
    creds_file: Option<PathBuf>,
    /// Speak to the registry without TLS
    #[arg(long)]
    plain_http: bool,
    /// Keep the layers, so that the image can be pushed and saved
    #[arg(long)]
    keep_layers: bool,
    /// Use the image while its chunks still come, if the registry has them (`image push --chunks`)
    #[arg(long, conflicts_with_all = ["whole", "keep_layers"])]
    lazy: bool,
    /// Wait for all of it, also if the node's configuration says `registries.lazy`
    #[arg(long)]
    whole: bool,
    /// How long `image gc` leaves the image alone, such as 90s, 10m, 12h or 7d
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = span::seconds)]
    lease: u64,
}

impl PullArgs {
    pub(super) async fn run(self, context: &Context) -> Result<(), Failure> {
        let request = PullRequest {
            reference: self.reference,
            name: self.name,
            platform: self.platform,
            auth_file: self.creds_file.as_deref().map(absolute).transpose()?,
            plain_http: self.plain_http,
            keep_layers: self.keep_layers,
            lazy: match (self.lazy, self.whole) {
                (true, _) => Some(true),
                (false, true) => Some(false),
                (false, false) => None,
            },
            lease_s: self.lease,
        };
        let last = course::follow(context, "/v1/pulls", &request).await?;
        match (last, context.output) {
            (last, Output::Json) => output::json(&last)?,
            (TransferEvent::Pulled { image, .. }, Output::Text) => super::print(&image)?,
            (
                TransferEvent::Progress(_)
                | TransferEvent::Pushed { .. }
                | TransferEvent::Failed { .. },
                Output::Text,
            ) => {}
        }
        Ok(())
    }
}
