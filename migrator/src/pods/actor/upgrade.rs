//! Replacing the VMM of a pod that runs; until that is over, nothing else is done with it.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::Actor;
use crate::api::error::chain;
use crate::api::types::PodState;
use crate::pods::error::PodError;
use crate::pods::handle::PodResources;
use crate::pods::upgrade::{UpgradeOrder, UpgradeReport, Upgraded, upgrade};

impl Actor {
    /// Replaces the VMM. The pod's parts from now on, if they are others.
    pub(super) async fn upgrade(
        &mut self,
        order: UpgradeOrder,
        resources: &Arc<PodResources>,
        reply: oneshot::Sender<Result<UpgradeReport, PodError>>,
    ) -> Option<Arc<PodResources>> {
        if self.view.borrow().state != PodState::Running {
            // Whoever asked may be gone; that is his business. So everywhere below.
            let _ = reply.send(Err(self.busy("upgrade")));
            return None;
        }
        self.view
            .send_modify(|view| view.state = PodState::Upgrading);
        let node = Arc::clone(&self.node);
        let upgraded = {
            let upgrading = upgrade(&node, resources, order);
            tokio::pin!(upgrading);
            loop {
                tokio::select! {
                    upgraded = &mut upgrading => break upgraded,
                    Some(command) = self.commands.recv() => self.refuse(command),
                }
            }
        };
        let pod = self.name().to_owned();
        let (parts, answer) = match upgraded {
            Upgraded::Done(parts, report) => {
                tracing::info!(
                    pod,
                    from = report.from.version,
                    to = report.to.version,
                    downtime_us = report.downtime_us,
                    "upgraded"
                );
                (Some(parts), Ok(report))
            }
            Upgraded::Kept(source) => {
                tracing::warn!(pod, error = chain(&source), "not upgraded");
                (None, Err(PodError::NotUpgraded { pod, source }))
            }
            Upgraded::Broken(parts, source) => {
                tracing::error!(pod, error = chain(&source), "the new VMM fails");
                let error = PodError::step(&pod, "run it under the new VMM", source);
                (Some(parts), Err(error))
            }
        };
        self.view.send_modify(|view| {
            view.state = PodState::Running;
            if let Some(parts) = &parts {
                view.resources = Some(Arc::clone(parts));
            }
        });
        let _ = reply.send(answer);
        parts
    }
}
