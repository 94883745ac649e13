//! The destination's half: hears who waits for which page, asks for it, and puts in place what comes.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use vm_runtime::memory::{GuestMemory, MissingError, MissingPages};
use vm_runtime::sched::prefer_this_thread;
use vm_runtime::units::{PAGE_SIZE, PageIndex, PageRange};
use vm_runtime::vm::VmRam;

use super::histogram::Histogram;
use super::link::FaultLink;
use super::missing::{MissingSet, SetError};
use super::waits::Waits;
use crate::memory::verify::hash;
use crate::wire::conn::Connection;
use crate::wire::fault::Fault;
use crate::wire::message::FaultFigures;

/// Threads that hear who waits. Two: while one asks, the other hears.
const THREADS: usize = 2;
/// How often a thread that hears nothing looks whether it is to end.
const LOOK: Duration = Duration::from_millis(200);

/// Post-copy does not work.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// The kernel refused.
    #[error("the guest's missing pages cannot be waited for")]
    Missing(#[from] MissingError),
    /// What is missing cannot be noted.
    #[error("what the guest lacks cannot be noted")]
    Set(#[from] SetError),
    /// The RAM file, a thread or a connection failed.
    #[error("cannot {step}")]
    System {
        /// What was tried.
        step: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// The missing pages of one guest. Dropped, it leaves them missing: whoever touches one waits for the next pager.
#[derive(Debug)]
pub struct Pager {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    pages: MissingPages,
    memory: Arc<GuestMemory>,
    set: MissingSet,
    links: Mutex<Vec<Arc<FaultLink>>>,
    waiting: Waits,
    waits: Histogram,
    wait_count: AtomicU64,
    /// What the source's pages must hash to, if the migration verifies.
    hashes: OnceLock<Vec<u64>>,
    mismatched: AtomicU64,
    /// Pages that were missing when it began to be counted, and when that was.
    began: OnceLock<(u64, Instant)>,
    left: watch::Sender<u64>,
    ended: watch::Sender<bool>,
    ending: AtomicBool,
}

impl Pager {
    /// Begins for a guest that does not run yet: nothing is missing but what [`Self::mark`] makes so, and a hole is filled with
    /// zeros when it is touched. `file` keeps what is missing for a later service.
    ///
    /// # Errors
    /// See [`PagerError`].
    pub fn begin(ram: &VmRam, file: &Path) -> Result<Self, PagerError> {
        let set = MissingSet::create(file, ram.memory().pages())?;
        Self::start(ram, set)
    }

    /// Goes on with what an earlier service left; `None` if it left nothing.
    ///
    /// # Errors
    /// See [`PagerError`].
    pub fn resume(ram: &VmRam, file: &Path) -> Result<Option<Self>, PagerError> {
        let Some(set) = MissingSet::load(file, ram.memory().pages())? else {
            return Ok(None);
        };
        let pager = Self::start(ram, set)?;
        pager.shared.pages.wake()?;
        Ok(Some(pager))
    }

    fn start(ram: &VmRam, set: MissingSet) -> Result<Self, PagerError> {
        let memory = ram.memory();
        let pages = MissingPages::start(ram.uffd(), ram.pid(), &memory)?;
        let (left, _) = watch::channel(set.left());
        let shared = Arc::new(Shared {
            pages,
            memory,
            set,
            links: Mutex::default(),
            waiting: Waits::default(),
            waits: Histogram::new(),
            wait_count: AtomicU64::new(0),
            hashes: OnceLock::new(),
            mismatched: AtomicU64::new(0),
            began: OnceLock::new(),
            left,
            ended: watch::Sender::new(false),
            ending: AtomicBool::new(false),
        });
        // From here on an error ends the threads that have begun.
        let pager = Self { shared };
        for index in 0..THREADS {
            let shared = Arc::clone(&pager.shared);
            spawn("faults", move || shared.hear(index))?;
        }
        Ok(pager)
    }

    /// Makes pages missing that are not there or too old. Not beside [`Self::place`] of the same pages, and before the guest can
    /// touch them.
    ///
    /// # Errors
    /// See [`PagerError`].
    pub fn mark(&self, ranges: &[PageRange]) -> Result<(), PagerError> {
        let shared = &self.shared;
        for range in ranges {
            shared.set.insert(*range);
        }
        // Known as missing before it is: a hole that is not in the set is filled with zeros.
        shared.set.store()?;
        for range in ranges {
            shared
                .memory
                .punch(*range)
                .map_err(|source| system("make the guest's old pages missing", source))?;
        }
        shared.left.send_replace(shared.set.left());
        Ok(())
    }

    /// Asks over these connections from now on, also for what was asked for before.
    ///
    /// # Errors
    /// See [`PagerError`].
    pub fn attach(&self, connections: Vec<Connection<Fault>>) -> Result<(), PagerError> {
        let mut links = Vec::new();
        for connection in connections {
            let link = FaultLink::new(connection)
                .map_err(|source| system("use a fault connection", source))?;
            links.push(Arc::new(link));
        }
        for link in &links {
            let (shared, link) = (Arc::clone(&self.shared), Arc::clone(link));
            spawn("pages", move || shared.take(&link))?;
        }
        for old in std::mem::replace(&mut *lock(&self.shared.links), links) {
            old.close();
        }
        self.shared.set.forget_asked();
        // Whoever waits is heard of again.
        self.shared.pages.wake()?;
        Ok(())
    }

    /// What each page of the source must hash to: a page that does not is asked for again.
    pub fn expect(&self, hashes: Vec<u64>) {
        // Said once a migration.
        let _ = self.shared.hashes.set(hashes);
    }

    /// The guest runs from here on: figures begin.
    pub fn resumed(&self) {
        let now = (self.shared.set.left(), Instant::now());
        let _ = self.shared.began.set(now);
    }

    /// Puts whole pages in place where they are missing.
    ///
    /// # Errors
    /// See [`PagerError`].
    pub fn place(&self, first: PageIndex, raw: &[u8]) -> Result<(), PagerError> {
        self.shared.place(first, raw)
    }

    /// As [`Self::place`], with zeros.
    ///
    /// # Errors
    /// See [`PagerError`].
    pub fn place_zeros(&self, range: PageRange) -> Result<(), PagerError> {
        self.shared.place_zeros(range)
    }

    /// The missing pages, as words of 64, lowest bit first.
    pub fn missing(&self) -> Vec<u64> {
        self.shared.set.words()
    }

    /// Whether a page is missing.
    pub fn is_missing(&self, page: PageIndex) -> bool {
        self.shared.set.contains(page)
    }

    /// How many pages are missing.
    pub fn left(&self) -> u64 {
        self.shared.set.left()
    }

    /// Waits until none is missing.
    pub async fn complete(&self) {
        let mut left = self.shared.left.subscribe();
        // The sender lives as long as we do.
        let _ = left.wait_for(|left| *left == 0).await;
    }

    /// Waits until [`Self::end`] is done: from then on the guest's memory is that of any guest.
    pub async fn ended(&self) {
        let mut ended = self.shared.ended.subscribe();
        // The sender lives as long as we do.
        let _ = ended.wait_for(|ended| *ended).await;
    }

    /// What it cost the guest so far.
    pub fn figures(&self) -> FaultFigures {
        let shared = &self.shared;
        let (missing, took_us) = shared.began.get().map_or((0, 0), |(missing, began)| {
            (*missing, began.elapsed().as_micros() as u64)
        });
        FaultFigures {
            missing,
            count: shared.wait_count.load(Ordering::Relaxed),
            max_us: shared.waits.max_us(),
            buckets: shared.waits.buckets(),
            took_us,
            mismatched: shared.mismatched.load(Ordering::Relaxed),
        }
    }

    /// Ends it: nothing is missing, or the guest is gone. Nobody waits any more, and the file is removed. The connections end with
    /// the drop: the source must not take this for the loss of the link.
    pub fn end(&self) {
        self.shared.ending.store(true, Ordering::SeqCst);
        self.shared.pages.end();
        self.shared.ended.send_replace(true);
        self.shared.set.remove_file();
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.shared.stop();
    }
}

impl Shared {
    fn stop(&self) {
        self.ending.store(true, Ordering::SeqCst);
        for link in lock(&self.links).drain(..) {
            link.close();
        }
    }

    /// A thread: who waits for which page.
    fn hear(&self, index: usize) {
        // Without the right to it, the guest waits a little longer.
        let _ = prefer_this_thread();
        let mut pages = Vec::new();
        while !self.ending.load(Ordering::SeqCst) {
            pages.clear();
            let heard = self.pages.wait(LOOK, &mut pages);
            let heard = heard.map_err(PagerError::from);
            let asked =
                heard.and_then(|()| pages.iter().try_for_each(|page| self.wanted(index, *page)));
            match asked {
                Ok(()) => {}
                Err(PagerError::Missing(MissingError::Gone { .. })) => return,
                Err(error) => {
                    // The guest waits, and is heard of again with the next link.
                    tracing::error!(
                        error = crate::api::error::chain(&error),
                        "a page is not asked for"
                    );
                    thread::sleep(LOOK);
                }
            }
        }
    }

    /// Somebody waits for a page.
    fn wanted(&self, index: usize, page: PageIndex) -> Result<(), PagerError> {
        let one = PageRange::new(page.0, page.0 + 1);
        if !self.set.contains(page) {
            // Zero at the source, and thus a hole; or placed in this moment, and thus no hole.
            self.pages.place_zeros(one)?;
            return Ok(());
        }
        let is_missing = || self.set.contains(page);
        if self
            .waiting
            .begin(page, is_missing, |wait| self.count(wait))
            && self.set.ask(page)
        {
            self.ask(index, page);
        }
        Ok(())
    }

    fn ask(&self, index: usize, page: PageIndex) {
        let link = {
            let links = lock(&self.links);
            match links.len() {
                0 => return,
                n => Arc::clone(&links[index % n]),
            }
        };
        if let Err(error) = link.send(&Fault::Request { page }) {
            // Its reader sees the same; what was asked for is asked for again over the next link.
            tracing::debug!(
                error = crate::api::error::chain(&error),
                "a fault connection ended"
            );
            link.close();
        }
    }

    /// A thread: the answers of one connection.
    fn take(&self, link: &FaultLink) {
        let _ = prefer_this_thread();
        loop {
            let (first, raw) = match link.next() {
                Ok(Fault::Pages { first, raw }) => (first, raw),
                Ok(Fault::Request { .. }) => {
                    tracing::warn!("the source asks for a page: not one of ours");
                    return link.close();
                }
                Err(error) => {
                    tracing::debug!(
                        error = crate::api::error::chain(&error),
                        "a fault connection ended"
                    );
                    return link.close();
                }
            };
            if let Err(error) = self.place(first, &raw) {
                tracing::error!(
                    error = crate::api::error::chain(&error),
                    "a page is not put in place"
                );
                return link.close();
            }
        }
    }

    fn place(&self, first: PageIndex, raw: &[u8]) -> Result<(), PagerError> {
        let Some(hashes) = self.hashes.get() else {
            self.pages.place(first, raw)?;
            let count = (raw.len() / PAGE_SIZE) as u64;
            return self.placed(PageRange::new(first.0, first.0 + count));
        };
        for (page, content) in (first.0..).zip(raw.chunks_exact(PAGE_SIZE)) {
            let one = PageRange::new(page, page + 1);
            if hashes.get(page as usize) == Some(&hash(content)) {
                self.pages.place(PageIndex(page), content)?;
                self.placed(one)?;
            } else if self.set.contains(PageIndex(page)) {
                self.mismatched.fetch_add(1, Ordering::Relaxed);
                tracing::error!(page, "a page is not the source's: asked for again");
                self.ask(0, PageIndex(page));
            }
        }
        Ok(())
    }

    fn place_zeros(&self, range: PageRange) -> Result<(), PagerError> {
        self.pages.place_zeros(range)?;
        self.placed(range)
    }

    /// Pages are in place, and whoever waited for them goes on.
    fn placed(&self, range: PageRange) -> Result<(), PagerError> {
        let leave = || self.set.remove(range);
        let left = self.waiting.placed(range, leave, |wait| self.count(wait))?;
        if left > 0 {
            self.left.send_replace(self.set.left());
        }
        Ok(())
    }

    fn count(&self, wait: Duration) {
        self.waits.add(wait.as_micros() as u64);
        self.wait_count.fetch_add(1, Ordering::Relaxed);
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), PagerError> {
    let builder = thread::Builder::new().name(format!("postcopy {name}"));
    builder
        .spawn(work)
        .map(drop)
        .map_err(|source| system("start a thread for missing pages", source))
}

fn system(step: &'static str, source: io::Error) -> PagerError {
    PagerError::System { step, source }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change is one call on the value.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
