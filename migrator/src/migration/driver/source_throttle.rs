//! Slowing the guest at the source while its memory is copied.

use std::sync::Arc;

use tokio::sync::Mutex;
use vm_runtime::vm::throttle::{Percent, Throttle};

use super::source::Run;
use crate::api::error::chain;
use crate::pods::PodResources;

/// The throttle of a guest, once it has been needed.
pub(super) type Slowed = Arc<Mutex<Option<Throttle>>>;

impl Run {
    /// Slows the guest's CPUs, or slows them more.
    pub(super) fn throttle(&mut self, percent: u8) {
        let Some(resources) = self.parts() else {
            return;
        };
        let slowed = Arc::clone(&self.slowed);
        // Of a step that is cancelled midway the throttle would be dropped, which lets the guest go; a helper lives on.
        self.runner.helpers.spawn(async move {
            if let Err(reason) = slow(&resources, &slowed, percent).await {
                tracing::warn!(pod = resources.spec.name, reason, "the guest is not slowed");
            }
        });
    }
}

async fn slow(resources: &PodResources, slowed: &Slowed, percent: u8) -> Result<(), String> {
    let mut slowed = slowed.lock().await;
    let throttle = match slowed.take() {
        Some(throttle) => throttle,
        None => Throttle::new(&resources.vm)
            .await
            .map_err(|error| chain(&error))?,
    };
    tracing::info!(pod = resources.spec.name, percent, means = ?throttle.means(), "the guest is slowed");
    let set = throttle.set(Percent::clamp(percent)).await;
    *slowed = Some(throttle);
    set.map_err(|error| chain(&error))
}

/// Before the guest's stop: one that is slowed takes long to notice it.
pub(super) async fn at_full_speed(slowed: &Slowed) -> Result<(), String> {
    match &*slowed.lock().await {
        Some(throttle) => throttle
            .set(Percent::OFF)
            .await
            .map_err(|error| chain(&error)),
        None => Ok(()),
    }
}

/// Lets the guest go, and puts everything back.
pub(super) async fn end(slowed: &Slowed) -> Result<(), String> {
    match slowed.lock().await.take() {
        Some(throttle) => throttle.end().await.map_err(|error| chain(&error)),
        None => Ok(()),
    }
}
