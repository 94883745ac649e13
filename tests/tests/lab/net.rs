//! The network as the command line shows it: before, during and after a move, and frame by frame.

use std::io::{BufRead, BufReader};
use std::net::UdpSocket;
use std::process::{Child, ChildStdout, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use migrator::api::net_types::{NodeNet, PodNet, TraceEnd, TraceFrame, TraceLine};
use migrator::migration::status::{Outcome, Phase};
use migrator_tests::lab::{POD, POD_IPV4, SOON, TestLab};
use xtask::lab::Node;
use xtask::netns;
use xtask::process::poll_until;

fn show(test: &TestLab, node: Node) -> Result<PodNet> {
    test.get(node, &format!("/v1/net/{POD}"))
}

fn count(net: &PodNet, name: &str) -> u64 {
    let counter = net.port.counters.iter().find(|c| c.name == name);
    counter.map_or(0, |counter| counter.frames)
}

/// `net trace` of the pod, running.
struct Trace {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Trace {
    /// Returns once the programs tell.
    fn start(test: &TestLab, node: Node, options: &[&str]) -> Result<Self> {
        let mut child = test
            .lab()
            .on(node)
            .args(["--output", "json", "net", "trace", POD])
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let lines = BufReader::new(child.stdout.take().context("no output")?);
        let mut trace = Self { child, lines };
        match trace.next()? {
            Some(TraceLine::Started { pod, node: at }) => {
                ensure!(pod == POD && at == node.name(), "{pod} on {at}");
                Ok(trace)
            }
            other => bail!("it begins with {other:?}"),
        }
    }

    fn next(&mut self) -> Result<Option<TraceLine>> {
        let mut line = String::new();
        if self.lines.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        serde_json::from_str(&line).with_context(|| format!("it prints {line}"))
    }

    /// The first frame that is as wanted.
    fn find(&mut self, wanted: impl Fn(&TraceFrame) -> bool) -> Result<TraceFrame> {
        let until = Instant::now() + SOON;
        while Instant::now() < until {
            match self.next()?.context("it ends")? {
                TraceLine::Frame(frame) if wanted(&frame) => return Ok(*frame),
                TraceLine::Frame(_) | TraceLine::Missed { .. } | TraceLine::Started { .. } => {}
                TraceLine::Ended { reason, .. } => bail!("it ends: {reason:?}"),
            }
        }
        bail!("no such frame")
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn is_quiet(test: &TestLab, node: Node) -> Result<()> {
    let quiet = poll_until(SOON, || show(test, node).is_ok_and(|net| !net.port.traced));
    ensure!(quiet, "the pod's frames are still told");
    Ok(())
}

/// Whether a gate in this mode sends frames to the node that the pod has gone to.
fn away(mode: &str) -> bool {
    matches!(mode, "forward" | "tunnel")
}

#[test]
fn net_show_tells_where_a_pods_frames_go_before_during_and_after_its_move() -> Result<()> {
    let test = TestLab::with_pod()?;
    let before = show(&test, Node::A)?;
    let port = &before.port;
    ensure!(before.node == "a" && before.peer.is_none(), "{before:?}");
    ensure!(
        port.stage == "local" && port.gate.mode == "local",
        "{before:?}"
    );
    ensure!(
        port.gate.may_send && port.balances && !port.traced,
        "{before:?}"
    );
    ensure!(
        count(&before, "passed") > 0 && count(&before, "sent") > 0,
        "{before:?}"
    );
    ensure!(count(&before, "parked_hold") == 0, "{before:?}");
    for hook in &port.hooks {
        ensure!(hook.pinned && hook.link_id.is_some(), "{hook:?}");
        let running = hook.running.as_ref().context("nothing runs there")?;
        ensure!(
            running.name == hook.program && running.tag.len() == 16,
            "{hook:?}"
        );
    }
    ensure!(
        port.hooks.len() == 2 && port.tap.length == 65536,
        "{before:?}"
    );
    let text = test.succeeds(Node::A, &["net", "show", POD])?;
    for word in [
        "demo on a",
        "local",
        "passed straight to its TAP",
        "may send",
        "tcx egress",
    ] {
        ensure!(text.contains(word), "`{word}` is missing: {text}");
    }
    let node: NodeNet = test.get(Node::A, "/v1/net")?;
    ensure!(
        node.pods.len() == 1 && node.facts.programs.len() >= 2,
        "{node:?}"
    );
    ensure!(
        node.facts.maps.iter().any(|map| map.name == "GATES"),
        "{node:?}"
    );
    let text = test.succeeds(Node::B, &["net", "show"])?;
    ensure!(text.contains("br0") && !text.contains(POD), "{text}");

    // What the programs told, and what was shown meanwhile.
    let mut trace = Trace::start(&test, Node::A, &[])?;
    let id = test.begins(Node::A, &[])?;
    let mut modes = Vec::new();
    let mut last = None;
    let until = Instant::now() + SOON;
    let left = loop {
        let net = match show(&test, Node::A) {
            Ok(net) => net,
            Err(left) => break left,
        };
        ensure!(Instant::now() < until, "it stays on a");
        ensure!(net.port.balances, "{net:?}");
        if modes.last() != Some(&net.port.gate.mode) {
            modes.push(net.port.gate.mode.clone());
        }
        last = Some(net).filter(|net| away(&net.port.gate.mode)).or(last);
    };
    let last = last.with_context(|| format!("never seen to forward: {modes:?}, then {left:#}"))?;
    ensure!(
        !last.port.gate.may_send && count(&last, "parked_hold") > 0,
        "{last:?}"
    );
    ensure!(last.port.gate.flipped_unix_ms.is_some(), "{last:?}");
    let peer = last.peer.as_ref().context("nobody is forwarded to")?;
    ensure!(peer.node == "b" && peer.migration == id, "{last:?}");
    let mut told = Vec::new();
    let ended = loop {
        match trace.next()?.context("no last word")? {
            TraceLine::Frame(frame) if told.last() != Some(&frame.mode) => told.push(frame.mode),
            TraceLine::Ended { reason, .. } => break reason,
            TraceLine::Frame(_) | TraceLine::Missed { .. } | TraceLine::Started { .. } => {}
        }
    };
    ensure!(ended == TraceEnd::PodGone, "{ended:?}");
    // Late frames may be so few that none comes before the tunnel is open.
    let (here, gone) = told.split_at(told.len().min(2));
    ensure!(here == ["local", "hold"], "{told:?}");
    ensure!(
        !gone.is_empty() && gone.iter().all(|mode| away(mode)),
        "{told:?}"
    );
    ensure!(
        modes.first().is_some_and(|mode| mode == "local"),
        "{modes:?}"
    );

    let status = test.comes_to(Node::A, &id, "its end", |status| {
        status.phase == Phase::Done
    })?;
    let report = status.report.context("no report")?;
    ensure!(report.outcome == Outcome::Completed, "{report:?}");
    ensure!(
        report.packets.unaccounted == 0 && report.packets.lost == 0,
        "{report:?}"
    );
    test.runs_on(Node::B)?;
    let after = show(&test, Node::B)?;
    ensure!(
        after.port.stage == "local" && after.port.gate.may_send,
        "{after:?}"
    );
    let gone = test.says(Node::A, &["net", "show", POD])?;
    ensure!(gone.code == Some(3), "{gone:?}");
    ensure!(gone.err.contains("net show"), "{gone:?}");
    test.end()
}

/// A datagram to the pod from this port of the client's.
fn send_from(test: &TestLab, port: u16, to: u16) -> Result<()> {
    netns::within(&test.lab().client(), || {
        let socket = UdpSocket::bind(("0.0.0.0", port))?;
        socket.send_to(b"ping", (POD_IPV4, to))?;
        Ok(())
    })
}

#[test]
fn net_trace_shows_what_is_sent_to_a_pod_and_leaves_nothing_on() -> Result<()> {
    let test = TestLab::with_pod()?;
    let mut trace = Trace::start(&test, Node::A, &[])?;
    ensure!(show(&test, Node::A)?.port.traced);
    send_from(&test, 45454, 7001)?;
    let ours = |frame: &TraceFrame| {
        let head = frame.head.as_ref();
        head.is_some_and(|head| head.source_port == Some(45454))
    };
    let frame = trace.find(ours)?;
    let head = frame.head.as_ref().context("no head")?;
    ensure!(
        head.protocol == "udp" && head.destination_port == Some(7001),
        "{frame:?}"
    );
    ensure!(head.destination == Some(POD_IPV4.parse()?), "{frame:?}");
    ensure!(
        frame.direction == "in" && frame.verdict == "pass",
        "{frame:?}"
    );
    ensure!(
        ["passed", "fast"].contains(&frame.counter.as_str()) && frame.mode == "local",
        "{frame:?}"
    );
    ensure!(
        frame.length == 14 + 20 + 8 + 4 && frame.bucket.is_some(),
        "{frame:?}"
    );
    // Nobody listens on that port, and the guest says so.
    let refused = |frame: &TraceFrame| {
        let head = frame.head.as_ref();
        frame.direction == "out" && head.is_some_and(|head| head.protocol == "icmp")
    };
    ensure!(trace.find(refused)?.counter == "sent");
    // Killed, as Drop does it.
    drop(trace);
    is_quiet(&test, Node::A)?;

    // Two at a time; the one that ends first leaves the other's on.
    let mut other = Trace::start(&test, Node::A, &[])?;
    let text = test.succeeds(Node::A, &["net", "trace", POD, "--count", "5"])?;
    ensure!(text.lines().count() == 5, "{text}");
    ensure!(text.contains(POD_IPV4), "{text}");
    ensure!(show(&test, Node::A)?.port.traced);
    send_from(&test, 45455, 7001)?;
    other.find(|frame| {
        let head = frame.head.as_ref();
        head.is_some_and(|head| head.source_port == Some(45455))
    })?;
    drop(other);
    is_quiet(&test, Node::A)?;

    let mut timed = Trace::start(&test, Node::A, &["--seconds", "1"])?;
    let ended = loop {
        if let TraceLine::Ended { reason, .. } = timed.next()?.context("no last word")? {
            break reason;
        }
    };
    ensure!(ended == TraceEnd::Time, "{ended:?}");
    drop(timed);
    is_quiet(&test, Node::A)?;

    // A service that is killed leaves the programs to themselves: the next one finds nothing on.
    let trace = Trace::start(&test, Node::A, &[])?;
    test.restart(Node::A, || Ok(()))?;
    drop(trace);
    is_quiet(&test, Node::A)?;
    let said = test.says(Node::A, &["net", "trace", "nobody"])?;
    ensure!(
        said.code == Some(3) && said.err.contains("nobody"),
        "{said:?}"
    );
    test.end()
}
