//! The source's link and its packets: what is begun at once and reports later.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use super::depart::DIAL_DEADLINE;
use super::packets;
use super::source::Run;
use super::source_steps as steps;
use super::steps::wire_ledger;
use crate::api::error::chain;
use crate::migration::source::Input;
use crate::network::{LogItem, OnOverflow, Stage};
use crate::pods::PodResources;
use crate::wire::message::Ledger;
use crate::wire::preamble::{Shape, VERSION_FLOWS};
use crate::wire::session::{self, Session};

/// How long the report of a migration that failed waits for its packets to be back with the guest.
const BOOKS_WITHIN: Duration = Duration::from_secs(1);

/// The loss of one link, which several of its connections may notice: the machine hears of it once.
#[derive(Clone, Debug)]
pub(super) struct Loss {
    inputs: UnboundedSender<Input>,
    told: Arc<AtomicBool>,
}

impl Loss {
    pub(super) fn new(inputs: UnboundedSender<Input>) -> Self {
        Self {
            inputs,
            told: Arc::default(),
        }
    }

    /// What to tell the machine; nothing if it has been told, or has given the link up.
    pub(super) fn input(&self, reason: String) -> Option<Input> {
        (!self.told.swap(true, Ordering::SeqCst)).then_some(Input::LinkLost { reason })
    }

    pub(super) fn tell(&self, reason: String) {
        if let Some(input) = self.input(reason) {
            // The machine may be done.
            drop(self.inputs.send(input));
        }
    }

    /// The link is given up: that it ends is no news.
    fn forget(&self) {
        self.told.store(true, Ordering::SeqCst);
    }
}

impl Run {
    pub(super) fn redial(&mut self) {
        self.loss.forget();
        self.runner.link = None;
        self.urgent = None;
        self.server = None;
        self.lanes = None;
        let (node, to, addr) = (
            Arc::clone(&self.runner.node),
            self.figures.to.clone(),
            self.addr,
        );
        let shape = Shape::Resume {
            data: self.connections,
        };
        let (inputs, sessions) = (self.runner.inputs.clone(), self.dialed.clone());
        self.runner.helpers.spawn(async move {
            // The machine may be done.
            match session::dial_shape(addr, &node.tls, &to, shape, DIAL_DEADLINE).await {
                Ok(session) => drop(sessions.send(session)),
                Err(error) => {
                    let reason = chain(&error);
                    drop(inputs.send(Input::LinkLost { reason }));
                }
            }
        });
    }

    /// The link is up again: what is parked goes over the new connection from where it is not acknowledged.
    pub(super) async fn relinked(&mut self, session: Session) {
        self.attach(session, None);
        // The guest stands still: were it not granted away, nobody would dial again.
        self.server = None;
        self.wanted.clear();
        self.serve_faults();
        let Some(resources) = self.parts() else {
            return;
        };
        if matches!(resources.port.stage(), Stage::Holding | Stage::Forwarding) {
            let log = self.pump(&resources);
            if let Err(error) = resources.port.resend(log).await {
                tracing::warn!(error = chain(&error), "the packet log is not sent again");
            }
        }
    }

    /// Starts to carry the packet log over the urgent connection; returns where the log goes in.
    pub(super) fn pump(&mut self, resources: &PodResources) -> UnboundedSender<LogItem> {
        let (log, items) = unbounded_channel();
        if let Some(urgent) = self.urgent.take() {
            let (port, loss) = (resources.port.clone(), self.loss.clone());
            let news = (self.version >= VERSION_FLOWS).then(|| self.news.clone());
            self.runner.helpers.spawn(async move {
                if let Err(error) = packets::pump_out(urgent, port, items, news).await {
                    loss.tell(chain(&error));
                }
            });
        }
        log
    }

    pub(super) fn hold(&mut self) {
        let Some(resources) = self.parts() else {
            return;
        };
        resources.port.on_overflow(self.on_overflow);
        if self.on_overflow == OnOverflow::Abort {
            let (port, inputs) = (resources.port.clone(), self.runner.inputs.clone());
            self.runner.helpers.spawn(async move {
                if let Ok(Some(overflow)) = port.overflow().await {
                    let reason = overflow.to_string();
                    // The machine may be done.
                    drop(inputs.send(Input::Overflowed { reason }));
                }
            });
        }
        let log = self.pump(&resources);
        self.runner.step(async move {
            let held = resources.port.hold(log).await;
            held.map_err(|error| chain(&error)).map(|()| Input::Held)
        });
    }

    pub(super) async fn forward(&mut self) {
        self.figures.total = Some(self.figures.started.elapsed());
        let Some(resources) = self.parts() else {
            // Its VMM is gone, and with it what was parked.
            return self.runner.tell(Input::Forwarded);
        };
        let (to, epoch) = (&self.figures.to, self.machine.offered());
        if let Err(error) = resources.port.left_for(to, epoch).await {
            tracing::warn!(
                error = chain(&error),
                "other nodes are not asked to end their old way to the pod"
            );
        }
        if let Err(error) = resources.port.forward().await {
            tracing::warn!(
                error = chain(&error),
                "frames that come late are not forwarded"
            );
        }
        let (port, to) = (resources.port.clone(), self.addr.ip());
        self.runner.helpers.spawn(async move {
            // What is in the way is in the log, and the relay goes on.
            let _ = port.tunnel_to(to).await;
        });
        self.runner.step(steps::forwarded(resources));
    }

    /// The books of a pod that stays: once it has got back what was parked, or most of it.
    pub(super) async fn books_kept(&self) -> Ledger {
        let Some(resources) = self.parts() else {
            return Ledger::default();
        };
        let back = resources.port.reached(Stage::Local);
        // A guest that does not read gets its packets later.
        let _ = tokio::time::timeout(BOOKS_WITHIN, back).await;
        let Ok(ledger) = resources.port.ledger().await else {
            return Ledger::default();
        };
        let _ = self.figures.books.set(ledger);
        wire_ledger(&ledger)
    }

    pub(super) fn release(&mut self) {
        self.server = None;
        let (pod, to) = (self.pod.clone(), self.figures.to.clone());
        let resources = self.resources.take();
        let books = Arc::clone(&self.figures.books);
        let granted = self.machine.offered();
        let node = Arc::clone(&self.runner.node);
        self.runner
            .step(steps::release(resources, pod, to, books, node, granted));
    }
}
