//! While late frames go straight from the uplink to the other node: the way there is looked after.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use super::Port;
use crate::network::dataplane::Stage;

/// Between two looks: a new link-layer address or route is taken up within this. Longer than most forwarding lasts.
const LOOK: Duration = Duration::from_secs(1);

impl Port {
    /// Goes on until the port is gone, or takes the kernel's tunnel.
    pub(super) fn look_after(&self, mtu: u32, remote: IpAddr) {
        let inner = Arc::downgrade(&self.inner);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(LOOK).await;
                let Some(inner) = inner.upgrade() else {
                    return;
                };
                if *inner.stages.borrow() != Stage::Forwarding {
                    return;
                }
                let node = Arc::clone(&inner.node);
                let gate = inner.gate.clone();
                // A look must not keep the port.
                drop(inner);
                if !node
                    .tunnel
                    .look_again(&node.netlink, &gate, mtu, remote)
                    .await
                {
                    return;
                }
            }
        });
    }
}
