//! Serving a pod that has a VM.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast;
use tokio::time::MissedTickBehavior;
use vm_runtime::agent_client::{AgentClient, Condition, Event};
use vm_runtime::vm::VmExit;

use super::{Actor, End};
use crate::api::error::chain;
use crate::api::types::{ContainerState, PodState};
use crate::pods::boot;
use crate::pods::console;
use crate::pods::error::PodError;
use crate::pods::handle::{Command, MigrationEnd, PodResources};
use crate::pods::sink;

/// What the agent may take beyond the containers' grace period.
const STOP_MARGIN: Duration = Duration::from_secs(10);

/// Why a pod stands still whose disks cannot be written.
const FULL: &str =
    "the file system of its disks is full on this node: it goes on once there is room";

/// What becomes of a pod that was served.
enum Turn {
    /// It is over.
    End(End),
    /// It goes on with another VM.
    Replaced(Arc<PodResources>),
}

impl Actor {
    /// Serves a pod that has a VM, until it has none.
    pub(super) async fn live(&mut self, mut resources: Arc<PodResources>) -> End {
        self.claim(&resources);
        loop {
            match self.serve(&resources).await {
                Turn::End(end) => return end,
                Turn::Replaced(parts) => resources = parts,
            }
        }
    }

    /// Tells the other nodes of a routed cluster that the pod is here, unless that is in doubt.
    fn claim(&self, resources: &PodResources) {
        let (state, epoch) = {
            let view = self.view.borrow();
            (view.state, view.epoch)
        };
        if state == PodState::InDoubt {
            return;
        }
        if let Err(error) = resources.port.claim(epoch) {
            tracing::error!(
                pod = self.name(),
                error = chain(&error),
                "other nodes are not told that it is here"
            );
        }
    }

    /// Serves a pod as long as its VM is the same.
    async fn serve(&mut self, resources: &Arc<PodResources>) -> Turn {
        let mut agent = resources.agent.subscribe();
        agent.mark_changed();
        let mut events: Option<broadcast::Receiver<Event>> = None;
        let mut console = tokio::time::interval(console::LOOK_EVERY);
        console.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut starved = false;
        loop {
            let migrating = self.view.borrow().migration.is_some();
            let vm = Arc::clone(&resources.vm);
            tokio::select! {
                // Commands first: what a client was promised comes before news.
                biased;
                // A migration is ended by its driver first.
                () = self.node.shutdown.cancelled(), if !migrating => return Turn::End(End::Left),
                command = self.commands.recv() => {
                    let Some(command) = command else { return Turn::End(End::Left) };
                    if let Some(turn) = self.command(command, resources).await {
                        return turn;
                    }
                }
                // During a migration the VM's end is the driver's to judge.
                exit = vm.wait_exit(), if !migrating => {
                    return Turn::End(self.died(exit.ok(), resources).await);
                }
                // Before the events, which a busy guest has always more of.
                _ = console.tick() => {
                    self.bound_console().await;
                    if !migrating {
                        self.relieve(resources, &mut starved).await;
                    }
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

    async fn command(&mut self, command: Command, resources: &Arc<PodResources>) -> Option<Turn> {
        match command {
            Command::Stop { grace, reply } => {
                if self.view.borrow().migration.is_some() {
                    let _ = reply.send(Err(self.busy("stop")));
                    return None;
                }
                let result = self.stop(grace, resources).await;
                self.registry.remove(self.name());
                let _ = reply.send(result);
                Some(Turn::End(End::Removed))
            }
            Command::Start { reply, .. } => {
                let _ = reply.send(Err(self.busy("start")));
                None
            }
            Command::Upgrade { order, reply } => {
                let replaced = self.upgrade(order, resources, reply).await;
                replaced.map(Turn::Replaced)
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
                        self.claim(resources);
                        let _ = reply.send(Ok(()));
                        if let Some(client) = resources.agent.get() {
                            self.refresh(&client).await;
                        }
                        None
                    }
                    MigrationEnd::MovedAway { to } => {
                        self.view.send_modify(|view| view.resources = None);
                        Some(Turn::End(self.moved_away(&to, reply).await))
                    }
                    MigrationEnd::Died { reason, epoch } => {
                        self.view.send_modify(|view| view.epoch = epoch);
                        self.release(resources).await;
                        let _ = reply.send(Ok(()));
                        Some(Turn::End(End::Dead(reason)))
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
        } else {
            resources.disks.iter().for_each(|disk| disk.let_go());
        }
        if let Err(error) = resources.port.release().await {
            tracing::error!(pod = self.name(), %error, "cannot remove the network port");
        }
    }

    /// Lets a guest go on that stopped because the node's file system was full, once there is room.
    async fn relieve(&self, resources: &PodResources, starved: &mut bool) {
        let mut found = false;
        for disk in &resources.disks {
            found |= disk.served().is_some_and(|disk| disk.take_starved());
        }
        *starved |= found;
        if !*starved {
            return;
        }
        if !resources.disks.iter().all(|disk| disk.has_room()) {
            tracing::warn!(
                pod = self.name(),
                "it stands still: the node's file system is full"
            );
            self.view.send_modify(|view| {
                view.reason = Some(FULL.to_owned());
            });
            return;
        }
        *starved = false;
        match resources.vm.cont().await {
            Ok(()) => self.view.send_modify(|view| view.reason = None),
            Err(error) => {
                tracing::error!(
                    pod = self.name(),
                    error = chain(&error),
                    "it does not go on"
                );
            }
        }
    }

    async fn died(&mut self, exit: Option<VmExit>, resources: &PodResources) -> End {
        let reason = boot::death(exit.as_ref(), &self.facts.dir);
        tracing::error!(pod = self.name(), reason, "the VM ended");
        self.release(resources).await;
        End::Dead(reason)
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
                        known.state = sink::container_state(now.state);
                    }
                }
            }),
            Err(error) => {
                tracing::warn!(pod = self.name(), %error, "the agent does not tell its state");
                return;
            }
        }
        // It is asked again at the next change of anything.
        for condition in agent.conditions().await.unwrap_or_default() {
            self.fares(&condition);
        }
    }

    /// Shows how a container fares.
    fn fares(&self, condition: &Condition) {
        self.view.send_modify(|view| {
            let mut containers = view.containers.iter_mut();
            if let Some(known) = containers.find(|c| c.name == condition.container) {
                known.condition = sink::condition(condition);
                if condition.waits_ms.is_some() {
                    known.state = ContainerState::Waiting;
                }
            }
        });
    }

    fn event(&self, event: Event) {
        match event {
            Event::Started { container, .. } => self.show(&container, ContainerState::Running),
            Event::ContainerExited { container, code } => {
                tracing::info!(pod = self.name(), container, code, "container ended");
                self.show(&container, ContainerState::Exited { code });
            }
            Event::Condition(condition) => self.fares(&condition),
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
