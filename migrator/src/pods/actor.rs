//! The actor of one pod: it alone changes the pod's state, VM and files, and so nothing races.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{broadcast, mpsc, oneshot, watch};
use vm_runtime::agent_client::{AgentClient, Event};
use vm_runtime::units::Epoch;
use vm_runtime::vm::VmExit;

use super::boot::{self, BootOrder, Parts};
use super::error::PodError;
use super::handle::{Command, Facts, MigrationEnd, PodHandle, PodResources, View, waiting};
use super::{PodRegistry, Reservation};
use crate::api::error::chain;
use crate::api::types::{ContainerState, ContainerStatus, PodState};
use crate::daemon::node::Node;

/// What the agent may take beyond the containers' grace period.
const STOP_MARGIN: Duration = Duration::from_secs(10);

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
    Dead(String),
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
        Birth::Dead(_) => PodState::Failed,
    };
    let (resources, migration) = match &birth {
        Birth::Running(resources) => (Some(Arc::clone(resources)), None),
        Birth::Migrating {
            resources,
            migration,
            ..
        } => (Some(Arc::clone(resources)), Some(migration.clone())),
        Birth::Boot { .. } | Birth::Dead(_) => (None, None),
    };
    let (view, watcher) = watch::channel(View {
        state,
        reason: match &birth {
            Birth::Dead(reason) => Some(reason.clone()),
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
        let end = match birth {
            Birth::Boot { order, started } => match self.boot(order, started).await {
                Ok(resources) => self.live(resources).await,
                Err(end) => end,
            },
            Birth::Running(resources) | Birth::Migrating { resources, .. } => {
                self.live(resources).await
            }
            Birth::Dead(reason) => End::Dead(reason),
        };
        let end = match end {
            End::Dead(reason) => self.dead(reason).await,
            End::Removed | End::Left => end,
        };
        match end {
            End::Removed => self.registry.remove(self.name()),
            End::Left | End::Dead(_) => {}
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

    /// Boots; until then only `stop` is possible, which takes everything down again.
    async fn boot(
        &mut self,
        order: BootOrder,
        started: Option<oneshot::Sender<Result<(), PodError>>>,
    ) -> Result<Arc<PodResources>, End> {
        let mut parts = Parts::default();
        let facts = Arc::clone(&self.facts);
        let node = Arc::clone(&self.node);
        let shutdown = node.shutdown.clone();
        let mut stopper = None;
        let result = {
            let booting = boot::boot(&node, &facts, &order, &mut parts);
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
                let reason = chain(&error);
                let waited = started.is_some();
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

    /// Serves a pod that has a VM.
    async fn live(&mut self, resources: Arc<PodResources>) -> End {
        let mut agent = resources.agent.subscribe();
        agent.mark_changed();
        let mut events: Option<broadcast::Receiver<Event>> = None;
        loop {
            let migrating = self.view.borrow().migration.is_some();
            let vm = Arc::clone(&resources.vm);
            tokio::select! {
                // Commands first: what a client was promised comes before news.
                biased;
                () = self.node.shutdown.cancelled() => return End::Left,
                command = self.commands.recv() => {
                    let Some(command) = command else { return End::Left };
                    if let Some(end) = self.command(command, &resources).await {
                        return end;
                    }
                }
                // During a migration the VM's end is the driver's to judge.
                exit = vm.wait_exit(), if !migrating => {
                    return self.died(exit.ok(), &resources).await;
                }
                changed = agent.changed() => {
                    let client = agent.borrow_and_update().clone();
                    if let (Ok(()), Some(client)) = (changed, client) {
                        events = Some(client.events());
                        self.refresh(&client).await;
                    }
                }
                event = next(&mut events), if events.is_some() => match event {
                    Ok(event) => self.event(event),
                    // Some were missed: ask for the whole.
                    Err(broadcast::error::RecvError::Lagged(_)) => {
                        if let Some(client) = resources.agent.get() {
                            self.refresh(&client).await;
                        }
                    }
                    Err(broadcast::error::RecvError::Closed) => events = None,
                },
            }
        }
    }

    async fn command(&mut self, command: Command, resources: &Arc<PodResources>) -> Option<End> {
        match command {
            Command::Stop { grace, reply } => {
                if self.view.borrow().migration.is_some() {
                    let _ = reply.send(Err(self.busy("stop")));
                    return None;
                }
                let result = self.stop(grace, resources).await;
                self.registry.remove(self.name());
                let _ = reply.send(result);
                Some(End::Removed)
            }
            Command::BeginMigration { id, reply } => {
                if self.view.borrow().state != PodState::Running {
                    let _ = reply.send(Err(self.busy("migrate")));
                    return None;
                }
                self.view.send_modify(|view| {
                    view.state = PodState::Migrating;
                    view.migration = Some(id);
                });
                let _ = reply.send(Ok(Arc::clone(resources)));
                None
            }
            Command::MarkInDoubt => {
                self.view.send_modify(|view| {
                    if view.migration.is_some() {
                        view.state = PodState::InDoubt;
                    }
                });
                None
            }
            Command::EndMigration { end, reply } => {
                if self.view.borrow().migration.is_none() {
                    let _ = reply.send(Err(self.busy("end a migration of")));
                    return None;
                }
                match end {
                    MigrationEnd::Kept { epoch } => {
                        self.view.send_modify(|view| {
                            view.state = PodState::Running;
                            view.migration = None;
                            view.epoch = epoch;
                        });
                        let _ = reply.send(Ok(()));
                        if let Some(client) = resources.agent.get() {
                            self.refresh(&client).await;
                        }
                        None
                    }
                    MigrationEnd::MovedAway { to } => {
                        tracing::info!(pod = self.name(), to, "moved away");
                        self.view.send_modify(|view| view.resources = None);
                        let result = self.remove_files().await;
                        self.registry.remove(self.name());
                        let _ = reply.send(result);
                        Some(End::Removed)
                    }
                    MigrationEnd::Died { reason } => {
                        self.release(resources).await;
                        let _ = reply.send(Ok(()));
                        Some(End::Dead(reason))
                    }
                }
            }
        }
    }

    /// Stops the containers, ends the VM, and removes everything; goes on where a step fails.
    async fn stop(&mut self, grace: Duration, resources: &PodResources) -> Result<(), PodError> {
        self.view
            .send_modify(|view| view.state = PodState::Stopping);
        let asked = tokio::time::timeout(grace + STOP_MARGIN, async {
            tokio::select! {
                asked = stop_containers(resources, grace) => asked,
                _ = resources.vm.wait_exit() => Ok(()),
            }
        });
        match asked.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(pod = self.name(), error, "the agent does not stop it")
            }
            Err(_) => tracing::warn!(pod = self.name(), "the agent does not answer"),
        }
        self.view.send_modify(|view| view.resources = None);
        self.release(resources).await;
        self.disown().await;
        self.remove_files().await
    }

    /// Ends VM and port, as far as they are there.
    async fn release(&self, resources: &PodResources) {
        if let Err(error) = resources.vm.quit().await {
            tracing::error!(pod = self.name(), %error, "cannot end the VM");
        }
        if let Err(error) = resources.port.release().await {
            tracing::error!(pod = self.name(), %error, "cannot remove the network port");
        }
    }

    async fn died(&mut self, exit: Option<VmExit>, resources: &PodResources) -> End {
        let reason = boot::death(exit.as_ref(), &self.facts.dir);
        tracing::error!(pod = self.name(), reason, "the VM ended");
        self.release(resources).await;
        End::Dead(reason)
    }

    /// Shows a pod without VM until it is removed.
    async fn dead(&mut self, reason: String) -> End {
        self.view.send_modify(|view| {
            view.state = PodState::Failed;
            view.reason = Some(reason);
            view.resources = None;
            view.migration = None;
        });
        loop {
            let command = tokio::select! {
                command = self.commands.recv() => command,
                () = self.node.shutdown.cancelled() => return End::Left,
            };
            match command {
                None => return End::Left,
                Some(Command::Stop { reply, .. }) => {
                    self.disown().await;
                    let result = self.remove_files().await;
                    self.registry.remove(self.name());
                    let _ = reply.send(result);
                    return End::Removed;
                }
                Some(Command::BeginMigration { reply, .. }) => {
                    let _ = reply.send(Err(self.busy("migrate")));
                }
                Some(Command::EndMigration { reply, .. }) => {
                    let _ = reply.send(Err(self.busy("end a migration of")));
                }
                Some(Command::MarkInDoubt) => {}
            }
        }
    }

    /// Gives the right to run up, once no VM is left.
    async fn disown(&self) {
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

    async fn remove_files(&self) -> Result<(), PodError> {
        super::run::remove_folder(&self.facts.dir).await
    }

    /// Asks the agent which containers run.
    async fn refresh(&self, agent: &AgentClient) {
        if self.view.borrow().state != PodState::Running {
            return;
        }
        match agent.status().await {
            Ok(status) => self.view.send_modify(|view| {
                for known in &mut view.containers {
                    if let Some(now) = status.containers.iter().find(|c| c.name == known.name) {
                        known.state = super::sink::container_state(now.state);
                    }
                }
            }),
            Err(error) => {
                tracing::warn!(pod = self.name(), %error, "the agent does not tell its state")
            }
        }
    }

    fn event(&self, event: Event) {
        match event {
            Event::Started { container, .. } => self.show(&container, ContainerState::Running),
            Event::ContainerExited { container, code } => {
                tracing::info!(pod = self.name(), container, code, "container ended");
                self.show(&container, ContainerState::Exited { code });
            }
            Event::Error { context, message } => {
                tracing::warn!(pod = self.name(), context, message, "the agent reports");
            }
            Event::Ready { .. }
            | Event::Stopped
            | Event::Output { .. }
            | Event::ExecOutput { .. }
            | Event::StdinCredit { .. }
            | Event::ExecExited { .. } => {}
        }
    }

    fn show(&self, container: &str, state: ContainerState) {
        self.view.send_modify(|view| {
            if let Some(known) = view.containers.iter_mut().find(|c| c.name == container) {
                known.state = state;
            }
        });
    }
}

async fn next(
    events: &mut Option<broadcast::Receiver<Event>>,
) -> Result<Event, broadcast::error::RecvError> {
    match events {
        Some(events) => events.recv().await,
        None => Err(broadcast::error::RecvError::Closed),
    }
}

async fn stop_containers(resources: &PodResources, grace: Duration) -> Result<(), String> {
    match resources.agent.wait(STOP_MARGIN).await {
        Some(agent) => agent.stop_pod(grace).await.map_err(|e| chain(&e)),
        None => Err("it has never answered".to_owned()),
    }
}

fn busy(facts: &Facts, verb: &'static str) -> PodError {
    PodError::Busy {
        pod: facts.spec.name.clone(),
        state: PodState::Starting,
        verb,
    }
}
