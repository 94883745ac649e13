//! The actor of one pod: it alone changes the pod's state, VM and files, and so nothing races.
//!
//! [`birth`] is its part until the guest runs, [`life`] its part as long as there is a VM, [`upgrade`] the replacing of that.

mod birth;
mod life;
mod upgrade;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use vm_runtime::units::Epoch;

use super::again;
use super::boot::BootOrder;
use super::console;
use super::error::PodError;
use super::handle::{Command, Facts, MigrationEnd, PodHandle, PodResources, View, waiting};
use super::{PodRegistry, Reservation};
use crate::api::error::chain;
use crate::api::types::{ContainerState, ContainerStatus, PodState};
use crate::daemon::node::Node;
use birth::Time;

/// The exit code of a container whose VM ended under it: as by SIGKILL.
const KILLED: i32 = 128 + 9;

/// How the pod comes to this node.
pub(super) enum Birth {
    /// It is booted. The result goes to whoever asked; a failure that nobody waits for is kept and shown.
    Boot {
        order: BootOrder,
        started: Option<oneshot::Sender<Result<(), PodError>>>,
    },
    /// It runs already.
    Running(Arc<PodResources>),
    /// A migration that an earlier service began is not over: the driver ends it.
    Migrating {
        resources: Arc<PodResources>,
        migration: String,
        in_doubt: bool,
    },
    /// Its VM ended while no service ran.
    Dead {
        reason: String,
        /// The migration that has handed the right to run it over, where it is not known what became of that.
        in_doubt: Option<String>,
    },
}

impl Birth {
    /// One whose VM is gone, and which is this node's.
    pub(super) fn dead(reason: &str) -> Self {
        Self::Dead {
            reason: reason.to_owned(),
            in_doubt: None,
        }
    }
}

/// Starts the actor of a pod and enters it into the register.
pub(super) fn spawn(
    node: &Arc<Node>,
    reservation: Reservation,
    facts: Facts,
    epoch: Epoch,
    containers: Option<Vec<ContainerStatus>>,
    birth: Birth,
) -> PodHandle {
    let facts = Arc::new(facts);
    let (commands, receiver) = mpsc::channel(8);
    let state = match &birth {
        Birth::Boot { .. } => PodState::Starting,
        Birth::Running(_) => PodState::Running,
        Birth::Migrating { in_doubt: true, .. } => PodState::InDoubt,
        Birth::Migrating { .. } => PodState::Migrating,
        Birth::Dead {
            in_doubt: Some(_), ..
        } => PodState::InDoubt,
        Birth::Dead { .. } => PodState::Failed,
    };
    let (resources, migration) = match &birth {
        Birth::Running(resources) => (Some(Arc::clone(resources)), None),
        Birth::Migrating {
            resources,
            migration,
            ..
        } => (Some(Arc::clone(resources)), Some(migration.clone())),
        Birth::Dead { in_doubt, .. } => (None, in_doubt.clone()),
        Birth::Boot { .. } => (None, None),
    };
    let (view, watcher) = watch::channel(View {
        state,
        reason: match &birth {
            Birth::Dead { reason, .. } => Some(reason.clone()),
            Birth::Boot { .. } | Birth::Running(_) | Birth::Migrating { .. } => None,
        },
        containers: containers.unwrap_or_else(|| waiting(&facts.spec)),
        epoch,
        migration,
        resources,
    });
    let handle = PodHandle {
        facts: Arc::clone(&facts),
        view: watcher,
        commands,
    };
    reservation.become_pod(handle.clone());
    let actor = Actor {
        node: Arc::clone(node),
        registry: node.pods.clone(),
        facts,
        view,
        commands: receiver,
        owned: true,
    };
    node.tasks.spawn(actor.run(birth));
    handle
}

struct Actor {
    node: Arc<Node>,
    registry: PodRegistry,
    facts: Arc<Facts>,
    view: watch::Sender<View>,
    commands: mpsc::Receiver<Command>,
    /// Whether the journal still says that this node may run it.
    owned: bool,
}

/// How a running pod's part of the actor ended.
enum End {
    /// The VM is gone; the pod stays, to be looked at.
    Dead(String),
    /// Nothing of it is left here.
    Removed,
    /// The service ends, the pod goes on.
    Left,
}

impl Actor {
    async fn run(mut self, birth: Birth) {
        let mut end = match birth {
            Birth::Boot { order, started } => match self.boot(order, started, Time::First).await {
                Ok(resources) => self.live(resources).await,
                Err(end) => end,
            },
            Birth::Running(resources) | Birth::Migrating { resources, .. } => {
                self.live(resources).await
            }
            Birth::Dead {
                reason,
                in_doubt: None,
            } => End::Dead(reason),
            Birth::Dead { reason, .. } => self.doubt(reason).await,
        };
        loop {
            end = match end {
                End::Dead(reason) => match self.dead(reason).await {
                    Ok(resources) => self.live(resources).await,
                    Err(end) => end,
                },
                End::Removed => return self.registry.remove(self.name()),
                End::Left => return,
            }
        }
    }

    fn name(&self) -> &str {
        &self.facts.spec.name
    }

    fn busy(&self, verb: &'static str) -> PodError {
        PodError::Busy {
            pod: self.name().to_owned(),
            state: self.view.borrow().state,
            verb,
        }
    }

    /// Answers that it cannot be done now.
    fn refuse(&self, command: Command) {
        match command {
            Command::Stop { reply, .. } => {
                let _ = reply.send(Err(self.busy("stop")));
            }
            Command::Upgrade { reply, .. } => {
                let _ = reply.send(Err(self.busy("upgrade")));
            }
            Command::BeginMigration { reply, .. } => {
                let _ = reply.send(Err(self.busy("migrate")));
            }
            Command::EndMigration { reply, .. } => {
                let _ = reply.send(Err(self.busy("end a migration of")));
            }
            Command::Start { reply, .. } => {
                let _ = reply.send(Err(self.busy("start")));
            }
            Command::MarkInDoubt => {}
        }
    }

