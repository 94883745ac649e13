//! Nodes, a client and a guest in namespaces of their own.

use std::collections::BTreeMap;
use std::future::Future;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use migrator::network::{
    ExistingDevices, Ledger, LogItem, NodeNetConfig, NodeNetwork, PodNetId, Port, Role, VNET_HEADER,
};
use migrator_tests::netns::{BpfDir, Netns, require_root};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::sync::mpsc;
use vm_runtime::units::MacAddress;

pub(crate) const DEADLINE: Duration = Duration::from_secs(40);
pub(crate) const POD_MAC: MacAddress = MacAddress([0x52, 0x54, 0, 0, 0, 0x10]);
pub(crate) const CLIENT_MAC: MacAddress = MacAddress([0x52, 0x54, 0, 0, 0, 0x01]);
pub(crate) const MAGIC: [u8; 4] = *b"prob";
/// Offset of the payload: virtio-net header, Ethernet, IPv4, UDP.
pub(crate) const PAYLOAD: usize = VNET_HEADER + 14 + 20 + 8;
pub(crate) const FLOWS: u8 = 8;
/// This flow is broadcast.
pub(crate) const GROUP_FLOW: u8 = FLOWS;

pub(crate) type Job = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A node: its namespace, and a thread in it that runs what it is given.
pub(crate) struct Node {
    pub(crate) jobs: mpsc::UnboundedSender<Job>,
    pub(crate) network: NodeNetwork,
    pub(crate) dir: BpfDir,
    pub(crate) netns: Netns,
}

pub(crate) fn config(dir: &BpfDir) -> NodeNetConfig {
    NodeNetConfig {
        bridge: "br0".into(),
        uplink: "eth0".into(),
        bpffs: dir.path().to_owned(),
    }
}

pub(crate) fn start_thread(netns: &Netns) -> mpsc::UnboundedSender<Job> {
    let (jobs, mut queue) = mpsc::unbounded_channel::<Job>();
    netns.spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            while let Some(job) = queue.recv().await {
                tokio::spawn(job);
            }
        });
    });
    jobs
}

pub(crate) fn call<T: Send + 'static>(
    jobs: &mpsc::UnboundedSender<Job>,
    work: impl Future<Output = T> + Send + 'static,
) -> anyhow::Result<T> {
    let (reply, answer) = std::sync::mpsc::channel();
    let job = async move {
        let _ = reply.send(work.await);
    };
    jobs.send(Box::pin(job)).ok().context("the node's thread")?;
    Ok(answer.recv_timeout(DEADLINE)?)
}

impl Node {
    /// A node whose bridge has a cable to the switch.
    pub(crate) fn new(switch: &Netns, number: u32) -> anyhow::Result<Self> {
        let netns = Netns::new()?;
        netns.ip("link add br0 type bridge forward_delay 0")?;
        netns.ip(&format!("link add eth0 type veth peer name p{number}"))?;
        let to_switch = switch.path();
        netns.ip(&format!("link set p{number} netns {}", to_switch.display()))?;
        netns.ip("link set eth0 master br0 up")?;
        netns.ip("link set br0 up")?;
        switch.ip(&format!("link set p{number} master sw0 up"))?;
        let jobs = start_thread(&netns);
        let dir = BpfDir::new()?;
        let network = call(&jobs, NodeNetwork::open(config(&dir)))??;
        Ok(Self {
            jobs,
            network,
            dir,
            netns,
        })
    }

    pub(crate) fn call<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> anyhow::Result<T> {
        call(&self.jobs, work)
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
        self.jobs = start_thread(&self.netns);
        self.network = self.call(NodeNetwork::open(config(&self.dir)))??;
        Ok(())
    }

