//! Three nodes of a routed cluster in namespaces of their own, joined by a switch, and a client behind the third. Everything is real but the guests: the
//! programs, the routes, the tunnels, and the TLS connections over which the nodes tell each other where pods are.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use migrator::directory::Directory;
use migrator::network::{
    Cluster, ClusterFacts, Ground, Ledger, NodeNetConfig, NodeNetwork, ParkLimits, PodNetId,
    PodNetwork, PodNetworks, Port, Role, TunnelConfig, XdpChoice,
};
use migrator::wire::preamble::Shape;
use migrator::wire::session::{Limits, Listener};
use migrator::wire::tls::{TlsConfig, dns_name};
use migrator_tests::jobs::Jobs;
use migrator_tests::netns::{BpfDir, Netns, require_root};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use vm_runtime::units::MacAddress;

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

pub(crate) fn address(number: u8) -> IpAddr {
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
    pub(crate) number: u8,
    /// Ends what the nodes tell each other, here.
    service: CancellationToken,
    dir: BpfDir,
    spool: TempDir,
    pub(crate) netns: Netns,
}

pub(crate) fn peers(name: &str) -> BTreeMap<String, IpAddr> {
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
        netns.ip(&format!(
            "link add eth0 type veth peer name p{number} netns {}",
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
        let switch = Netns::switch()?;
        let authority = Authority::new()?;
        let node = |number: u8| {
            let tls = authority.node(NAMES[usize::from(number) - 1])?;
            Node::new(&switch, number, tls)
        };
        let nodes = [node(1)?, node(2)?, node(3)?];
        let client = Netns::new()?;
        let c = &nodes[2].netns;
        c.keeps_order()?;
        c.ip("link add eth1 type veth peer name eth0x")?;
        c.ip(&format!("link set eth0x netns {}", client.path().display()))?;
        c.ip("link set eth1 up")?;
        c.ip("addr add 10.79.0.1/24 dev eth1")?;
        c.ip("addr add fd79::1/64 dev eth1 nodad")?;
        c.sysctl("net/ipv4/conf/eth1/forwarding", "1")?;
        c.sysctl("net/ipv6/conf/all/forwarding", "1")?;
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
