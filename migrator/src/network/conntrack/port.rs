//! What a port does with its pod's flows.

use std::net::IpAddr;

use super::socket::News;
use super::{ConntrackError, Flow, FlowError, Known, Taken, dump, fade, failed, is_tracking};
use crate::network::error::PortError;
use crate::network::port::Port;

/// Seconds after which an entry goes at the node that the pod has left, unless packets of its flow still come by there: because
/// it routes them, or because the other end is there.
const FADES_AFTER_S: u32 = 30;

/// A pod's flows at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flows {
    /// Those that any node can go on with.
    pub free: Vec<Flow>,
    /// Those whose translation needs this node.
    pub bound: Vec<Flow>,
}

impl Flows {
    fn split(flows: Vec<Flow>, node: &[IpAddr]) -> Self {
        let (bound, free) = flows.into_iter().partition(|flow| flow.is_bound_to(node));
        Self { free, bound }
    }
}

/// Flows that begin while the pod moves.
#[derive(Debug)]
pub struct FlowNews {
    news: News,
    pod: Vec<IpAddr>,
    node: Vec<IpAddr>,
}

impl FlowNews {
    /// Those that have begun since the last call, or since it was opened. A packet whose flow is new has
    /// told of it before it comes to the gate. Never waits.
    pub fn take(&mut self) -> Flows {
        match self.news.take(&self.pod) {
            Ok((flows, whole)) => {
                if !whole {
                    tracing::warn!(
                        "so many flows begin at once that some do not move with the pod"
                    );
                }
                Flows::split(flows, &self.node)
            }
            Err(error) => {
                tracing::warn!(%error, "flows that begin while the pod moves do not move with it");
                Flows::default()
            }
        }
    }
}

pub(super) async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> Result<T, ConntrackError> + Send + 'static,
) -> Result<T, PortError> {
    let ran = tokio::task::spawn_blocking(call).await;
    // A panic in it has been reported.
    let result = ran.unwrap_or_else(|error| Err(failed("ask")(std::io::Error::other(error))));
    result.map_err(PortError::Conntrack)
}

impl Port {
    pub(super) fn addresses(&self) -> Vec<IpAddr> {
        let pod = &self.inner.pod;
        let v4 = pod.v4.map(IpAddr::V4);
        v4.into_iter().chain(pod.v6.map(IpAddr::V6)).collect()
    }

    /// The pod's flows, as connection tracking of this node has them; none if the kernel does not track.
    ///
    /// # Errors
    /// The kernel does not tell, or does not tell this node's own addresses.
    pub async fn flows(&self) -> Result<Flows, PortError> {
        let pod = self.addresses();
        let flows = blocking(move || dump(&pod)).await?;
        if flows.is_empty() {
            return Ok(Flows::default());
        }
        let node = self.inner.node.netlink.addresses().await?;
        Ok(Flows::split(flows, &node))
    }

    /// Hears of flows that begin from now on; `None` if the kernel does not track.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub async fn flow_news(&self) -> Result<Option<FlowNews>, PortError> {
        if !is_tracking() {
            return Ok(None);
        }
        let node = self.inner.node.netlink.addresses().await?;
        let opened = News::open().map_err(failed("listen to"));
        Ok(Some(FlowNews {
            news: opened.map_err(PortError::Conntrack)?,
            pod: self.addresses(),
            node,
        }))
    }

    /// Flows of the pod that another node has sent, in the form of [`Flow::encode_all`].
    ///
    /// # Errors
    /// See [`FlowError`].
    pub fn read_flows(&self, bytes: &[u8]) -> Result<Vec<Flow>, FlowError> {
        Flow::decode_all(bytes, &self.addresses())
    }

    /// Makes entries of flows that another node sent. [`discard`](Self::discard) removes them again.
    ///
    /// One whose translation is bound to this node is refused: such a flow never moves, and its entry would take packets away from the node itself.
    ///
    /// # Errors
    /// The kernel takes nothing at all; single refusals are counted.
    pub async fn take_flows(&self, flows: Vec<Flow>, known: Known) -> Result<(), PortError> {
        let node = self.inner.node.netlink.addresses().await?;
        let made = self.inner.made.clone();
        blocking(move || {
            let (refused, flows): (Vec<_>, Vec<_>) =
                flows.into_iter().partition(|flow| flow.is_bound_to(&node));
            made.refuse(&refused);
            made.take(&flows, known)
        })
        .await
    }

    /// What became of all flows that another node has sent.
    pub fn taken_flows(&self) -> Taken {
        self.inner.made.taken()
    }

    pub(in crate::network) fn keep_flows(&self) {
        self.inner.made.keep();
    }

    pub(in crate::network) async fn undo_flows(&self) {
        let made = self.inner.made.clone();
        if let Err(error) = blocking(move || made.undo()).await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "entries of connection tracking are left behind"
            );
        }
    }

    /// The pod has gone, and its flows with it.
    pub(in crate::network) async fn fade_flows(&self) {
        let faded = match self.flows().await {
            Ok(Flows { free, .. }) => blocking(move || fade(&free, FADES_AFTER_S)).await,
            Err(error) => Err(error),
        };
        if let Err(error) = faded {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "entries of connection tracking are left behind"
            );
        }
    }
}