    /// Keeps the file of the guest's console small.
    async fn bound_console(&self) {
        let dir = self.facts.dir.clone();
        let bounded = tokio::task::spawn_blocking(move || console::bound(&dir)).await;
        if let Ok(Err(error)) = bounded {
            tracing::warn!(pod = self.name(), %error, "cannot cut the file of its console");
        }
    }

    /// Shows a pod without VM until it is removed, or started again.
    async fn dead(&mut self, reason: String) -> Result<Arc<PodResources>, End> {
        // What it printed last, or while no service ran.
        self.bound_console().await;
        self.view.send_modify(|view| {
            view.state = PodState::Failed;
            view.reason = Some(reason);
            view.resources = None;
            view.migration = None;
            for container in &mut view.containers {
                if container.state == ContainerState::Running {
                    container.state = ContainerState::Exited { code: KILLED };
                }
            }
        });
        loop {
            let command = tokio::select! {
                command = self.commands.recv() => command,
                () = self.node.shutdown.cancelled() => return Err(End::Left),
            };
            match command {
                None => return Err(End::Left),
                Some(Command::Stop { reply, .. }) => {
                    let result = self.bury().await;
                    self.registry.remove(self.name());
                    let _ = reply.send(result);
                    return Err(End::Removed);
                }
                Some(Command::Start { deadline, reply }) => {
                    return self.start_again(deadline, reply).await;
                }
                // Its VM had ended, and the right to run it had been given away before.
                Some(Command::EndMigration {
                    end: MigrationEnd::MovedAway { to },
                    reply,
                }) => return Err(self.moved_away(&to, reply).await),
                Some(Command::EndMigration {
                    end: MigrationEnd::Died { reason, epoch },
                    reply,
                }) => {
                    self.view.send_modify(|view| {
                        view.reason = Some(reason);
                        view.epoch = epoch;
                    });
                    let _ = reply.send(Ok(()));
                }
                Some(other) => self.refuse(other),
            }
        }
    }

    /// Shows a pod without VM that another node may run, until its migration's driver knows. Nothing is removed before: its disks may be the only ones.
    async fn doubt(&mut self, reason: String) -> End {
        loop {
            let command = tokio::select! {
                command = self.commands.recv() => command,
                () = self.node.shutdown.cancelled() => return End::Left,
            };
            match command {
                None => return End::Left,
                Some(Command::EndMigration { end, reply }) => {
                    let epoch = match end {
                        MigrationEnd::MovedAway { to } => return self.moved_away(&to, reply).await,
                        MigrationEnd::Kept { epoch } | MigrationEnd::Died { epoch, .. } => epoch,
                    };
                    self.view.send_modify(|view| view.epoch = epoch);
                    let _ = reply.send(Ok(()));
                    return End::Dead(reason);
                }
                Some(other) => self.refuse(other),
            }
        }
    }

    /// Removes what is left of a pod that another node has. Its VM is gone.
    async fn moved_away(&mut self, to: &str, reply: oneshot::Sender<Result<(), PodError>>) -> End {
        tracing::info!(pod = self.name(), to, "moved away");
        let result = self.remove_files().await;
        self.registry.remove(self.name());
        let _ = reply.send(result);
        End::Removed
    }

    /// Boots a pod without VM again. It stays without one if that fails.
    async fn start_again(
        &mut self,
        deadline: Duration,
        reply: oneshot::Sender<Result<(), PodError>>,
    ) -> Result<Arc<PodResources>, End> {
        let (epoch, reason) = {
            let view = self.view.borrow();
            (view.epoch, view.reason.clone().unwrap_or_default())
        };
        let order = match again::prepare(&self.node, &self.facts, epoch, deadline).await {
            Ok(order) => order,
            Err(error) => {
                let _ = reply.send(Err(error));
                return Err(End::Dead(reason));
            }
        };
        tracing::info!(pod = self.name(), "it is started again");
        self.view.send_modify(|view| {
            view.state = PodState::Starting;
            view.reason = None;
            view.containers = waiting(&self.facts.spec);
        });
        self.boot(order, Some(reply), Time::Again).await
    }

    /// Removes a pod that is shown as failed. Its VM is gone, or does not answer: none may stay without its files.
    async fn bury(&mut self) -> Result<(), PodError> {
        let ended = again::end_vm(&self.facts.dir).await;
        ended.map_err(|e| PodError::step(self.name(), "end its VM", e))?;
        self.disown().await;
        self.remove_files().await
    }

    /// Gives the right to run up, once no VM is left.
    async fn disown(&mut self) {
        if !std::mem::take(&mut self.owned) {
            return;
        }
        let journal = Arc::clone(&self.node.journal);
        let name = self.name().to_owned();
        let done = tokio::task::spawn_blocking(move || journal.stop_owner(&name)).await;
        if let Ok(Err(error)) = done {
            // The next pod of this name gets a higher epoch all the same.
            tracing::warn!(
                pod = self.name(),
                error = chain(&error),
                "cannot note that it was stopped"
            );
        }
    }

    /// Its VM is gone: what it has of shared storage is given back, and what it has here is removed.
    async fn remove_files(&self) -> Result<(), PodError> {
        let epoch = self.view.borrow().epoch;
        super::run::give_back(&self.node, &self.facts.vm_spec, epoch).await;
        super::run::remove_folder(&self.facts.dir).await
    }
}