    pub(crate) fn ledger(&self, port: &Port) -> anyhow::Result<Ledger> {
        let port = port.clone();
        Ok(self.call(async move { port.ledger().await })??)
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
    _switch: Netns,
}

impl Lab {
    pub(crate) fn new() -> anyhow::Result<Self> {
        require_root();
        let switch = Netns::new()?;
        switch.ip("link add sw0 type bridge forward_delay 0")?;
        switch.ip("link set sw0 up")?;
        let a = Node::new(&switch, 1)?;
        let b = Node::new(&switch, 2)?;
        let client = Node::new(&switch, 3)?;
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
            _switch: switch,
        })
    }

    pub(crate) fn sender(&self, count: u64) -> anyhow::Result<Sender> {
        Ok(Sender::start(self.client_tap.try_clone()?, count))
    }
}

pub(crate) fn probe(flow: u8, number: u64) -> Vec<u8> {
    let mut frame = vec![0; VNET_HEADER];
    let group = flow == GROUP_FLOW;
    frame.extend(if group { [0xff; 6] } else { POD_MAC.0 });
    frame.extend(CLIENT_MAC.0);
    frame.extend([0x08, 0x00, 0x45, 0, 0, 60, 0, 0, 0, 0, 64, 17, 0, 0]);
    frame.extend([10, 77, 1, flow, 10, 77, 0, 10]);
    frame.extend([0, 7, 0, 7, 0, 40, 0, 0]);
    frame.extend(MAGIC);
    frame.push(flow);
    frame.extend(number.to_be_bytes());
    frame.resize(VNET_HEADER + 74, 0);
    finish_ipv4(&mut frame);
    frame
}

/// Fills in the header's checksum: the netfilter hooks of a bridge drop a packet without it.
pub(crate) fn finish_ipv4(frame: &mut [u8]) {
    let header = &mut frame[VNET_HEADER + 14..VNET_HEADER + 34];
    let sum: u32 = header
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    header[10..12].copy_from_slice(&(!(folded as u16)).to_be_bytes());
}

/// Sends numbered frames at about 15,000 a second.
pub(crate) struct Sender {
    sent: Arc<Watched<u64>>,
    thread: JoinHandle<BTreeMap<u8, u64>>,
}

impl Sender {
    pub(crate) fn start(tap: OwnedFd, count: u64) -> Self {
        let sent = Arc::new(Watched::default());
        let progress = Arc::clone(&sent);
        let thread = std::thread::spawn(move || {
            let mut numbers = BTreeMap::new();
            let mut next = Instant::now();
            for i in 0..count {
                let flow = if i % 40 == 39 {
                    GROUP_FLOW
                } else {
                    (i % u64::from(FLOWS)) as u8
                };
                let number = numbers.entry(flow).or_insert(0);
                nix::unistd::write(tap.as_fd(), &probe(flow, *number)).expect("the client sends");
                *number += 1;
                if i % 15 == 14 {
                    progress.change(|sent| *sent = i + 1);
                    next += Duration::from_millis(1);
                    // Not a wait for anything: this is the pace of the traffic.
                    std::thread::sleep(next.saturating_duration_since(Instant::now()));
                }
            }
            progress.change(|sent| *sent = count);
            numbers
        });
        Self { sent, thread }
    }

    pub(crate) fn wait_for(&self, count: u64) -> anyhow::Result<()> {
        let sent = self.sent.wait_for(|sent| *sent >= count);
        ensure!(*sent >= count, "the sender stopped after {} frames", *sent);
        Ok(())
    }

    pub(crate) fn finish(self) -> BTreeMap<u8, u64> {
        self.thread.join().expect("the sender")
    }
}

/// A value that one thread changes and another waits for.
#[derive(Default)]
struct Watched<T> {
    value: Mutex<T>,
    changed: Condvar,
}

impl<T> Watched<T> {
    fn change(&self, how: impl FnOnce(&mut T)) {
        how(&mut self.value.lock().expect("not poisoned"));
        self.changed.notify_all();
    }

    /// The value as soon as it is as wanted, or after [`DEADLINE`] as it is then.
    fn wait_for(&self, wanted: impl Fn(&T) -> bool) -> MutexGuard<'_, T> {
        let value = self.value.lock().expect("not poisoned");
        let waited = self
            .changed
            .wait_timeout_while(value, DEADLINE, |value| !wanted(value));
        waited.expect("not poisoned").0
    }
}

