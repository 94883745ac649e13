//! What an image lacks, in the background.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use nix::sys::statvfs::statvfs;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::source::Wanted;
use super::{Lacking, Supply};
use crate::image::ImageRecord;

/// Chunks of one image that are under way at once.
const AT_ONCE: usize = 16;
/// Chunks of the beginning, which is short, that are under way at once.
const HEAD_AT_ONCE: usize = 8;
/// Filling leaves that much of the disk to others, in bytes.
pub const ROOM_LEFT: u64 = 32 << 20;
/// So long after a chunk that was waited for, filling stays off the link: between two reads of a program that starts.
const CALM: Duration = Duration::from_millis(200);
/// A chunk of the background gives way for so long at most: [`AT_ONCE`] of them come in that time, whoever reads. That is a fifteenth of a link of
/// 100 Mbit/s.
const GIVES_WAY: Duration = Duration::from_secs(5);
/// Until an image that does not get on is tried again: at first, and at most; twice as long each time.
const AGAIN: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(10)];

/// Until the image is complete or removed, or the service ends.
pub(super) async fn fill(supply: Supply, record: Arc<ImageRecord>) {
    let shutdown = supply.inner.shutdown.clone();
    let over = async {
        loop {
            until_complete(&supply, &record).await;
            // One that was found damaged meanwhile was left to this fill.
            let mut state = supply.lock();
            let (images, image) = (&supply.inner.images, record.erofs_digest);
            if images.record(&image).is_err() || images.chunks().missing(&record).is_empty() {
                state.fills.remove(&image);
                state.ahead.remove(&image);
                state.standing.forget(&image);
                return;
            }
        }
    };
    tokio::select! {
        () = over => {}
        () = shutdown.cancelled() => {}
    }
}

/// Fills images of which a chunk was found damaged or gone, until the service ends.
pub(super) async fn mend(supply: Supply) {
    let images = Arc::clone(&supply.inner.images);
    let Some(mut lost) = images.chunks().losing() else {
        return;
    };
    loop {
        let digest = tokio::select! {
            digest = lost.recv() => digest,
            () = supply.inner.shutdown.cancelled() => return,
        };
        let Some(digest) = digest else { return };
        for record in images.records() {
            if record.chunks.contains(&digest) {
                supply.fill(&record);
            }
        }
    }
}

async fn until_complete(supply: &Supply, record: &Arc<ImageRecord>) {
    let mut again = AGAIN[0];
    let mut told = false;
    loop {
        let Some(missing) = supply.missing(record).await else {
            return;
        };
        if missing.is_empty() {
            let images = Arc::clone(&supply.inner.images);
            let synced = tokio::task::spawn_blocking(move || images.chunks().sync()).await;
            if let Ok(Err(error)) = synced {
                // Each chunk is verified whenever it is read.
                tracing::warn!(%error, "chunks are not made durable");
            }
            tracing::info!(image = record.name, "all of the image is here");
            return;
        }
        let problem = match once(supply, record, missing).await {
            Ok(()) => {
                again = AGAIN[0];
                None
            }
            Err(problem) => Some(problem.to_string()),
        };
        if let Some(problem) = &problem
            && !std::mem::replace(&mut told, true)
        {
            tracing::warn!(image = record.name, problem, "filling the image waits");
        }
        let waits = problem.is_some();
        supply.lock().fills.insert(record.erofs_digest, problem);
        if waits {
            sleep(again).await;
            again = (again * 2).min(AGAIN[1]);
        }
    }
}

/// Fetches these chunks; the first problem that stands in the way.
async fn once(
    supply: &Supply,
    record: &Arc<ImageRecord>,
    missing: Vec<u32>,
) -> Result<(), Lacking> {
    let order = supply.inner.images.order(&record.erofs_digest);
    let used: HashSet<u32> =
        order.map_or_else(|_| HashSet::new(), |o| o.list().into_iter().collect());
    let used = &used;
    let one = |index: u32| async move {
        supply.may_fill(used.contains(&index)).await;
        if room(supply) < ROOM_LEFT {
            return Err(Lacking::NotKept {
                reason: "the disk is nearly full".to_owned(),
                full: true,
            });
        }
        let record = Arc::clone(record);
        supply.fetch(&Wanted { record, index }).await
    };
    let mut coming = futures::stream::iter(missing).map(one).buffered(AT_ONCE);
    let mut lacking = None;
    while let Some(came) = coming.next().await {
        match came {
            Ok(()) => {}
            // Somebody may have the next one.
            Err(nobody @ Lacking::Nobody(_)) => lacking = Some(nobody),
            Err(full @ Lacking::NotKept { .. }) => return Err(full),
        }
        // Removed meanwhile.
        if !supply.is_here(record) {
            break;
        }
    }
    lacking.map_or(Ok(()), Err)
}

