//! `migrator image verify`.

use clap::Args;

use crate::api::image_types::{VerifiedImage, VerifyRequest, VerifyResult};
use crate::cli::failure::{Exit, Failure};
use crate::cli::{Context, Output, output};

/// Chunks that are named; of more only the number is told.
const NAMED: usize = 8;

#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    /// The images; all of the node if none is named
    images: Vec<String>,
    /// Fetch what is damaged or missing from other nodes and registries
    #[arg(long)]
    repair: bool,
}

impl VerifyArgs {
    pub(super) async fn run(self, context: &Context) -> Result<(), Failure> {
        let request = VerifyRequest {
            images: self.images,
            repair: self.repair,
        };
        let result: VerifyResult = context.client.post("/v1/verify", &request).await?;
        match context.output {
            Output::Json => output::json(&result)?,
            Output::Text => {
                for image in &result.images {
                    output::line(&line(image))?;
                }
            }
        }
        let bad = result.images.iter().filter(|image| !image.is_whole());
        match bad.count() {
            0 => Ok(()),
            bad => {
                let failure = Failure::new(Exit::Failed, format!("{bad} images are not whole"));
                Err(match request.repair {
                    true => failure.hint("pods that read what is missing wait for it; import or pull the image again, or start a node that has it"),
                    false => failure.hint("`--repair` fetches what is missing from nodes and registries that have it"),
                })
            }
        }
    }
}

fn line(image: &VerifiedImage) -> String {
    let list = |what: &str, indices: &[u32]| match indices {
        [] => String::new(),
        indices => {
            let named: Vec<String> = indices.iter().take(NAMED).map(u32::to_string).collect();
            let more = if indices.len() > NAMED { ", …" } else { "" };
            format!(", {} {what} ({}{more})", indices.len(), named.join(", "))
        }
    };
    let repaired = match image.repaired {
        0 => String::new(),
        repaired => format!(", {repaired} fetched again"),
    };
    let problem = image.problem.as_ref();
    format!(
        "{}: {} chunks{}{}{repaired}{}",
        image.name,
        image.chunks,
        list("damaged", &image.damaged),
        list("missing", &image.missing),
        problem.map_or_else(String::new, |problem| format!("; {problem}"))
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_is_wrong() {
        let mut image = VerifiedImage {
            name: "app:1".to_owned(),
            digest: String::new(),
            chunks: 20,
            damaged: Vec::new(),
            missing: Vec::new(),
            repaired: 0,
            problem: None,
        };
        assert_eq!(line(&image), "app:1: 20 chunks");
        assert!(image.is_whole());
        image.damaged = vec![3];
        image.missing = (5..15).collect();
        image.repaired = 10;
        image.problem = Some("chunk 3: peer b: does not have it".to_owned());
        assert!(!image.is_whole());
        assert_eq!(
            line(&image),
            "app:1: 20 chunks, 1 damaged (3), 10 missing (5, 6, 7, 8, 9, 10, 11, 12, …), 10 fetched again; chunk 3: peer b: does not have it"
        );
    }
}