/// What the guest has got, wherever it ran.
#[derive(Clone, Default)]
pub(crate) struct Inbox(Arc<Watched<Vec<(u8, u64)>>>);

impl Inbox {
    /// Every frame of every flow came once, and in order.
    pub(crate) fn check(&self, sent: &BTreeMap<u8, u64>) -> anyhow::Result<()> {
        let total: u64 = sent.values().sum();
        // A frame too many is as wrong as one too few, so the wait ends at the first of the two.
        let arrived = self.0.wait_for(|arrived| arrived.len() as u64 >= total);
        let mut next = BTreeMap::new();
        let mut wrong = Vec::new();
        for (flow, number) in arrived.iter() {
            let expected = next.entry(*flow).or_insert(0);
            if number != expected {
                wrong.push(format!("flow {flow}: {number} came, {expected} was due"));
            }
            *expected = number + 1;
        }
        ensure!(
            wrong.is_empty(),
            "{} breaks: {:?}",
            wrong.len(),
            &wrong[..wrong.len().min(10)]
        );
        ensure!(&next == sent, "{next:?} came, {sent:?} was sent");
        Ok(())
    }
}

/// The thread at the other end of the TAP.
pub(crate) struct Guest {
    runs: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Guest {
    pub(crate) fn start(tap: OwnedFd, inbox: &Inbox) -> Self {
        let runs = Arc::new(AtomicBool::new(true));
        let (go_on, inbox) = (Arc::clone(&runs), inbox.clone());
        let thread = std::thread::spawn(move || {
            let mut buffer = vec![0; 70_000];
            while go_on.load(Ordering::Acquire) {
                let mut fds = [PollFd::new(tap.as_fd(), PollFlags::POLLIN)];
                poll(&mut fds, PollTimeout::from(5u8)).expect("poll");
                if !go_on.load(Ordering::Acquire) {
                    break;
                }
                let Ok(len) = nix::unistd::read(tap.as_fd(), &mut buffer) else {
                    continue;
                };
                if let Some(arrival) = parse(&buffer[..len]) {
                    inbox.0.change(|arrived| arrived.push(arrival));
                }
            }
        });
        Self { runs, thread }
    }

    /// Stops reading; what is in the TAP stays there.
    pub(crate) fn stop(self) {
        self.runs.store(false, Ordering::Release);
        self.thread.join().expect("the guest");
    }
}

pub(crate) fn parse(frame: &[u8]) -> Option<(u8, u64)> {
    let payload = frame.get(PAYLOAD..)?;
    let (magic, rest) = payload.split_first_chunk::<4>()?;
    let (flow, rest) = rest.split_first()?;
    let number = rest.first_chunk::<8>()?;
    (*magic == MAGIC).then(|| (*flow, u64::from_be_bytes(*number)))
}

/// The guest says something, so that the switch learns where it is.
pub(crate) fn say_hello(port: &Port) -> anyhow::Result<()> {
    let mut frame = vec![0; VNET_HEADER];
    frame.extend([0xff; 6]);
    frame.extend(POD_MAC.0);
    frame.extend([0x08, 0x06]);
    frame.resize(VNET_HEADER + 60, 0);
    nix::unistd::write(port.tap_fd()?.as_fd(), &frame)?;
    Ok(())
}

/// The wire: hands items over, and acknowledgements back.
pub(crate) fn connect(
    mut log: mpsc::UnboundedReceiver<LogItem>,
    source: Port,
    destination: Port,
    on: &Node,
) -> anyhow::Result<()> {
    let mut acked = destination.acked();
    on.jobs
        .send(Box::pin(async move {
            while let Some(item) = log.recv().await {
                if destination.log_input(item).is_err() {
                    break;
                }
            }
        }))
        .ok()
        .context("the node's thread")?;
    on.jobs
        .send(Box::pin(async move {
            while acked.changed().await.is_ok() {
                source.ack(*acked.borrow());
            }
        }))
        .ok()
        .context("the node's thread")
}
