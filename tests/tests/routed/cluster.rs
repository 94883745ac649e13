//! Three nodes of a routed cluster in namespaces of their own, joined by a switch, and a client behind the third. Everything is real but the guests: the
//! programs, the routes, the tunnels, and the TLS connections over which the nodes tell each other where pods are.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use migrator::directory::Directory;
use migrator::network::conntrack::{Bound, Known, Led};
use migrator::network::{
    Cluster, ClusterFacts, Ground, Ledger, LogItem, NodeNetConfig, NodeNetwork, ParkLimits,
    PodNetId, PodNetwork, PodNetworks, Port, PortError, Role, TunnelConfig, XdpChoice,
};
use migrator::wire::preamble::Shape;
use migrator::wire::session::{Limits, Listener};
use migrator::wire::tls::{TlsConfig, dns_name};
use migrator_tests::inbox::{Guest, Inbox};
use migrator_tests::jobs::Jobs;
use migrator_tests::netns::{BpfDir, Netns, require_root};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use vm_runtime::units::{Epoch, MacAddress};

use crate::DEADLINE;

pub(crate) const POD_MAC: MacAddress = MacAddress([0x52, 0x54, 0, 0, 0, 0x10]);
pub(crate) const NAMES: [&str; 3] = ["a", "b", "c"];
const TUNNEL: TunnelConfig = TunnelConfig {
    vni: 77,
    port: 4789,
    mtu: Some(1500),
};

pub(crate) fn pod() -> PodNetId {
    PodNetId {
        name: "pod".into(),
        mac: POD_MAC,
        v4: Some([10, 77, 0, 10].into()),
        v6: Some("fd77::10".parse().expect("an address")),
    }
}

/// Both addresses of the pod.
pub(crate) fn addresses() -> [IpAddr; 2] {
    ["10.77.0.10", "fd77::10"].map(|text| text.parse().expect("an address"))
}

fn address(number: u8) -> IpAddr {
    [10, 78, 0, number].into()
}

struct Authority {
    dir: TempDir,
    ca: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        std::fs::write(dir.path().join("ca.pem"), params.self_signed(&key)?.pem())?;
        let ca = Issuer::new(params, key);
        Ok(Self { dir, ca })
    }

    fn node(&self, node: &str) -> anyhow::Result<TlsConfig> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![dns_name(node)])?;
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let cert = params.signed_by(&key, &self.ca)?;
        let path = |end: &str| -> PathBuf { self.dir.path().join(format!("{node}.{end}")) };
        std::fs::write(path("crt"), cert.pem())?;
        std::fs::write(path("key"), key.serialize_pem())?;
        let ca = self.dir.path().join("ca.pem");
        Ok(TlsConfig::load(&path("crt"), &path("key"), &ca)?)
    }
}

/// A node: its namespace, and a thread in it that runs what it is given.
pub(crate) struct Node {
    jobs: Jobs,
    pub(crate) network: NodeNetwork,
    pub(crate) name: &'static str,
    tls: TlsConfig,
    number: u8,
    /// Ends what the nodes tell each other, here.
    service: CancellationToken,
    dir: BpfDir,
    spool: TempDir,
    pub(crate) netns: Netns,
}

fn peers(name: &str) -> BTreeMap<String, IpAddr> {
    let others = (1u8..).zip(NAMES).filter(|(_, other)| *other != name);
    others
        .map(|(number, other)| (other.to_owned(), address(number)))
        .collect()
}

fn config(name: &str, dir: &BpfDir, spool: &TempDir) -> anyhow::Result<NodeNetConfig> {
    let networks: Vec<PodNetwork> = vec!["10.77.0.0/24".parse()?, "fd77::/64".parse()?];
    Ok(NodeNetConfig {
        ground: Ground::Routed(PodNetworks::try_from(networks)?),
        uplink: "eth0".into(),
        xdp: XdpChoice::Off,
        bpffs: dir.path().to_owned(),
        spool_dir: spool.path().join("spool"),
        tunnel: Some(TUNNEL),
        park: ParkLimits {
            bytes: 1 << 30,
            bytes_per_pod: 1 << 30,
        },
        bound_limit: Duration::from_secs(3600),
        cluster: Some(Cluster {
            name: name.to_owned(),
            peers: peers(name),
        }),
    })
}

impl Node {
    fn new(switch: &Netns, number: u8, tls: TlsConfig) -> anyhow::Result<Self> {
        let name = NAMES[usize::from(number) - 1];
        let netns = Netns::new()?;
        netns.ip(&format!("link add eth0 type veth peer name p{number}"))?;
        netns.ip(&format!(
            "link set p{number} netns {}",
            switch.path().display()
        ))?;
        switch.ip(&format!("link set p{number} mtu 1600 master sw0 up"))?;
        netns.ip("link set eth0 mtu 1600 up")?;
        netns.ip(&format!("addr add 10.78.0.{number}/24 dev eth0"))?;
        netns.ip(&format!("addr add fd78::{number}/64 dev eth0 nodad"))?;
        let jobs = Jobs::start(&netns);
        let (dir, spool) = (BpfDir::new()?, tempfile::tempdir()?);
        let config = config(name, &dir, &spool)?;
        let network = jobs.call(NodeNetwork::open(config))??;
        let mut node = Self {
            jobs,
            network,
            name,
            tls,
            number,
            service: CancellationToken::new(),
            dir,
            spool,
            netns,
        };
        node.start_service()?;
        Ok(node)
    }

