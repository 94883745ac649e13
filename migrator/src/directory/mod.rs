//! The nodes of a routed cluster tell each other where the pods are: the connections between them. What is told is decided by
//! [`Endpoints`], the wire is specified in [`crate::wire`], "Places".
//!
//! ```text
//!   [publish] --Places, EndWanted--> the other node's [serve] --> its Endpoints --> its programs
//!       ^                                    |
//!       +------------PlacesAck---------------+
//! ```

mod convert;
mod publish;
mod serve;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use tokio_util::sync::CancellationToken;

use crate::network::Endpoints;
use crate::wire::session::Session;
use crate::wire::tls::TlsConfig;

/// This node's part in it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Directory {
    endpoints: Arc<Endpoints>,
    tls: TlsConfig,
    shutdown: CancellationToken,
    /// The connection over which each node tells this one: a newer one ends the one before.
    serving: Arc<Mutex<BTreeMap<String, CancellationToken>>>,
}

impl Directory {
    /// Over the endpoint table of this node; everything ends with `shutdown`.
    pub fn new(endpoints: Arc<Endpoints>, tls: TlsConfig, shutdown: CancellationToken) -> Self {
        Self {
            endpoints,
            tls,
            shutdown,
            serving: Arc::default(),
        }
    }

    /// Tells a node of this one's pods, until the end.
    pub async fn publish(self, peer: String, addr: SocketAddr) {
        publish::publish(&self, &peer, addr).await;
    }

    /// Is told by the node that has dialed this session of the shape [`Places`](crate::wire::Shape::Places).
    pub async fn serve(self, session: Session) {
        let ended = self.shutdown.child_token();
        let before = {
            let mut serving = self.serving.lock().unwrap_or_else(PoisonError::into_inner);
            serving.insert(session.peer.clone(), ended.clone())
        };
        if let Some(before) = before {
            before.cancel();
        }
        serve::serve(&self.endpoints, session, ended).await;
    }
}
