//! The source's half: a thread a connection answers who waits for a page of the stopped guest.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;

use bytes::Bytes;
use vm_runtime::memory::MemoryView;
use vm_runtime::sched::prefer_this_thread;
use vm_runtime::units::{PAGE_SIZE, PageIndex, PageRange};

use super::link::FaultLink;
use super::push::PushQueue;
use crate::wire::conn::{Connection, LinkError};
use crate::wire::fault::Fault;

/// Answers until its connections end. Dropping it ends them.
#[derive(Debug)]
pub struct PageServer {
    shared: Arc<Shared>,
    links: Vec<Arc<FaultLink>>,
}

#[derive(Debug)]
struct Shared {
    view: MemoryView,
    pages: u64,
    queue: OnceLock<Arc<PushQueue>>,
    /// It ends by itself: nothing is lost.
    ending: AtomicBool,
    served: AtomicU64,
}

impl PageServer {
    /// Answers with pages of `view`, the memory of a guest that stands still. `lost` is called, once a connection, with the
    /// reason of its end; not after the drop.
    ///
    /// # Errors
    /// A thread cannot be started, or a connection not be used.
    pub fn start(
        view: MemoryView,
        connections: Vec<Connection<Fault>>,
        lost: impl Fn(LinkError) + Clone + Send + 'static,
    ) -> io::Result<Self> {
        let pages = view.pages();
        let shared = Arc::new(Shared {
            view,
            pages,
            queue: OnceLock::new(),
            ending: AtomicBool::new(false),
            served: AtomicU64::new(0),
        });
        let mut server = Self {
            shared,
            links: Vec::new(),
        };
        for connection in connections {
            let link = Arc::new(FaultLink::new(connection)?);
            server.links.push(Arc::clone(&link));
            let (shared, lost) = (Arc::clone(&server.shared), lost.clone());
            let builder = thread::Builder::new().name("postcopy serve".to_owned());
            builder.spawn(move || {
                let error = shared.serve(&link);
                if !shared.ending.load(Ordering::SeqCst) {
                    lost(error);
                }
            })?;
        }
        Ok(server)
    }

    /// What is pushed from now on: a page that somebody waited for is not pushed as well, and what lies around it goes next.
    pub fn set_queue(&self, queue: Arc<PushQueue>) {
        // Once a link.
        let _ = self.shared.queue.set(queue);
    }

    /// Pages that were asked for and sent.
    pub fn served(&self) -> u64 {
        self.shared.served.load(Ordering::Relaxed)
    }
}

impl Drop for PageServer {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::SeqCst);
        for link in &self.links {
            link.close();
        }
    }
}

impl Shared {
    fn serve(&self, link: &FaultLink) -> LinkError {
        // Without the right to it, the guest waits a little longer.
        let _ = prefer_this_thread();
        loop {
            let answered = link.next().and_then(|message| match message {
                Fault::Request { page } if page.0 < self.pages => self.answer(link, page),
                // Beyond the guest's memory, or no request at all: not one of ours.
                Fault::Request { .. } | Fault::Pages { .. } => Err(LinkError::Closed),
            });
            if let Err(error) = answered {
                link.close();
                return error;
            }
        }
    }

    /// The page alone first: somebody waits for it. Then what follows it, which is likely to be touched next.
    fn answer(&self, link: &FaultLink, page: PageIndex) -> Result<(), LinkError> {
        let queue = self.queue.get();
        let following = queue.and_then(|queue| queue.wanted(page));
        self.send(link, PageRange::new(page.0, page.0 + 1))?;
        self.served.fetch_add(1, Ordering::Relaxed);
        match following {
            Some(range) => self.send(link, range),
            None => Ok(()),
        }
    }

    fn send(&self, link: &FaultLink, range: PageRange) -> Result<(), LinkError> {
        let mut raw = vec![0; range.len() as usize * PAGE_SIZE];
        let (chunks, _) = raw.as_chunks_mut::<PAGE_SIZE>();
        for (page, chunk) in (range.start.0..).zip(chunks) {
            self.view.copy(PageIndex(page), chunk)?;
        }
        let (first, raw) = (range.start, Bytes::from(raw));
        link.send(&Fault::Pages { first, raw })
    }
}
