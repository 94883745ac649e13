//! Nodes and a client in namespaces of their own; [`traffic`] is what crosses them, the other modules have tests.

mod bound;
mod fast;
mod flows;
mod killed;
mod limits;
mod onward;
mod settled;
mod stream;
mod traffic;
mod tunnel;

use std::future::Future;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use migrator::network::{
    ExistingDevices, Ground, Ledger, LogItem, NodeNetConfig, NodeNetwork, ParkLimits, PodNetId,
    Port, Role, TunnelConfig, XdpChoice,
};
use migrator_tests::jobs::Jobs;
use migrator_tests::netns::{BpfDir, Netns, require_root};
use tempfile::TempDir;
use tokio::sync::mpsc;
use vm_runtime::units::MacAddress;

pub(crate) use migrator_tests::inbox::{Guest, Inbox};
pub(crate) use traffic::{GROUP_FLOW, Sender, finish_ipv4, probe, say_hello};

pub(crate) const DEADLINE: Duration = Duration::from_secs(40);
pub(crate) const POD_MAC: MacAddress = MacAddress([0x52, 0x54, 0, 0, 0, 0x10]);
pub(crate) const CLIENT_MAC: MacAddress = MacAddress([0x52, 0x54, 0, 0, 0, 0x01]);

/// A node: its namespace, and a thread in it that runs what it is given.
pub(crate) struct Node {
    pub(crate) jobs: Jobs,
    pub(crate) network: NodeNetwork,
    pub(crate) dir: BpfDir,
    pub(crate) spool: TempDir,
    pub(crate) netns: Netns,
    pub(crate) setup: Setup,
}

/// Addresses for the nodes themselves, 10.78.0.N and fd78::N, on a network that takes longer packets than the pods are sent.
#[derive(Clone, Copy)]
pub(crate) struct Underlay {
    pub(crate) mtu: u32,
}

/// What a node is made with.
#[derive(Clone, Copy)]
pub(crate) struct Setup {
    pub(crate) underlay: Option<Underlay>,
    pub(crate) tunnel: Option<TunnelConfig>,
    pub(crate) park: ParkLimits,
    pub(crate) xdp: XdpChoice,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            underlay: None,
            tunnel: None,
            // More than any test but those of the limits needs.
            park: ParkLimits {
                bytes: 1 << 30,
                bytes_per_pod: 1 << 30,
            },
            xdp: XdpChoice::On,
        }
    }
}

pub(crate) fn config(dir: &BpfDir, spool: &TempDir, setup: Setup) -> NodeNetConfig {
    NodeNetConfig {
        ground: Ground::Bridge("br0".into()),
        uplink: "eth0".into(),
        xdp: setup.xdp,
        bpffs: dir.path().to_owned(),
        spool_dir: spool.path().join("spool"),
        tunnel: setup.tunnel,
        park: setup.park,
        bound_limit: Duration::from_secs(3600),
        cluster: None,
    }
}

impl Node {
    /// A node whose bridge has a cable to the switch.
    pub(crate) fn new(switch: &Netns, number: u32, setup: Setup) -> anyhow::Result<Self> {
        let netns = Netns::new()?;
        netns.ip("link add br0 type bridge forward_delay 0")?;
        // Lower than that of any TAP, as a NIC's is: the bridge takes the lowest for its own.
        let mac = format!("02:00:00:00:01:{number:02x}");
        netns.ip(&format!(
            "link add eth0 address {mac} type veth peer name p{number} netns {}",
            switch.path().display()
        ))?;
        netns.ip("link set eth0 master br0 up")?;
        netns.ip("link set br0 up")?;
        switch.ip(&format!("link set p{number} master sw0 up"))?;
        if let Some(Underlay { mtu }) = setup.underlay {
            netns.ip(&format!("link set eth0 mtu {mtu}"))?;
            netns.ip(&format!("link set br0 mtu {mtu}"))?;
            switch.ip(&format!("link set p{number} mtu {mtu}"))?;
            netns.ip(&format!("addr add 10.78.0.{number}/24 dev br0"))?;
            netns.ip(&format!("addr add fd78::{number}/64 dev br0 nodad"))?;
        }
        let jobs = Jobs::start(&netns);
        let dir = BpfDir::new()?;
        let spool = tempfile::tempdir()?;
        let network = jobs.call(NodeNetwork::open(config(&dir, &spool, setup)))??;
        Ok(Self {
            jobs,
            network,
            dir,
            spool,
            netns,
            setup,
        })
    }

    pub(crate) fn call<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> anyhow::Result<T> {
        self.jobs.call(work)
    }

