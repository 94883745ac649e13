//! What the destination's machine asks for of the pod: to check it, build it, take it or let it go.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use vm_runtime::vm::Vm;

use super::depart::end_pod;
use super::destination::Run;
use super::handoff::Handoff;
use super::prepare;
use super::steps::{blocking, blocking_journal};
use crate::api::error::chain;
use crate::migration::destination::{Input, Outcome};
use crate::network::{Port, Stage};
use crate::pods::MigrationEnd;
use crate::wire::message::{self, Offer, StateChunk};

/// How often a bridge that refused a pod's address is asked again.
const REOPEN_EVERY: Duration = Duration::from_secs(1);
/// And how many times.
const REOPEN_TIMES: u32 = 60;

impl Run {
    pub(super) fn vm(&self) -> Option<Arc<Vm>> {
        match (&self.parts, &self.found) {
            (Some((vm, _)), _) => Some(Arc::clone(vm)),
            (None, Some((_, resources))) => Some(Arc::clone(&resources.vm)),
            (None, None) => None,
        }
    }

    pub(super) fn port(&self) -> Option<Port> {
        match (&self.parts, &self.found) {
            (Some((_, port)), _) => Some(port.clone()),
            (None, Some((_, resources))) => Some(resources.port.clone()),
            (None, None) => None,
        }
    }

    pub(super) async fn check(&mut self, offer: Offer) {
        let lists = std::mem::take(&mut self.lists);
        let checked = prepare::check(&self.runner.node, &offer, lists).await;
        let checked = match checked {
            Ok((pod, images, wants)) => {
                self.shared_disks = pod.shared_disks();
                *self.prepared.lock().await = Some(pod);
                self.images = images;
                Ok(wants)
            }
            Err(refuse) => {
                tracing::info!(
                    pod = offer.pod.name,
                    from = offer.source,
                    reason = refuse.reason,
                    "refused a pod"
                );
                Err(refuse)
            }
        };
        self.runner.tell(Input::Checked(checked));
    }

    pub(super) async fn make_memory(&mut self) {
        let verify = self
            .offer
            .as_ref()
            .is_some_and(|offer| offer.options.verify);
        let made = prepare::make_memory(&self.prepared, &self.target, &self.disks, verify).await;
        self.hashes = self.target.get().and_then(|target| target.hashes.clone());
        self.runner.tell(match made {
            Ok(()) => Input::MemoryPrepared,
            Err(reason) => Input::Failed { reason },
        });
    }

    pub(super) fn prepare_vm(&mut self) {
        let building = prepare::build(Arc::clone(&self.prepared), Arc::clone(&self.built));
        let inputs = self.runner.inputs.clone();
        // Not a step that can be cancelled: what is half built is nobody's. Whoever discards the pod waits for it.
        self.runner.node.tasks.spawn(async move {
            let input = building
                .await
                .unwrap_or_else(|reason| Input::Failed { reason });
            // The machine may be done.
            let _ = inputs.send(input);
        });
    }

    /// The VM that was being built is there.
    pub(super) fn take_vm(&mut self) {
        let built = self
            .built
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some((vm, port)) = built else { return };
        let (sink, source) = tokio::io::duplex(StateChunk::MAX);
        self.loader = Some(sink);
        self.runner
            .step(prepare::load_state(Arc::clone(&vm), source));
        self.parts = Some((vm, port));
        self.watch_vm();
        self.pump();
    }

    pub(super) async fn open_network(&mut self) {
        let Some(port) = self.port() else { return };
        if port.stage() != Stage::Incoming {
            return;
        }
        let opened = port.open().await;
        // Also if the kernel has no route to it yet: other nodes' frames come by the tunnel.
        self.claim(&port);
        if let Err(error) = opened {
            // The guest runs all the same: it is nobody else's now.
            tracing::error!(
                pod = self.machine.pod(),
                error = chain(&error),
                "the network is not told that the pod is here: trying again"
            );
            let node = Arc::clone(&self.runner.node);
            // Longer than the migration, if need be.
            node.clone().tasks.spawn(async move {
                for _ in 0..REOPEN_TIMES {
                    tokio::select! {
                        () = node.shutdown.cancelled() => return,
                        () = tokio::time::sleep(REOPEN_EVERY) => {}
                    }
                    if port.reopen().await.is_ok() {
                        return;
                    }
                }
            });
        }
    }

    /// Tells the other nodes of a routed cluster.
    fn claim(&self, port: &Port) {
        if let Err(error) = port.claim(self.machine.epoch()) {
            tracing::error!(
                pod = self.machine.pod(),
                error = chain(&error),
                "other nodes are not told that it is here"
            );
        }
    }

