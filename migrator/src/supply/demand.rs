//! Chunks that somebody waits for, and those that the same reader will want next.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep};

use super::ahead::Ahead;
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
        let wanted = Wanted { record, index };
        let next = ahead(&supply, &wanted).await;
        let (own, places) = (supply.clone(), Arc::clone(&places));
        supply.spawn(async move { fetch(&own, &places, wanted).await });
        if !next.is_empty() {
            let own = supply.clone();
            supply.spawn(async move {
                let _demanded = Counted::new(&own.inner.demanded);
                // What does not come is asked for again when it is read.
                join_all(next.iter().map(|wanted| own.fetch(wanted))).await;
            });
        }
    }
}

/// What to fetch beside a chunk that somebody waits for.
async fn ahead(supply: &Supply, wanted: &Wanted) -> Vec<Wanted> {
    let Wanted { record, index } = wanted;
    let image = record.erofs_digest;
    if !supply.lock().ahead.contains_key(&image) {
        let (images, count) = (Arc::clone(&supply.inner.images), record.chunks.len());
        let order = tokio::task::spawn_blocking(move || images.order(&image)).await;
        let order = order.map(|order| order.map(|order| order.list()));
        let mut order = order.ok().and_then(Result::ok).unwrap_or_default();
        // This read is no use of before.
        order.pop_if(|last| last == index);
        let new = Ahead::new(&order, count);
        supply.lock().ahead.entry(image).or_insert(new);
    }
    let mut state = supply.lock();
    let next = state.ahead.get_mut(&image).map(|ahead| ahead.read(*index));
    let wanted = next.into_iter().flatten().map(|index| Wanted {
        record: Arc::clone(record),
        index: *index,
    });
    let chunks = supply.inner.images.chunks();
    wanted
        .filter(|wanted| !chunks.has(&wanted.digest()))
        .collect()
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
            let answer = supply.bring(&wanted, true).await;
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
