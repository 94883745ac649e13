//! Chunks that somebody waits for.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep};

use super::source::Wanted;
use super::{Counted, Lacking, Supply};
use crate::image::chunks::Asked;

/// Most chunks under way that are waited for.
const AT_ONCE: usize = 32;
/// Until a chunk that nobody had is asked for again: at first, and at most; twice as long each time.
const AGAIN: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(5)];

/// Until the service ends.
pub(super) async fn serve(supply: Supply) {
    let chunks = Arc::clone(supply.inner.images.chunks());
    let Some(mut asking) = chunks.asking() else {
        return;
    };
    let places = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let asked = tokio::select! {
            asked = asking.recv() => asked,
            () = supply.inner.shutdown.cancelled() => return,
        };
        let Some(Asked { record, index }) = asked else {
            return;
        };
        let (supply, places) = (supply.clone(), Arc::clone(&places));
        supply.clone().inner.tasks.spawn(async move {
            let shutdown = supply.inner.shutdown.clone();
            tokio::select! {
                () = fetch(&supply, &places, Wanted { record, index }) => {}
                () = shutdown.cancelled() => {}
            }
        });
    }
}

/// Until it has come, or nobody waits for it any more.
async fn fetch(supply: &Supply, places: &Semaphore, wanted: Wanted) {
    let chunks = supply.inner.images.chunks();
    let digest = wanted.digest();
    let mut again = AGAIN[0];
    let mut told = false;
    while chunks.is_wanted(&digest) {
        let answer = {
            let _place = places.acquire().await;
            let _demanded = Counted::new(&supply.inner.demanded);
            let answer = supply.fetch(&wanted).await;
            supply.lock().demanded_at = Some(Instant::now());
            answer
        };
        match answer {
            Ok(()) => return,
            // They have it all the same.
            Err(error @ Lacking::NotKept { .. }) => {
                tracing::debug!(%error, "a chunk is passed on");
                return;
            }
            Err(error @ Lacking::Nobody(_)) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::error!(
                        image = wanted.record.name, chunk = %digest, why = %error,
                        "a pod waits for a chunk of its image that nobody gives"
                    );
                }
                chunks.explain(&digest, error.to_string());
            }
        }
        sleep(again).await;
        again = (again * 2).min(AGAIN[1]);
    }
}
