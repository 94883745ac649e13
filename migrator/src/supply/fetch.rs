//! Asks for one chunk: the first source that has it.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::time::timeout;

use super::Supply;
use super::source::{ChunkSource, SourceError, Wanted};
use crate::image::Supplied;

/// For one source to give one chunk. Bulk of the same node may be before it in the queue.
const WITHIN: Duration = Duration::from_secs(10);

/// Why a chunk is not here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lacking {
    /// Nobody gives it; what each source says.
    #[error("{}", if .0.is_empty() { "there is nobody to ask: no peer and no registry is configured".to_owned() } else { .0.join("; ") })]
    Nobody(Vec<String>),
    /// It came, whoever waited for it has it, and the disk does not take it.
    #[error("it cannot be kept: {reason}")]
    NotKept {
        /// Why.
        reason: String,
        /// The disk is full.
        full: bool,
    },
}

/// Since the first call.
fn now() -> Duration {
    static BEGAN: OnceLock<Instant> = OnceLock::new();
    BEGAN.get_or_init(Instant::now).elapsed()
}

impl Supply {
    /// Asks one source after the other for a chunk, and keeps it.
    pub(super) async fn ask(&self, wanted: &Wanted, urgent: bool) -> Result<(), Lacking> {
        let mut reasons = Vec::new();
        for (source, name) in self.in_order(wanted).await {
            let name = name.as_str();
            let paused = self.lock().standing.paused(name, now()).map(str::to_owned);
            if let Some(why) = paused {
                reasons.push(format!("{name}: {why}"));
                continue;
            }
            let answer = timeout(WITHIN, source.fetch(wanted, urgent)).await;
            let answer = answer.unwrap_or_else(|_| {
                Err(SourceError(format!(
                    "no answer within {} s",
                    WITHIN.as_secs()
                )))
            });
            match answer {
                Ok(Some(bytes)) => match self.keep(wanted, bytes).await {
                    Supplied::Kept => {
                        self.came(name, wanted);
                        return Ok(());
                    }
                    Supplied::Passed(error) => {
                        self.came(name, wanted);
                        return Err(Lacking::NotKept {
                            full: error.is_full(),
                            reason: crate::api::error::chain(&error),
                        });
                    }
                    Supplied::Wrong { found, len } => {
                        let why = format!("gave {len} bytes that hash to {found}");
                        tracing::error!(
                            from = name, chunk = %wanted.digest(), image = wanted.record.name, why,
                            "a chunk that came is not what was asked for: it is thrown away, and nothing is asked of its sender for a minute"
                        );
                        reasons.push(format!("{name}: {why}"));
                        self.lock().standing.lied(name, why, now());
                    }
                },
                Ok(None) => reasons.push(format!("{name}: does not have it")),
                Err(SourceError(why)) => {
                    if self.lock().standing.failed(name, why.clone(), now()) {
                        tracing::warn!(from = name, why, "no chunks of images come from there");
                    }
                    reasons.push(format!("{name}: {why}"));
                }
            }
        }
        Err(Lacking::Nobody(reasons))
    }

    /// The sources, each with what is asked there, in the order in which they are asked.
    async fn in_order(&self, wanted: &Wanted) -> Vec<(Arc<dyn ChunkSource>, String)> {
        let known = self.lock().sources.clone();
        let mut sources = Vec::with_capacity(known.len());
        for source in known {
            let address = source.address(wanted).await;
            sources.push((source, address));
        }
        let (state, image) = (self.lock(), wanted.record.erofs_digest);
        sources.sort_by_key(|(_, address)| state.standing.rank(&image, address));
        sources
    }

    fn came(&self, name: &str, wanted: &Wanted) {
        let mut state = self.lock();
        let image = wanted.record.erofs_digest;
        state.standing.good(&image, name);
        *state.fetched.entry(image).or_default() += wanted.len() as u64;
    }

    /// Checks, keeps and hands out a chunk.
    async fn keep(&self, wanted: &Wanted, bytes: Bytes) -> Supplied {
        let chunks = Arc::clone(self.inner.images.chunks());
        let (record, index) = (Arc::clone(&wanted.record), wanted.index);
        let supplied =
            tokio::task::spawn_blocking(move || chunks.supply(&record, index, &bytes)).await;
        // Threads are not made any more: the service ends.
        supplied.unwrap_or_else(|error| {
            Supplied::Passed(crate::image::chunks::ChunkError {
                what: "write",
                path: self.inner.images.chunks().root().to_owned(),
                source: std::io::Error::other(error),
            })
        })
    }
}