fn room(supply: &Supply) -> u64 {
    statvfs(supply.inner.images.chunks().root()).map_or(u64::MAX, |stat| {
        stat.blocks_available().saturating_mul(stat.fragment_size())
    })
}

impl Supply {
    /// Fetches the first chunks of the order of use, at most `budget` bytes of them, whoever else wants what.
    pub async fn head(&self, record: &Arc<ImageRecord>, budget: u64) {
        let Some(missing) = self.missing(record).await else {
            return;
        };
        let used = self.inner.images.order(&record.erofs_digest);
        let used = used.map_or(0, |order| order.list().len());
        let mut left = budget;
        let head: Vec<u32> = missing
            .into_iter()
            .take(used)
            .take_while(|index| {
                let len = record.chunk_len(*index) as u64;
                let fits = len <= left;
                left = left.saturating_sub(len);
                fits
            })
            .collect();
        let one = |index: u32| {
            let record = Arc::clone(record);
            async move { self.fetch(&Wanted { record, index }).await }
        };
        let coming = futures::stream::iter(head).map(one);
        // What does not come is asked for again when it is read.
        coming
            .buffer_unordered(HEAD_AT_ONCE)
            .for_each(|_| std::future::ready(()))
            .await;
    }

    /// What an image lacks, in the order of use as far as that is known; `None`: it is not the store's any more.
    pub(super) async fn missing(&self, record: &Arc<ImageRecord>) -> Option<Vec<u32>> {
        let (images, record) = (Arc::clone(&self.inner.images), Arc::clone(record));
        let missing = move || {
            let order = images.order(&record.erofs_digest).ok()?.list();
            let mut missing = images.chunks().missing(&record);
            let mut rank = vec![u32::MAX; record.chunks.len()];
            for (place, index) in (0u32..).zip(order) {
                rank[index as usize] = place;
            }
            missing.sort_by_key(|index| (rank[*index as usize], *index));
            // Of chunks with equal bytes only the first.
            let mut seen = HashSet::new();
            missing.retain(|index| seen.insert(record.chunks[*index as usize]));
            Some(missing)
        };
        tokio::task::spawn_blocking(missing).await.ok().flatten()
    }

    fn is_here(&self, record: &ImageRecord) -> bool {
        let here = self.inner.images.record(&record.erofs_digest).is_ok();
        if !here {
            let digests = record.chunks.iter().copied().collect();
            self.inner.images.sweep(&digests);
        }
        here
    }

    /// Waits until no pod arrives, and nobody has waited for a chunk for a while. While a pod starts, only what pods `used` is worth the
    /// node's time.
    async fn may_fill(&self, used: bool) {
        let mut arriving = self.inner.arriving.subscribe();
        let mut starting = self.inner.starting.subscribe();
        loop {
            // Their senders are here.
            let _ = arriving.wait_for(|count| *count == 0).await;
            let _ = starting.wait_for(|count| used || *count == 0).await;
            // A pod that reads on and on is served first, and does not hold up the rest for ever.
            let _ = timeout(GIVES_WAY, self.calm()).await;
            if *arriving.borrow() == 0 && (used || *starting.borrow() == 0) {
                return;
            }
        }
    }

    /// Nobody waits for a chunk, nor will at once: who has read one goes on to the next.
    async fn calm(&self) {
        let mut demanded = self.inner.demanded.subscribe();
        loop {
            // Its sender is here.
            let _ = demanded.wait_for(|count| *count == 0).await;
            let calm = self.lock().demanded_at.map(|at| at + CALM);
            match calm {
                Some(calm) if calm > Instant::now() => sleep_until(calm).await,
                Some(_) | None => return,
            }
        }
    }
}