    pub(crate) fn attach(
        &self,
        pod: &PodNetId,
        slot: u16,
        role: Role,
        existing: Option<ExistingDevices>,
    ) -> anyhow::Result<Port> {
        let (network, pod) = (self.network.clone(), pod.clone());
        Ok(self.call(async move { network.attach(&pod, slot, role, existing).await })??)
    }

    /// The service ends and a new one starts; the devices live on.
    pub(crate) fn restart(&mut self) -> anyhow::Result<()> {
        self.jobs = Jobs::start(&self.netns);
        let config = config(&self.dir, &self.spool, self.setup);
        self.network = self.call(NodeNetwork::open(config))??;
        Ok(())
    }

    pub(crate) fn ledger(&self, port: &Port) -> anyhow::Result<Ledger> {
        let port = port.clone();
        Ok(self.call(async move { port.ledger().await })??)
    }

    /// The books once nothing is held: a frame of the network's own may be on its way at any time.
    pub(crate) fn settled_ledger(&self, port: &Port) -> anyhow::Result<Ledger> {
        let until = Instant::now() + DEADLINE;
        loop {
            let ledger = self.ledger(port)?;
            if ledger.held == 0 || Instant::now() > until {
                return Ok(ledger);
            }
            std::thread::yield_now();
        }
    }
}

/// A bridge forwards on a port only when it has heard of its carrier, which takes the kernel a second.
pub(crate) fn wait_for_port(netns: &Netns, port: &str) -> anyhow::Result<()> {
    // Opened before the first look, so that no change is missed.
    let news = netns.link_news()?;
    let until = Instant::now() + DEADLINE;
    loop {
        let shown = netns.run("bridge", &format!("link show dev {port}"))?;
        if shown.contains("state forwarding") {
            return Ok(());
        }
        news.wait(until)
            .with_context(|| format!("{port} does not forward"))?;
    }
}

pub(crate) fn pod(name: &str, mac: MacAddress, last: u8) -> PodNetId {
    PodNetId {
        name: name.into(),
        mac,
        v4: Some([10, 77, 0, last].into()),
        v6: None,
    }
}

/// Switch, two nodes, and a client that is a pod on a node of its own.
pub(crate) struct Lab {
    pub(crate) a: Node,
    pub(crate) b: Node,
    _client: Node,
    pub(crate) client_tap: OwnedFd,
    _client_port: Port,
    pub(crate) switch: Netns,
}

impl Lab {
    pub(crate) fn new() -> anyhow::Result<Self> {
        Self::with(Setup::default())
    }

    /// Over a veth that runs an XDP program, nothing comes that is still to be cut.
    pub(crate) fn with(setup: Setup) -> anyhow::Result<Self> {
        require_root();
        let switch = Netns::switch()?;
        let a = Node::new(&switch, 1, setup)?;
        let b = Node::new(&switch, 2, setup)?;
        let client = Setup {
            underlay: None,
            tunnel: None,
            ..setup
        };
        let client = Node::new(&switch, 3, client)?;
        for number in 1..=3 {
            wait_for_port(&switch, &format!("p{number}"))?;
        }
        for node in [&a, &b, &client] {
            wait_for_port(&node.netns, "eth0")?;
        }
        let port = client.attach(&pod("client", CLIENT_MAC, 1), 0, Role::Local, None)?;
        Ok(Self {
            a,
            b,
            client_tap: port.tap_fd()?,
            _client_port: port,
            _client: client,
            switch,
        })
    }

    pub(crate) fn sender(&self, count: u64) -> anyhow::Result<Sender> {
        Ok(Sender::start(self.client_tap.try_clone()?, count))
    }
}

/// The wire: hands items over, and acknowledgements back.
pub(crate) fn connect(
    mut log: mpsc::UnboundedReceiver<LogItem>,
    source: Port,
    destination: Port,
    on: &Node,
) -> anyhow::Result<()> {
    let mut acked = destination.acked();
    on.jobs.run(async move {
        while let Some(item) = log.recv().await {
            if destination.log_input(item).is_err() {
                break;
            }
        }
    })?;
    on.jobs.run(async move {
        while acked.changed().await.is_ok() {
            source.ack(*acked.borrow());
        }
    })
}

pub(crate) fn check_ledger(ledger: &Ledger) -> anyhow::Result<()> {
    ensure!(ledger.balances(), "{ledger:?}");
    ensure!(ledger.lost == 0, "{ledger:?}");
    ensure!(ledger.held == 0, "{ledger:?}");
    Ok(())
}
