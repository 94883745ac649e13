//! A pod's port on real devices: nodes and a client in namespaces of their own, joined by a switch.
//! The guest is a thread at the other end of the TAP. Every frame carries its flow and its number, so
//! that a lost, doubled or overtaken one is seen.

use std::collections::BTreeMap;
use std::future::Future;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use migrator::network::{
    ExistingDevices, Ledger, LogItem, LogKind, NodeNetConfig, NodeNetwork, PodNetId, Port, Role,
    Stage, VNET_HEADER,
};
use migrator_tests::netns::{BpfDir, Netns, require_root, set_vnet_header, take_segments_whole};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::sync::mpsc;
use vm_runtime::units::MacAddress;

const DEADLINE: Duration = Duration::from_secs(40);
const POD_MAC: MacAddress = MacAddress([0x52, 0x54, 0, 0, 0, 0x10]);
const CLIENT_MAC: MacAddress = MacAddress([0x52, 0x54, 0, 0, 0, 0x01]);
const MAGIC: [u8; 4] = *b"prob";
/// Offset of the payload: virtio-net header, Ethernet, IPv4, UDP.
const PAYLOAD: usize = VNET_HEADER + 14 + 20 + 8;
const FLOWS: u8 = 8;
/// This flow is broadcast.
const GROUP_FLOW: u8 = FLOWS;

type Job = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A node: its namespace, and a thread in it that runs what it is given.
struct Node {
    jobs: mpsc::UnboundedSender<Job>,
    network: NodeNetwork,
    dir: BpfDir,
    netns: Netns,
}

fn config(dir: &BpfDir) -> NodeNetConfig {
    NodeNetConfig {
        bridge: "br0".into(),
        uplink: "eth0".into(),
        bpffs: dir.path().to_owned(),
    }
}

fn start_thread(netns: &Netns) -> mpsc::UnboundedSender<Job> {
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

fn call<T: Send + 'static>(
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
    fn new(switch: &Netns, number: u32) -> anyhow::Result<Self> {
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

    fn call<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> anyhow::Result<T> {
        call(&self.jobs, work)
    }

    fn attach(
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
    fn restart(&mut self) -> anyhow::Result<()> {
        self.jobs = start_thread(&self.netns);
        self.network = self.call(NodeNetwork::open(config(&self.dir)))??;
        Ok(())
    }

    fn ledger(&self, port: &Port) -> anyhow::Result<Ledger> {
        let port = port.clone();
        Ok(self.call(async move { port.ledger().await })??)
    }
}

/// A bridge forwards on a port only when it has heard of its carrier, which takes the kernel a second.
fn wait_for_port(netns: &Netns, port: &str) -> anyhow::Result<()> {
    wait_until("the port forwards", || {
        netns
            .run("bridge", &format!("link show dev {port}"))
            .is_ok_and(|shown| shown.contains("state forwarding"))
    })
}

fn pod(name: &str, mac: MacAddress, last: u8) -> PodNetId {
    PodNetId {
        name: name.into(),
        mac,
        v4: Some([10, 77, 0, last].into()),
        v6: None,
    }
}

/// Switch, two nodes, and a client that is a pod on a node of its own.
struct Lab {
    a: Node,
    b: Node,
    _client: Node,
    client_tap: OwnedFd,
    _client_port: Port,
    _switch: Netns,
}

impl Lab {
    fn new() -> anyhow::Result<Self> {
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

    fn sender(&self, count: u64) -> anyhow::Result<Sender> {
        Ok(Sender::start(self.client_tap.try_clone()?, count))
    }
}

fn probe(flow: u8, number: u64) -> Vec<u8> {
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
fn finish_ipv4(frame: &mut [u8]) {
    let header = &mut frame[VNET_HEADER + 14..VNET_HEADER + 34];
    let sum: u32 = header
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    header[10..12].copy_from_slice(&(!(folded as u16)).to_be_bytes());
}

/// Sends numbered frames at about 15,000 a second.
struct Sender {
    sent: Arc<AtomicUsize>,
    thread: JoinHandle<BTreeMap<u8, u64>>,
}

impl Sender {
    fn start(tap: OwnedFd, count: u64) -> Self {
        let sent = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&sent);
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
                counter.fetch_add(1, Ordering::Relaxed);
                if i % 15 == 14 {
                    next += Duration::from_millis(1);
                    std::thread::sleep(next.saturating_duration_since(Instant::now()));
                }
            }
            numbers
        });
        Self { sent, thread }
    }

    fn wait_for(&self, count: usize) -> anyhow::Result<()> {
        wait_until("the sender gets on", || {
            self.sent.load(Ordering::Relaxed) >= count
        })
    }

    fn finish(self) -> BTreeMap<u8, u64> {
        self.thread.join().expect("the sender")
    }
}

