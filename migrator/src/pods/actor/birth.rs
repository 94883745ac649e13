//! Booting.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::{Actor, End};
use crate::api::error::chain;
use crate::api::types::{ContainerState, PodState};
use crate::pods::boot::{self, BootOrder, Parts};
use crate::pods::error::PodError;
use crate::pods::handle::{Command, Facts, PodResources};
use crate::pods::state::{self, PodFile, PodRecord};

/// Which time a pod is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Time {
    /// The first.
    First,
    /// A later one, with what it had.
    Again,
}

impl Actor {
    /// Boots; until then only `stop` is possible, which takes everything down again. A pod that is started for the first time is removed if it does
    /// not start, one that is started again stays as it was.
    pub(super) async fn boot(
        &mut self,
        order: BootOrder,
        started: Option<oneshot::Sender<Result<(), PodError>>>,
        time: Time,
    ) -> Result<Arc<PodResources>, End> {
        let mut parts = Parts::default();
        let facts = Arc::clone(&self.facts);
        let node = Arc::clone(&self.node);
        let shutdown = node.shutdown.clone();
        let mut stopper = None;
        let epoch = self.view.borrow().epoch;
        let result = {
            let booting = boot::boot(&node, &facts, &order, epoch, &mut parts);
            tokio::pin!(booting);
            loop {
                tokio::select! {
                    result = &mut booting => break result,
                    () = shutdown.cancelled() => break Err(PodError::ShuttingDown),
                    Some(command) = self.commands.recv() => match command {
                        Command::Stop { reply, .. } => {
                            stopper = Some(reply);
                            break Err(PodError::Busy {
                                pod: facts.spec.name.clone(),
                                state: PodState::Stopping,
                                verb: "go on starting",
                            });
                        }
                        Command::Start { reply, .. } => {
                            let _ = reply.send(Err(busy(&facts, "start")));
                        }
                        Command::Upgrade { reply, .. } => {
                            let _ = reply.send(Err(busy(&facts, "upgrade")));
                        }
                        Command::BeginMigration { reply, .. } => {
                            // Whoever asked may be gone; that is his business. So everywhere below.
                            let _ = reply.send(Err(busy(&facts, "migrate")));
                        }
                        Command::EndMigration { reply, .. } => {
                            let _ = reply.send(Err(busy(&facts, "end a migration of")));
                        }
                        Command::MarkInDoubt => {}
                    },
                }
            }
        };
        match result {
            Ok(resources) => {
                self.booted().await;
                let resources = Arc::new(resources);
                self.view.send_modify(|view| {
                    view.state = PodState::Running;
                    view.resources = Some(Arc::clone(&resources));
                    for container in &mut view.containers {
                        if container.state == ContainerState::Waiting {
                            container.state = ContainerState::Running;
                        }
                    }
                });
                tracing::info!(pod = self.name(), "running");
                if let Some(started) = started {
                    let _ = started.send(Ok(()));
                }
                Ok(resources)
            }
            Err(error) => {
                tracing::warn!(pod = self.name(), error = chain(&error), "not started");
                parts.undo(self.name()).await;
                order.disks.iter().for_each(|disk| disk.close());
                let reason = chain(&error);
                let waited = started.is_some();
                if time == Time::Again && stopper.is_none() {
                    if let Some(started) = started {
                        let _ = started.send(Err(error));
                    }
                    return Err(End::Dead(reason));
                }
                self.disown().await;
                let removed = self.remove_files().await;
                if let Some(started) = started {
                    // The register must be free again when the caller hears of it.
                    self.registry.remove(self.name());
                    let _ = started.send(Err(error));
                }
                if let Some(stopper) = stopper {
                    self.registry.remove(self.name());
                    let _ = stopper.send(removed);
                    return Err(End::Removed);
                }
                Err(if waited {
                    End::Removed
                } else {
                    End::Dead(reason)
                })
            }
        }
    }

    /// Writes down that the containers have been started. Were it lost, the next service would remove a
    /// pod that runs: so the pod is not announced as running before.
    async fn booted(&self) {
        let file = PodFile {
            spec: self.facts.spec.clone(),
            vm: self.facts.vm_spec.clone(),
            slot: self.facts.slot,
            booting: false,
            starting_again: false,
            record: PodRecord {
                created_unix_ms: self.facts.created_unix_ms,
                containers: self.view.borrow().containers.clone(),
            },
        };
        let dir = self.facts.dir.clone();
        let stored = tokio::task::spawn_blocking(move || state::store(&dir, &file)).await;
        if let Ok(Err(error)) = stored {
            tracing::error!(pod = self.name(), %error, "cannot note that it runs");
        }
    }
}

fn busy(facts: &Facts, verb: &'static str) -> PodError {
    PodError::Busy {
        pod: facts.spec.name.clone(),
        state: PodState::Starting,
        verb,
    }
}
