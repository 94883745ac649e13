//! One fetch of a chunk at a time, however many want it.

use std::collections::HashMap;

use tokio::sync::watch;

use super::source::Wanted;
use super::{Lacking, Supply};
use crate::image::Digest;

/// How a fetch ended; `None`: it has not.
type Outcome = Option<Result<(), Lacking>>;

/// Chunks that are being fetched.
pub(super) type Flights = HashMap<Digest, watch::Receiver<Outcome>>;

/// A fetch under way. Dropped, as it is when it is given up, others may begin one.
struct Flight<'a> {
    supply: &'a Supply,
    digest: Digest,
    over: watch::Sender<Outcome>,
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        self.supply.lock().flights.remove(&self.digest);
    }
}

impl Supply {
    /// Asks one source after the other for a chunk that is not here, and keeps it.
    ///
    /// # Errors
    /// Nobody gives it, or it cannot be kept.
    pub async fn fetch(&self, wanted: &Wanted) -> Result<(), Lacking> {
        self.bring(wanted, false).await
    }

    /// As [`Supply::fetch`]; one that is `urgent`, because somebody waits for it, goes before those that are not.
    pub(super) async fn bring(&self, wanted: &Wanted, urgent: bool) -> Result<(), Lacking> {
        let digest = wanted.digest();
        loop {
            if self.inner.images.chunks().has(&digest) {
                return Ok(());
            }
            let mut other = match self.take_off(digest) {
                Ok(flight) => {
                    let came = self.ask(wanted, urgent).await;
                    flight.over.send_replace(Some(came.clone()));
                    return came;
                }
                Err(other) => other,
            };
            if urgent {
                let sources = self.lock().sources.clone();
                for source in sources {
                    source.hurry(wanted);
                }
            }
            // An error: it was given up.
            if let Ok(over) = other.wait_for(Option::is_some).await
                && let Some(came) = over.clone()
            {
                return came;
            }
        }
    }

    /// Begins to fetch a chunk, unless somebody does.
    fn take_off(&self, digest: Digest) -> Result<Flight<'_>, watch::Receiver<Outcome>> {
        let mut state = self.lock();
        if let Some(other) = state.flights.get(&digest) {
            return Err(other.clone());
        }
        let (over, watched) = watch::channel(None);
        state.flights.insert(digest, watched);
        Ok(Flight {
            supply: self,
            digest,
            over,
        })
    }
}
