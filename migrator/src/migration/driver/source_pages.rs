//! Post-copy at the source: what the destination lacks, who waits for it, and how the rest is pushed.

use std::sync::Arc;

use vm_runtime::memory::MemoryView;
use vm_runtime::units::PageRange;

use super::source::Run;
use super::steps::blocking;
use crate::api::error::chain;
use crate::memory::pageset::PageSet;
use crate::memory::postcopy::{PageServer, PushQueue};
use crate::memory::track::Tracking;
use crate::migration::source::Input;
use crate::wire::control::ControlSender;
use crate::wire::message::{PageBits, StaleEnd};

impl Run {
    /// The stopped guest's pages for who waits for them.
    pub(super) fn serve_faults(&mut self) {
        let connections = std::mem::take(&mut self.faults);
        let Some(resources) = self.parts().filter(|_| !connections.is_empty()) else {
            return;
        };
        let loss = self.loss.clone();
        let lost = move |error| loss.tell(chain(&error));
        let served = MemoryView::new(&resources.vm.memory())
            .and_then(|view| PageServer::start(view, connections, lost));
        match served {
            Ok(server) => self.server = Some(Arc::new(server)),
            Err(error) => self.loss.tell(chain(&error)),
        }
    }

    /// Tells the destination which pages it will lack.
    pub(super) fn send_stale(&mut self, last: bool) {
        let Some(control) = self.control() else {
            return;
        };
        let pages = self.pod.spec().memory.pages();
        self.runner
            .step(send_stale(control, self.tracking.clone(), pages, last));
    }

    /// Sends everything that nobody waits for.
    pub(super) fn push_pages(&mut self) {
        let pages = self.pod.spec().memory.pages();
        let classes = match std::mem::take(&mut self.wanted) {
            // It was told nothing: the destination lacks what is pending here.
            none if none.is_empty() => self.tracking.by_heat(),
            wanted => {
                // What was written last is still what is wanted first.
                let mut set = PageSet::new(pages);
                wanted.iter().for_each(|range| set.insert(*range));
                let hot = self.tracking.by_heat();
                let mut classes: Vec<_> = hot.iter().map(|c| set.intersection(c)).collect();
                classes.push(wanted);
                classes
            }
        };
        let queue = Arc::new(PushQueue::new(pages, &classes));
        self.queue = Some(Arc::clone(&queue));
        if let Some(server) = &self.server {
            server.set_queue(Arc::clone(&queue));
        }
        if let Some(sender) = self.sender() {
            let loss = self.loss.clone();
            self.runner.helpers.spawn(async move {
                // What is left, the destination says over the next link.
                if let Err(error) = sender.push(&queue).await {
                    loss.tell(chain(&error));
                }
            });
        }
    }

    /// The destination says what its guest lacks.
    pub(super) fn take_wanted(&mut self, bits: &PageBits) {
        if bits.end() > self.pod.spec().memory.pages().next_multiple_of(64) {
            tracing::warn!(
                pod = self.pod.name(),
                "the destination lacks pages that the guest does not have"
            );
            return;
        }
        self.wanted.extend(bits.ranges());
    }
}

async fn send_stale(
    control: ControlSender,
    tracking: Tracking,
    pages: u64,
    last: bool,
) -> Result<Input, String> {
    let (words, left) = blocking(move || {
        let ranges: Vec<PageRange> = match last {
            // The rest is missing already.
            true => tracking.scan_ranges().map_err(|error| chain(&error))?.0,
            false => tracking.pending_ranges(),
        };
        let mut set = PageSet::new(pages);
        ranges.iter().for_each(|range| set.insert(*range));
        Ok((set.words().to_vec(), tracking.pending()))
    })
    .await?;
    let lost = |error| chain(&error);
    for bits in PageBits::of(&words) {
        control.send(bits).await.map_err(lost)?;
    }
    control.send(StaleEnd { last }).await.map_err(lost)?;
    Ok(Input::StaleSent { last, pages: left })
}
