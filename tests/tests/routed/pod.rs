//! The pod, and its migrations as the conductor runs them.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::ensure;
use migrator::network::conntrack::{Bound, Known, Led};
use migrator::network::{Ledger, LogItem, Port, PortError, Role};
use migrator_tests::inbox::{Guest, Inbox};
use tokio::sync::mpsc;
use vm_runtime::units::Epoch;

use crate::DEADLINE;
use crate::cluster::{Lab, Node, address, peers};

/// A pod that runs at one of the nodes.
pub(crate) struct Pod {
    pub(crate) at: usize,
    pub(crate) port: Port,
    pub(crate) epoch: u64,
    guest: Guest,
    slot: u16,
    /// What became of the flows that nodes translate which it has left.
    pub(crate) led: Led,
}

/// What runs in the pod.
pub(crate) trait Body {
    fn start(&self, tap: OwnedFd) -> anyhow::Result<Guest>;
}

impl Body for Inbox {
    fn start(&self, tap: OwnedFd) -> anyhow::Result<Guest> {
        Ok(Guest::start(tap, self))
    }
}

impl Pod {
    pub(crate) fn start(lab: &Lab, body: &impl Body) -> anyhow::Result<Self> {
        let port = lab.nodes[0].attach(1, Role::Local)?;
        let guest = body.start(port.tap_fd()?)?;
        port.claim(Epoch(1))?;
        for node in &lab.nodes {
            node.knows("a", 1)?;
        }
        Ok(Self {
            at: 0,
            port,
            epoch: 1,
            guest,
            slot: 1,
            led: Led::default(),
        })
    }

    /// One migration, as the conductor runs it, up to the release. Returns the port that was left.
    pub(crate) fn migrate(
        self,
        lab: &Lab,
        to: usize,
        body: &impl Body,
    ) -> anyhow::Result<(Self, Port)> {
        let (from, target) = (&lab.nodes[self.at], &lab.nodes[to]);
        let (slot, epoch) = (self.slot + 1, self.epoch + 1);
        let (source, destination) = (self.port, target.attach(slot, Role::Incoming)?);
        let (sink, log) = mpsc::unbounded_channel();
        connect(log, source.clone(), destination.clone(), target)?;
        let port = source.clone();
        from.call(async move {
            port.reset_ledger().await?;
            port.hold(sink).await?;
            port.drain_tap(Duration::from_millis(5)).await;
            Ok::<_, PortError>(())
        })??;
        self.guest.stop();
        let port = source.clone();
        from.call(async move { port.residue().await })??;
        let led = carry_flows((from, &source), (target, &destination))?;
        let port = destination.clone();
        target.call(async move {
            port.open().await?;
            port.claim(Epoch(epoch))
        })??;
        let guest = body.start(destination.tap_fd()?)?;
        let (port, remote) = (source.clone(), address(target.number));
        let name = target.name;
        from.call(async move {
            port.left_for(name, Epoch(epoch)).await?;
            port.forward().await?;
            // Late frames take the tunnel as soon as the order allows it.
            tokio::spawn(async move { port.tunnel_to(remote).await });
            Ok::<_, PortError>(())
        })??;
        let port = destination.clone();
        target.call(async move { port.settle().await })??;
        let pod = Self {
            at: to,
            port: destination,
            epoch,
            guest,
            slot,
            led,
        };
        Ok((pod, source))
    }

    pub(crate) fn stop(self, lab: &Lab) -> anyhow::Result<()> {
        self.guest.stop();
        let port = self.port;
        lab.nodes[self.at].call(async move { port.discard().await })??;
        Ok(())
    }
}

/// The port lets go once everything that still comes goes through the tunnel.
pub(crate) fn release(node: &Node, port: Port) -> anyhow::Result<Ledger> {
    let until = Instant::now() + DEADLINE;
    loop {
        let asked = port.clone();
        let facts = node.call(async move { asked.facts().await })??;
        if facts.gate.mode == "tunnel" && facts.ledger.held == 0 {
            break;
        }
        ensure!(Instant::now() < until, "{facts:?}");
        std::thread::yield_now();
    }
    Ok(node.call(async move { port.release().await })??)
}

/// While the guest stands still: what connection tracking knows of its flows.
fn carry_flows((from, source): (&Node, &Port), (to, port): (&Node, &Port)) -> anyhow::Result<Led> {
    let source = source.clone();
    let (free, bound) = from.call(async move {
        let keeper = source.keeper().await?;
        let flows = source.flows().await?;
        let mut kept = keeper.keep(&flows.bound);
        assert_eq!(kept.unserved, 0, "{:?}", keeper.problem());
        kept.bound.extend(source.flows_elsewhere());
        Ok::<_, PortError>((flows.free, kept.bound))
    })??;
    let (port, source) = (port.clone(), address(from.number));
    let nodes = peers(to.name).into_values().collect();
    to.call(async move {
        port.comes_from(source, nodes);
        port.take_flows(free, Known::Update).await?;
        let bound = port
            .read_bound(&Bound::encode_all(&bound))
            .expect("the pod's");
        port.lead_bound(&bound).await?;
        Ok::<_, PortError>(port.led_flows())
    })?
    .map_err(Into::into)
}

/// The wire: hands items over, and acknowledgements back.
fn connect(
    mut log: mpsc::UnboundedReceiver<LogItem>,
    source: Port,
    destination: Port,
    on: &Node,
) -> anyhow::Result<()> {
    let mut acked = destination.acked();
    on.run(async move {
        while let Some(item) = log.recv().await {
            if destination.log_input(item).is_err() {
                break;
            }
        }
    })?;
    on.run(async move {
        while acked.changed().await.is_ok() {
            source.ack(*acked.borrow());
        }
    })
}
