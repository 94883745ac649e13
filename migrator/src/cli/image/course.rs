//! A transfer as it goes on: bars on a terminal, else a line for what changes, on stderr; or JSON, a line an event.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde::Serialize;
use vm_runtime::units::Bytes;

use super::super::failure::{Exit, Failure};
use super::super::{Context, Output, output};
use crate::api::error::ApiError;
use crate::api::image_types::TransferEvent;
use crate::registry::{Phase, Progress};

/// Starts a transfer and shows it; its last event, which is a success.
pub(super) async fn follow(
    context: &Context,
    path: &str,
    request: &impl Serialize,
) -> Result<TransferEvent, Failure> {
    let mut events = context.client.post_stream(path, request).await?;
    let mut view = match context.output {
        Output::Json => View::Json,
        Output::Text if std::io::stderr().is_terminal() => View::bars(),
        Output::Text => View::Lines(Told::default()),
    };
    loop {
        match events.next_json().await? {
            Some(TransferEvent::Progress(progress)) => view.show(progress)?,
            Some(TransferEvent::Failed { error }) => {
                view.clear();
                return Err(ApiError(error).into());
            }
            Some(last) => {
                view.clear();
                return Ok(last);
            }
            None => {
                view.clear();
                return Err(Failure::new(
                    Exit::Unreachable,
                    "the service ended before the transfer did",
                )
                .hint("the same command goes on where it was"));
            }
        }
    }
}

enum View {
    Json,
    Bars {
        all: MultiProgress,
        blobs: BTreeMap<String, ProgressBar>,
        told: Told,
    },
    Lines(Told),
}

/// What was said already.
#[derive(Default)]
struct Told {
    phase: Option<Phase>,
    blobs: BTreeMap<String, bool>,
    note: Option<String>,
}

impl View {
    fn bars() -> Self {
        Self::Bars {
            all: MultiProgress::new(),
            blobs: BTreeMap::new(),
            told: Told::default(),
        }
    }

    fn show(&mut self, progress: Progress) -> Result<(), Failure> {
        match self {
            Self::Json => output::json(&TransferEvent::Progress(progress))?,
            Self::Lines(told) => {
                for line in told.news(&progress) {
                    // Nobody reads it: no reason to end the transfer.
                    let _ = writeln!(std::io::stderr(), "{line}");
                }
            }
            Self::Bars { all, blobs, told } => {
                if let Some(note) = told.note(&progress) {
                    // As above.
                    let _ = all.println(note);
                }
                for blob in &progress.blobs {
                    let bar = blobs
                        .entry(blob.digest.clone())
                        .or_insert_with(|| all.add(bar(&blob.digest, blob.size)));
                    bar.set_position(blob.done);
                    if blob.done == blob.size && !bar.is_finished() {
                        bar.finish();
                    }
                }
                if let Some(line) = told.phase(&progress) {
                    // As above.
                    let _ = all.println(line);
                }
            }
        }
        Ok(())
    }

    fn clear(&self) {
        if let Self::Bars { all, .. } = self {
            // A terminal that is gone shows nothing to clear.
            let _ = all.clear();
        }
    }
}

const IMPORTING: &str = "making the block device";
const PACKING: &str = "packing the chunks";

fn bar(digest: &str, size: u64) -> ProgressBar {
    let bar = ProgressBar::new(size);
    let style = ProgressStyle::with_template(
        "{prefix} [{bar:30}] {bytes:>10} of {total_bytes:10} {eta:>4}",
    );
    // A template that is wrong shows the default style.
    if let Ok(style) = style {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_prefix(super::short(digest));
    bar
}

impl Told {
    fn note(&mut self, progress: &Progress) -> Option<String> {
        if progress.note == self.note {
            return None;
        }
        self.note.clone_from(&progress.note);
        progress.note.clone()
    }

    /// What a phase that begins is called.
    fn phase(&mut self, progress: &Progress) -> Option<&'static str> {
        let before = self.phase.replace(progress.phase);
        match progress.phase {
            Phase::Import if before != Some(Phase::Import) => Some(IMPORTING),
            Phase::Pack if before != Some(Phase::Pack) => Some(PACKING),
            Phase::Import | Phase::Pack | Phase::Resolve | Phase::Transfer => None,
        }
    }

    fn news(&mut self, progress: &Progress) -> Vec<String> {
        let mut lines: Vec<String> = self.note(progress).into_iter().collect();
        for blob in &progress.blobs {
            let name = super::short(&blob.digest);
            let size = Bytes(blob.size);
            let complete = blob.done == blob.size;
            match self.blobs.insert(blob.digest.clone(), complete) {
                None if complete => lines.push(format!("{name} {size} is there")),
                None if blob.done > 0 => {
                    lines.push(format!("{name} {size}, going on at {}", Bytes(blob.done)));
                }
                None => lines.push(format!("{name} {size}")),
                Some(false) if complete => lines.push(format!("{name} {size} complete")),
                Some(_) => {}
            }
        }
        lines.extend(self.phase(progress).map(str::to_owned));
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::progress::BlobProgress;

    #[test]
    fn each_change_is_told_once() {
        let mut progress = Progress {
            phase: Phase::Transfer,
            blobs: vec![BlobProgress {
                digest: "sha256:0123456789abcdef".to_owned(),
                size: 2048,
                done: 1024,
            }],
            transferred_bytes: 0,
            note: Some("next try".to_owned()),
        };
        let mut told = Told::default();
        assert_eq!(
            told.news(&progress),
            [
                "next try",
                "sha256:0123456789ab 2.0 KiB, going on at 1.0 KiB"
            ]
        );
        assert!(told.news(&progress).is_empty());
        progress.blobs[0].done = 2048;
        progress.phase = Phase::Import;
        assert_eq!(
            told.news(&progress),
            ["sha256:0123456789ab 2.0 KiB complete", IMPORTING]
        );
        assert!(told.news(&progress).is_empty());
    }
}