    /// Puts the output that came with the pod into its folder.
    pub(super) fn keep_logs(&mut self, handover: &message::Handover) {
        let (prepared, agent) = (Arc::clone(&self.prepared), handover.agent.clone());
        self.keeping = Some(tokio::spawn(async move {
            let Some(store) = prepared.lock().await.as_ref().map(|pod| pod.logs()) else {
                return;
            };
            let kept = blocking(move || {
                let logs = Handoff::decode(&agent)?.logs;
                match logs.is_empty() {
                    true => Ok(()),
                    false => store.install(&logs).map_err(|error| chain(&error)),
                }
            });
            if let Err(reason) = kept.await {
                tracing::error!(reason, "the output before the move is lost");
            }
        }));
    }

    pub(super) fn adopt(&mut self, handover: Option<message::Handover>) {
        let epoch = self.machine.epoch();
        self.adopted = true;
        let settling = self.port();
        self.runner.helpers.spawn(async move {
            if let Some(port) = settling
                && port.stage() == Stage::Opened
                && let Err(error) = port.settle().await
            {
                tracing::error!(error = chain(&error), "the pod's gate does not settle");
            }
        });
        let prepared = Arc::clone(&self.prepared);
        let found = self.found.clone();
        let pager = self.pager().filter(|_| self.machine.wants_pages());
        let id = self.machine.migration().to_string();
        let shutdown = self.runner.node.shutdown.clone();
        let arriving = self.images.take_arriving();
        // Not a step: a pod that runs here is this node's, whatever else comes to an end.
        self.runner.node.tasks.spawn(async move {
            match (found, pager) {
                (Some((pod, _)), Some(pager)) => {
                    prepare::kept_when_whole(&pod, &pager, epoch, &shutdown).await;
                }
                (Some((pod, _)), None) => end_pod(&pod, MigrationEnd::Kept { epoch }).await,
                (None, pager) => {
                    let adopted = prepare::adopt(&prepared, handover, epoch, &pager, id).await;
                    if let (Some(pod), Some(pager)) = (adopted, pager) {
                        prepare::kept_when_whole(&pod, &pager, epoch, &shutdown).await;
                    }
                }
            }
            // The rest of its images may come now.
            drop(arriving);
        });
    }

    pub(super) async fn pod_failed(&mut self, reason: String) {
        if self.adopted {
            return;
        }
        tracing::error!(
            pod = self.machine.pod(),
            reason,
            "the pod is granted to this node, and its guest is gone"
        );
        if let Some((pod, _)) = &self.found {
            let epoch = pod.view().epoch;
            let end = MigrationEnd::Died { reason, epoch };
            if let Err(error) = pod.end_migration(end).await {
                tracing::error!(
                    pod = pod.name(),
                    error = chain(&error),
                    "cannot end the migration"
                );
            }
            return;
        }
        // A restarted service that found no VMM shows the pod as failed. It stays this node's, which may start it again.
        if self.runner.node.pods.get(self.machine.pod()).is_ok() {
            return;
        }
        // Before its adoption nobody else knows the pod; afterwards its own task sees the end of its VM.
        if let Some(pod) = self.prepared.lock().await.as_ref() {
            pod.keep_volumes();
        }
        if let Some(problem) = prepare::discard(&self.prepared).await {
            tracing::error!(reason = problem, "something of the pod is left behind");
        }
        self.give_back_disks().await;
        let name = self.machine.pod().to_owned();
        if let Err(reason) =
            blocking_journal(&self.runner.node, move |journal| journal.stop_owner(&name)).await
        {
            tracing::error!(reason, "the journal stays behind");
        }
    }

    pub(super) async fn discard(&mut self) {
        self.runner.steps.shutdown().await;
        let images = std::mem::take(&mut self.images);
        self.end_pager();
        self.flows_taken().await;
        self.parts = None;
        self.shared_disks = Vec::new();
        if let Some(reason) = prepare::discard(&self.prepared).await {
            tracing::error!(reason, "something of a discarded pod is left behind");
        }
        images.give_up(&self.runner.node).await;
        self.runner.tell(Input::Discarded);
    }

    pub(super) async fn finish(&mut self, outcome: Outcome) {
        let pod = self.machine.pod();
        match outcome {
            Outcome::Completed { settled } => tracing::info!(pod, settled, "a pod has arrived"),
            Outcome::Failed { reason } => tracing::warn!(pod, reason, "a pod has not arrived"),
            Outcome::PodFailed { reason } => {
                tracing::error!(pod, reason, "a pod arrived and failed")
            }
        }
        self.runner.steps.shutdown().await;
        self.runner.close().await;
    }
}
