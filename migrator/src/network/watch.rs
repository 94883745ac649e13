//! Watching a pod: the programs tell of each frame of it, for as long as somebody wants to know.
//!
//! A word for each slot says until when (`CLOCK_MONOTONIC`, in nanoseconds). It is renewed while there is a [`Watch`] and cleared with the
//! last one, so a client that is killed leaves nothing on; after a service that is killed it ends by itself, within [`LEASE`].

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use aya::maps::{MapData, RingBuf};
use migrator_ebpf::TraceEvent;
use nix::time::{ClockId, clock_gettime};
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio::task::AbortHandle;

use super::sys::{self, MappedWords};

/// How long the programs go on telling without being told to.
pub(crate) const LEASE: Duration = Duration::from_secs(2);
/// How often that is renewed.
const RENEW: Duration = Duration::from_millis(500);
/// Frames that wait for one watcher before those that follow are missed.
const WAITING: usize = 4096;

/// The watched pods of a node.
#[derive(Debug)]
pub(crate) struct Watchers {
    until: MappedWords,
    missed: MappedWords,
    list: Mutex<List>,
    begun: Arc<Notify>,
    reader: Mutex<Option<AbortHandle>>,
}

#[derive(Debug, Default)]
struct List {
    next: u64,
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    id: u64,
    slot: u16,
    events: Sender<TraceEvent>,
    /// Frames that this watcher was too slow for.
    late: Arc<AtomicU64>,
}

fn monotonic_ns() -> io::Result<u64> {
    let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
    // Five hundred years.
    Ok(u64::try_from(now.as_nanos()).unwrap_or(u64::MAX))
}

impl Watchers {
    /// Serves whoever watches, on the current tokio runtime.
    pub(crate) fn start(
        until: MappedWords,
        missed: MappedWords,
        ring: RingBuf<MapData>,
    ) -> io::Result<Arc<Self>> {
        let ring = sys::watch_ring(ring)?;
        let watchers = Arc::new(Self {
            until,
            missed,
            list: Mutex::default(),
            begun: Arc::default(),
            reader: Mutex::default(),
        });
        let reader = tokio::spawn(read(
            Arc::downgrade(&watchers),
            Arc::clone(&watchers.begun),
            ring,
        ));
        *lock(&watchers.reader) = Some(reader.abort_handle());
        Ok(watchers)
    }

    /// Begins to watch a slot.
    pub(crate) fn watch(self: &Arc<Self>, slot: u16) -> io::Result<Watch> {
        let (sender, events) = mpsc::channel(WAITING);
        let late = Arc::new(AtomicU64::new(0));
        let mut list = lock(&self.list);
        let id = list.next;
        list.next += 1;
        list.entries.push(Entry {
            id,
            slot,
            events: sender,
            late: Arc::clone(&late),
        });
        let watch = Watch {
            seen_missed: self.missed(slot),
            watchers: Arc::clone(self),
            id,
            slot,
            events,
            late,
        };
        // With the list locked, so that the last one's end does not come between.
        let renewed = self.renew(&list);
        drop(list);
        renewed?;
        self.begun.notify_one();
        Ok(watch)
    }

    /// Whether the programs tell of a slot's frames now.
    pub(crate) fn is_watched(&self, slot: u16) -> bool {
        let until = self.until.get(u32::from(slot));
        let until = until.map_or(0, |until| until.load(Ordering::Acquire));
        migrator_ebpf::is_watched(until, || monotonic_ns().unwrap_or(u64::MAX))
    }

    fn missed(&self, slot: u16) -> u64 {
        let missed = self.missed.get(u32::from(slot));
        missed.map_or(0, |missed| missed.load(Ordering::Acquire))
    }

    fn renew(&self, list: &List) -> io::Result<()> {
        let until = monotonic_ns()?.saturating_add(LEASE.as_nanos() as u64);
        for entry in &list.entries {
            if let Some(word) = self.until.get(u32::from(entry.slot)) {
                word.store(until, Ordering::Release);
            }
        }
        Ok(())
    }

    fn give_out(&self, event: TraceEvent) {
        for entry in &lock(&self.list).entries {
            if entry.slot == event.slot && entry.events.try_send(event).is_err() {
                entry.late.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn end(&self, id: u64, slot: u16) {
        let mut list = lock(&self.list);
        list.entries.retain(|entry| entry.id != id);
        if list.entries.iter().all(|entry| entry.slot != slot)
            && let Some(word) = self.until.get(u32::from(slot))
        {
            word.store(0, Ordering::Release);
        }
    }
}

impl Drop for Watchers {
    fn drop(&mut self) {
        if let Some(reader) = lock(&self.reader).take() {
            reader.abort();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change is one call: a panic elsewhere leaves it whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Hands out what the programs tell, and renews the lease while somebody listens.
async fn read(watchers: Weak<Watchers>, begun: Arc<Notify>, mut ring: AsyncFd<RingBuf<MapData>>) {
    let mut idle = true;
    loop {
        tokio::select! {
            () = begun.notified() => {}
            () = tokio::time::sleep(RENEW), if !idle => {}
            ready = ring.readable_mut() => {
                let (Ok(mut ready), Some(now)) = (ready, watchers.upgrade()) else {
                    return;
                };
                let mut left = WAITING;
                while left > 0 && let Some(item) = ready.get_inner_mut().next() {
                    if let Some(event) = TraceEvent::from_bytes(&item) {
                        now.give_out(event);
                    }
                    left -= 1;
                }
                if left > 0 {
                    ready.clear_ready();
                }
            }
        }
        let Some(now) = watchers.upgrade() else {
            return;
        };
        let list = lock(&now.list);
        idle = list.entries.is_empty();
        if let Err(error) = now.renew(&list) {
            tracing::warn!(%error, "no clock: nobody can watch a pod's frames");
        }
    }
}

/// One watcher of one pod's frames; the programs stop telling when the last one is dropped.
#[derive(Debug)]
pub struct Watch {
    watchers: Arc<Watchers>,
    id: u64,
    slot: u16,
    events: Receiver<TraceEvent>,
    late: Arc<AtomicU64>,
    seen_missed: u64,
}

impl Watch {
    /// The next frame; `None` when the service ends.
    pub async fn next(&mut self) -> Option<TraceEvent> {
        self.events.recv().await
    }

    /// Frames that were not told since the last call: the ring was full, or this watcher was too slow.
    pub fn missed(&mut self) -> u64 {
        let missed = self.watchers.missed(self.slot);
        let late = self.late.swap(0, Ordering::Relaxed);
        let new = missed.saturating_sub(self.seen_missed);
        self.seen_missed = missed;
        new + late
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.watchers.end(self.id, self.slot);
    }
}
