//! The ports of a node, for those who look at them from outside. It keeps none of them alive.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};

use tokio::sync::watch;

use super::{Inner, Port, lock};
use crate::network::dataplane::Stage;
use crate::network::node::NodeNetwork;
use crate::network::watch::Watch;

/// The ports of a node, by slot.
#[derive(Default)]
pub(crate) struct Ports(Mutex<BTreeMap<u16, Weak<Inner>>>);

impl std::fmt::Debug for Ports {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Ports").finish_non_exhaustive()
    }
}

impl Ports {
    /// Enters a port, over the one that had its slot before.
    pub(super) fn enter(&self, inner: &Arc<Inner>) {
        let mut ports = lock(&self.0);
        ports.retain(|_, port| port.strong_count() > 0);
        ports.insert(inner.gate.slot(), Arc::downgrade(inner));
    }

    fn all(&self) -> Vec<Port> {
        let ports = lock(&self.0);
        ports
            .values()
            .filter_map(Weak::upgrade)
            .map(|inner| Port { inner })
            // Released or discarded: only its handles are left.
            .filter(|port| lock(&port.inner.devices).is_some())
            .collect()
    }
}

impl NodeNetwork {
    /// The ports of this node, by slot; those of pods that are on their way here, too.
    pub fn ports(&self) -> Vec<Port> {
        self.inner().ports.all()
    }

    /// The port of a pod.
    pub fn port(&self, pod: &str) -> Option<Port> {
        let mut ports = self.ports().into_iter();
        ports.find(|port| port.inner.pod.name == pod)
    }
}

impl Port {
    /// Its stages as they change; ends with the port, and does not keep it.
    pub fn stages(&self) -> watch::Receiver<Stage> {
        self.inner.stages.clone()
    }

    /// Begins to watch its frames.
    ///
    /// # Errors
    /// There is no clock.
    pub fn watch(&self) -> std::io::Result<Watch> {
        self.inner.node.gates.watchers.watch(self.slot())
    }
}
