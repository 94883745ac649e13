//! Fetches one chunk: from the first source that has it.

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
    ///
    /// # Errors
    /// Nobody gives it, or it cannot be kept.
    pub async fn fetch(&self, wanted: &Wanted) -> Result<(), Lacking> {
        let mut reasons = Vec::new();
        for source in self.in_order() {
            let name = source.name();
            let paused = self.lock().standing.paused(name, now()).map(str::to_owned);
            if let Some(why) = paused {
                reasons.push(format!("{name}: {why}"));
                continue;
            }
            let answer = timeout(WITHIN, source.fetch(wanted)).await;
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

    fn in_order(&self) -> Vec<Arc<dyn ChunkSource>> {
        let state = self.lock();
        let mut sources = state.sources.clone();
        sources.sort_by_key(|source| state.standing.rank(source.name()));
        sources
    }

    fn came(&self, name: &str, wanted: &Wanted) {
        let mut state = self.lock();
        state.standing.good(name);
        let image = wanted.record.erofs_digest;
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