    /// The service ends, and a new one starts.
    pub(crate) fn restart(&mut self) -> anyhow::Result<()> {
        self.stop_service();
        self.jobs = Jobs::start(&self.netns);
        let config = config(self.name, &self.dir, &self.spool)?;
        self.network = self.call(NodeNetwork::open(config))??;
        self.start_service()
    }

    /// Listens, and tells the other nodes.
    pub(crate) fn start_service(&mut self) -> anyhow::Result<()> {
        self.service = CancellationToken::new();
        let endpoints = self.network.endpoints().context("the table")?;
        let ended = self.service.clone();
        let directory = Directory::new(Arc::clone(endpoints), self.tls.clone(), ended.clone());
        let (tls, names) = (self.tls.clone(), peers(self.name).into_keys().collect());
        let listen = SocketAddr::new(address(self.number), 7077);
        let mut listener =
            self.call(async move { Listener::bind(listen, tls, names, Limits::default()).await })??;
        let served = directory.clone();
        self.run(async move {
            loop {
                let session = tokio::select! {
                    session = listener.accept() => session,
                    () = ended.cancelled() => return,
                };
                assert_eq!(session.shape, Shape::Places);
                tokio::spawn(served.clone().serve(session));
            }
        })?;
        for (peer, address) in peers(self.name) {
            let publish = directory
                .clone()
                .publish(peer, SocketAddr::new(address, 7077));
            self.run(publish)?;
        }
        Ok(())
    }

    /// The service is gone; the programs go on.
    pub(crate) fn stop_service(&self) {
        self.service.cancel();
    }

    pub(crate) fn run(
        &self,
        work: impl Future<Output = ()> + Send + 'static,
    ) -> anyhow::Result<()> {
        self.jobs.run(work)
    }

    pub(crate) fn call<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> anyhow::Result<T> {
        self.jobs.call(work)
    }

    pub(crate) fn attach(&self, slot: u16, role: Role) -> anyhow::Result<Port> {
        let network = self.network.clone();
        Ok(self.call(async move { network.attach(&pod(), slot, role, None).await })??)
    }

    pub(crate) fn facts(&self) -> anyhow::Result<ClusterFacts> {
        let network = self.network.clone();
        let facts = self.call(async move { network.facts().await })??;
        facts.cluster.context("the cluster")
    }

    pub(crate) fn ledger(&self, port: &Port) -> anyhow::Result<Ledger> {
        let port = port.clone();
        Ok(self.call(async move { port.ledger().await })??)
    }

    /// Until this node knows the pod at another one, in this epoch.
    pub(crate) fn knows(&self, at: &str, epoch: u64) -> anyhow::Result<()> {
        let known = |facts: &ClusterFacts| {
            let mut pods = facts.endpoints.iter();
            pods.any(|pod| pod.at == at && pod.epoch == epoch)
        };
        self.until(known)
    }

    /// Until the table is as wanted.
    pub(crate) fn until(&self, wanted: impl Fn(&ClusterFacts) -> bool) -> anyhow::Result<()> {
        let until = Instant::now() + DEADLINE;
        loop {
            let facts = self.facts()?;
            if wanted(&facts) {
                return Ok(());
            }
            ensure!(Instant::now() < until, "at {}: {facts:?}", self.name);
            std::thread::yield_now();
        }
    }
}

/// The nodes a, b and c, and a client that knows no other way than by c.
pub(crate) struct Lab {
    pub(crate) nodes: [Node; 3],
    pub(crate) client: Netns,
    pub(crate) switch: Netns,
}

impl Lab {
    pub(crate) fn new() -> anyhow::Result<Self> {
        require_root();
        let switch = Netns::new()?;
        switch.ip("link add sw0 type bridge forward_delay 0")?;
        switch.ip("link set sw0 up")?;
        let authority = Authority::new()?;
        let node = |number: u8| {
            let tls = authority.node(NAMES[usize::from(number) - 1])?;
            Node::new(&switch, number, tls)
        };
        let nodes = [node(1)?, node(2)?, node(3)?];
        let client = Netns::new()?;
        let c = &nodes[2].netns;
        c.ip("link add eth1 type veth peer name eth0x")?;
        c.ip(&format!("link set eth0x netns {}", client.path().display()))?;
        c.ip("link set eth1 up")?;
        c.ip("addr add 10.79.0.1/24 dev eth1")?;
        c.ip("addr add fd79::1/64 dev eth1 nodad")?;
        c.run("sysctl", "-qw net.ipv4.conf.eth1.forwarding=1")?;
        c.run("sysctl", "-qw net.ipv6.conf.all.forwarding=1")?;
        client.ip("link set eth0x up")?;
        client.ip("addr add 10.79.0.2/24 dev eth0x")?;
        client.ip("addr add fd79::2/64 dev eth0x nodad")?;
        client.ip("route add default via 10.79.0.1")?;
        client.ip("-6 route add default via fd79::1")?;
        let lab = Self {
            nodes,
            client,
            switch,
        };
        for node in &lab.nodes {
            node.until(|facts| facts.peers.iter().all(|peer| peer.up && peer.tells))?;
        }
        Ok(lab)
    }
}

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
            Ok::<_, migrator::network::PortError>(())
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
            Ok::<_, migrator::network::PortError>(())
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