fn wait_until(what: &str, done: impl Fn() -> bool) -> anyhow::Result<()> {
    let until = Instant::now() + DEADLINE;
    while !done() {
        ensure!(Instant::now() < until, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// What the guest has got, wherever it ran.
#[derive(Clone, Default)]
struct Inbox(Arc<Mutex<Vec<(u8, u64)>>>);

impl Inbox {
    fn len(&self) -> usize {
        self.0.lock().expect("the inbox").len()
    }

    /// Every frame of every flow came once, and in order.
    fn check(&self, sent: &BTreeMap<u8, u64>) -> anyhow::Result<()> {
        let total: u64 = sent.values().sum();
        // A frame too many is as wrong as one too few, so the wait ends at the first of the two.
        let waited = wait_until("all frames arrive", || self.len() as u64 >= total);
        let mut next = BTreeMap::new();
        let mut wrong = Vec::new();
        for (flow, number) in self.0.lock().expect("the inbox").iter() {
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
        waited?;
        ensure!(&next == sent, "{next:?} came, {sent:?} was sent");
        Ok(())
    }
}

/// The thread at the other end of the TAP.
struct Guest {
    runs: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Guest {
    fn start(tap: OwnedFd, inbox: &Inbox) -> Self {
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
                    inbox.0.lock().expect("the inbox").push(arrival);
                }
            }
        });
        Self { runs, thread }
    }

    /// Stops reading; what is in the TAP stays there.
    fn stop(self) {
        self.runs.store(false, Ordering::Release);
        self.thread.join().expect("the guest");
    }
}

fn parse(frame: &[u8]) -> Option<(u8, u64)> {
    let payload = frame.get(PAYLOAD..)?;
    let (magic, rest) = payload.split_first_chunk::<4>()?;
    let (flow, rest) = rest.split_first()?;
    let number = rest.first_chunk::<8>()?;
    (*magic == MAGIC).then(|| (*flow, u64::from_be_bytes(*number)))
}

/// The guest says something, so that the switch learns where it is.
fn say_hello(port: &Port) -> anyhow::Result<()> {
    let mut frame = vec![0; VNET_HEADER];
    frame.extend([0xff; 6]);
    frame.extend(POD_MAC.0);
    frame.extend([0x08, 0x06]);
    frame.resize(VNET_HEADER + 60, 0);
    nix::unistd::write(port.tap_fd()?.as_fd(), &frame)?;
    Ok(())
}

/// The wire: hands items over, and acknowledgements back.
fn connect(
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

/// One migration, as the conductor runs it.
fn migrate(
    (from, source, guest): (&Node, &Port, Guest),
    (to, slot): (&Node, u16),
    inbox: &Inbox,
) -> anyhow::Result<(Port, Guest)> {
    let destination = to.attach(&pod("pod", POD_MAC, 10), slot, Role::Incoming, None)?;
    let (sink, log) = mpsc::unbounded_channel();
    connect(log, source.clone(), destination.clone(), to)?;
    let port = source.clone();
    from.call(async move {
        port.reset_ledger().await?;
        port.hold(sink).await?;
        port.drain_tap(Duration::from_millis(5)).await;
        Ok::<_, migrator::network::PortError>(())
    })??;
    guest.stop();
    let port = source.clone();
    from.call(async move { port.residue().await })??;
    let port = destination.clone();
    to.call(async move { port.open().await })??;
    let guest = Guest::start(destination.tap_fd()?, inbox);
    let port = source.clone();
    from.call(async move { port.forward().await })??;
    let port = destination.clone();
    to.call(async move { port.settle().await })??;
    Ok((destination, guest))
}

fn check_ledger(ledger: &Ledger) -> anyhow::Result<()> {
    ensure!(ledger.balances(), "{ledger:?}");
    ensure!(ledger.lost == 0, "{ledger:?}");
    ensure!(ledger.held == 0, "{ledger:?}");
    Ok(())
}

#[test]
fn a_pod_moves_there_and_back_under_load_and_no_frame_is_lost() -> anyhow::Result<()> {
    let lab = Lab::new()?;
    let inbox = Inbox::default();
    let at_a = lab
        .a
        .attach(&pod("pod", POD_MAC, 10), 1, Role::Local, None)?;
    let guest = Guest::start(at_a.tap_fd()?, &inbox);
    say_hello(&at_a)?;
    let sender = lab.sender(50_000)?;

    sender.wait_for(10_000)?;
    let (at_b, guest) = migrate((&lab.a, &at_a, guest), (&lab.b, 7), &inbox)?;
    sender.wait_for(20_000)?;
    let port = at_a.clone();
    let ledger = lab.a.call(async move { port.release().await })??;
    check_ledger(&ledger)?;
    ensure!(ledger.forwarded > 0, "{ledger:?}");
    ensure!(
        ledger.reasons.refused_echo > 0,
        "the end marker: {ledger:?}"
    );
    let arrived = lab.b.ledger(&at_b)?;
    ensure!(arrived.reasons.end_timeouts == 0, "{arrived:?}");
    ensure!(
        arrived.reasons.log_received == ledger.forwarded,
        "{arrived:?} {ledger:?}"
    );

    sender.wait_for(30_000)?;
    let (at_a, guest) = migrate((&lab.b, &at_b, guest), (&lab.a, 2), &inbox)?;
    sender.wait_for(40_000)?;
    let port = at_b.clone();
    check_ledger(&lab.b.call(async move { port.release().await })??)?;

    let sent = sender.finish();
    inbox.check(&sent)?;
    let ledger = lab.a.ledger(&at_a)?;
    check_ledger(&ledger)?;
    ensure!(at_a.stage() == Stage::Local);
    guest.stop();
    let port = at_a.clone();
    lab.a.call(async move { port.discard().await })??;
    ensure!(lab.a.netns.ip("link show mt2").is_err(), "the TAP is gone");
    Ok(())
}

#[test]
fn an_aborted_move_gives_every_frame_back_in_order() -> anyhow::Result<()> {
    let lab = Lab::new()?;
    let inbox = Inbox::default();
    let at_a = lab
        .a
        .attach(&pod("pod", POD_MAC, 10), 1, Role::Local, None)?;
    let guest = Guest::start(at_a.tap_fd()?, &inbox);
    say_hello(&at_a)?;
    let sender = lab.sender(30_000)?;

    sender.wait_for(5_000)?;
    let at_b = lab
        .b
        .attach(&pod("pod", POD_MAC, 10), 1, Role::Incoming, None)?;
    let (sink, log) = mpsc::unbounded_channel();
    connect(log, at_a.clone(), at_b.clone(), &lab.b)?;
    guest.stop();
    let port = at_a.clone();
    lab.a.call(async move {
        port.hold(sink).await?;
        port.residue().await
    })??;
    sender.wait_for(15_000)?;
    let port = at_b.clone();
    lab.b.call(async move { port.discard().await })??;
    let port = at_a.clone();
    lab.a.call(async move { port.rollback().await })??;
    let guest = Guest::start(at_a.tap_fd()?, &inbox);

    let sent = sender.finish();
    inbox.check(&sent)?;
    let port = at_a.clone();
    lab.a
        .call(async move { port.reached(Stage::Local).await })??;
    let ledger = lab.a.ledger(&at_a)?;
    check_ledger(&ledger)?;
    ensure!(ledger.reasons.residue > 0, "{ledger:?}");
    guest.stop();
    Ok(())
}

#[test]
fn a_pod_gets_its_frames_while_no_service_runs_and_the_next_one_takes_over() -> anyhow::Result<()> {
    let mut lab = Lab::new()?;
    let inbox = Inbox::default();
    let at_a = lab
        .a
        .attach(&pod("pod", POD_MAC, 10), 1, Role::Local, None)?;
    // What the VMM holds.
    let (tap, park) = (at_a.tap_fd()?, at_a.park_fd()?);
    let guest = Guest::start(tap.try_clone()?, &inbox);
    say_hello(&at_a)?;
    let sender = lab.sender(30_000)?;

    sender.wait_for(5_000)?;
    drop(at_a);
    sender.wait_for(10_000)?;
    lab.a.restart()?;
    ensure!(lab.a.network.slots() == [1]);
    let existing = ExistingDevices { tap, park };
    let at_a = lab
        .a
        .attach(&pod("pod", POD_MAC, 10), 1, Role::Local, Some(existing))?;
    ensure!(at_a.stage() == Stage::Local);
    sender.wait_for(15_000)?;
    let (at_b, guest) = migrate((&lab.a, &at_a, guest), (&lab.b, 1), &inbox)?;
    let sent = sender.finish();
    inbox.check(&sent)?;
    guest.stop();
    let port = at_a.clone();
    check_ledger(&lab.a.call(async move { port.release().await })??)?;
    check_ledger(&lab.b.ledger(&at_b)?)
}

/// A TCP segment of 40 KB that is to be cut at 1448 bytes, its checksum unfinished.
fn segment(number: u8) -> Vec<u8> {
    // struct virtio_net_hdr: NEEDS_CSUM, TCPV4, header length, segment size, checksum start and offset.
    let mut frame = vec![1, 1];
    for field in [54u16, 1448, 34, 16] {
        frame.extend(field.to_le_bytes());
    }
    let total: u16 = 20 + 20 + 40_000;
    frame.extend(POD_MAC.0);
    frame.extend(CLIENT_MAC.0);
    frame.extend([0x08, 0x00, 0x45, 0]);
    frame.extend(total.to_be_bytes());
    frame.extend([0, number, 0x40, 0, 64, 6, 0, 0]);
    frame.extend([10, 77, 1, 1, 10, 77, 0, 10]);
    frame.extend([0x14, 0x51, 0x14, 0x51, 0, 0, 0, number, 0, 0, 0, 0]);
    frame.extend([0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    frame.resize(VNET_HEADER + 14 + usize::from(total), number);
    finish_ipv4(&mut frame);
    frame
}

/// What must survive: everything but the header length, a hint that the kernel sets as it likes.
fn essence(frame: &[u8]) -> (&[u8], &[u8]) {
    (&frame[..2], &frame[4..])
}

fn read_frame(tap: &OwnedFd, header: usize) -> anyhow::Result<Vec<u8>> {
    let mut buffer = vec![0; 70_000];
    loop {
        let mut fds = [PollFd::new(tap.as_fd(), PollFlags::POLLIN)];
        ensure!(poll(&mut fds, PollTimeout::from(5_000u16))? > 0, "no frame");
        let len = nix::unistd::read(tap.as_fd(), &mut buffer)?;
        // Multicast of the bridges may come between.
        if buffer.get(header + 6..header + 12) == Some(&CLIENT_MAC.0) {
            return Ok([&buffer[..VNET_HEADER], &buffer[header..len]].concat());
        }
    }
}

#[test]
fn a_segment_crosses_park_residue_and_log_whole() -> anyhow::Result<()> {
    let lab = Lab::new()?;
    take_segments_whole(lab.client_tap.as_fd())?;
    let at_a = lab
        .a
        .attach(&pod("pod", POD_MAC, 10), 1, Role::Local, None)?;
    let at_b = lab
        .b
        .attach(&pod("pod", POD_MAC, 10), 1, Role::Incoming, None)?;
    for port in [&at_a, &at_b] {
        let tap = port.tap_fd()?;
        take_segments_whole(tap.as_fd())?;
        set_vnet_header(tap.as_fd(), 12)?;
    }
    say_hello_12(&at_a)?;
    let frames: Vec<_> = (1..=3).map(segment).collect();

    // The first is left in the TAP, the second parked.
    nix::unistd::write(lab.client_tap.as_fd(), &frames[0])?;
    let (sink, mut log) = mpsc::unbounded_channel();
    let port = at_a.clone();
    lab.a.call(async move { port.hold(sink).await })??;
    nix::unistd::write(lab.client_tap.as_fd(), &frames[1])?;
    let port = at_a.clone();
    lab.a.call(async move { port.residue().await })??;
    let mut seen = Vec::new();
    while seen.len() < 2 {
        let item = log.blocking_recv().context("the log")?;
        if item.frame.get(VNET_HEADER + 6..VNET_HEADER + 12) == Some(&CLIENT_MAC.0) {
            seen.push(item.kind);
            let sent = match item.kind {
                LogKind::Residue => &frames[0],
                LogKind::Frame => &frames[1],
                LogKind::ResidueEnd | LogKind::End => anyhow::bail!("{item:?}"),
            };
            ensure!(essence(&item.frame) == essence(sent), "{:?}", item.kind);
        }
        at_b.log_input(item)?;
    }
    while let Ok(item) = log.try_recv() {
        at_b.log_input(item)?;
    }
    let port = at_b.clone();
    lab.b.call(async move { port.open().await })??;
    let tap = at_b.tap_fd()?;
    for sent in &frames[..2] {
        let frame = read_frame(&tap, 12)?;
        ensure!(essence(&frame) == essence(sent));
    }
    let port = at_b.clone();
    lab.b.call(async move { port.settle().await })??;
    nix::unistd::write(lab.client_tap.as_fd(), &frames[2])?;
    let frame = read_frame(&tap, 12)?;
    ensure!(
        essence(&frame) == essence(&frames[2]),
        "{} bytes, {:02x?}",
        frame.len(),
        &frame[..80.min(frame.len())]
    );
    Ok(())
}

/// As [`say_hello`], from a TAP with a header of 12 bytes.
fn say_hello_12(port: &Port) -> anyhow::Result<()> {
    let mut frame = vec![0; 12];
    frame.extend([0xff; 6]);
    frame.extend(POD_MAC.0);
    frame.extend([0x08, 0x06]);
    frame.resize(12 + 60, 0);
    nix::unistd::write(port.tap_fd()?.as_fd(), &frame)?;
    Ok(())
}
