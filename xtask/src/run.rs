//! `cargo xtask run`: the demo. A pod moves from node a to node b and back while a client talks to it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::lab::{self, Lab, Node, Owner, Topology};
use crate::probe::{self, Probe};
use crate::project::Project;
use crate::report::{Migration, MigrationReport, Outcome, Report};
use crate::{cmd, demo_image, iperf, migrate, netns, process, setup};

/// The pod's addresses, and the ports of its two containers.
const POD: &str = "demo";
const POD_IPV4: &str = "10.77.0.10";
const ECHO_IPV4: &str = "10.77.0.10:7000";
const ECHO_IPV6: &str = "[fd77::10]:7000";

/// Packets a second.
const PROBE_RATE: u32 = 5_000;
/// Mbit/s. Without a limit iperf3 takes all of a two-CPU machine that emulates the guest, and the figures would be
/// those of its scheduler.
const IPERF_RATE: u32 = 20;
/// A guest boots in 5 s under emulation, on an idle machine.
const BOOTS_WITHIN: Duration = Duration::from_secs(120);
/// Traffic before the first move, between moves, and after the last.
const CALM: Duration = Duration::from_secs(2);

/// Counters of the sockets in a thread's network namespace.
const SOCKETS: &str = "/proc/thread-self/net/snmp";
/// What its devices dropped.
const DEVICES: &str = "/proc/thread-self/net/dev";

/// Bytes; a larger file is no log that one would read.
const LOG_LIMIT: u64 = 4 << 20;

/// Arguments of the verb.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Write the report to this file, as JSON
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// How many times the pod moves, to and fro
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    pub moves: u32,
    /// How pods are on the network
    #[arg(long, value_enum, default_value_t = Topology::Bridge)]
    pub topology: Topology,
    /// In the routed topology: the node that the client sends to the pod by
    #[arg(long, value_enum, value_name = "NODE", default_value_t = Node::C)]
    pub via: Node,
    /// Do not compare every page before the grant
    #[arg(long)]
    pub no_verify: bool,
    /// Leave the lab and the pod up
    #[arg(long)]
    pub keep: bool,
    /// `-- ARGS` runs `migrator ARGS`, freshly built, instead of the demo
    #[arg(last = true, value_name = "ARGS")]
    pub migrator: Vec<String>,
}

/// What the demo is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// How many times the pod moves.
    pub moves: u32,
    /// Whether every page is compared before the grant.
    pub verify: bool,
    /// Whether lab and pod are left up.
    pub keep: bool,
    /// How pods are on the network.
    pub topology: Topology,
    /// The node that the client sends by, where pods are routed.
    pub via: Node,
}

/// The verb.
///
/// # Errors
/// The demo could not be run. One that ran and found defects ends with code 1.
pub fn main(project: &Project, args: &Args) -> Result<ExitCode> {
    if !args.migrator.is_empty() {
        return run_migrator(project, &args.migrator);
    }
    let verify = !args.no_verify;
    let plan = Plan {
        moves: args.moves,
        verify,
        keep: args.keep,
        topology: args.topology,
        via: args.via,
    };
    let report = demo(project, &plan)?;
    println!("\n{}", report.table());
    if let Some(path) = &args.report {
        let json = serde_json::to_string_pretty(&report)? + "\n";
        std::fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))?;
        println!("report: {}", path.display());
    }
    let defects = report.defects(args.moves as usize, verify);
    if defects.is_empty() {
        println!(
            "OK: {} moves, no packet lost, doubled or out of order",
            args.moves
        );
        return Ok(ExitCode::SUCCESS);
    }
    for defect in &defects {
        println!("DEFECT: {defect}");
    }
    Ok(ExitCode::FAILURE)
}

fn run_migrator(project: &Project, args: &[String]) -> Result<ExitCode> {
    use std::os::unix::process::CommandExt;
    setup::ensure(project, &setup::Args::default())?;
    lab::build(project)?;
    let error = std::process::Command::new(project.migrator())
        .args(args)
        .exec();
    Err(error).context("cannot start migrator")
}

/// Brings the lab up, moves the pod under traffic, takes the lab down.
///
/// # Errors
/// Something but the migrations themselves failed. The services' logs are then kept beside the lab's folder.
pub fn demo(project: &Project, plan: &Plan) -> Result<Report> {
    let lab = &Lab::new(project)?.with_topology(plan.topology);
    let Plan { moves, verify, .. } = *plan;
    if lab.state()?.owner == Some(Owner::User) && Node::ALL.iter().any(|node| lab.is_running(*node))
    {
        bail!(
            "a lab is up: the demo would replace it, so take it down first with `cargo xtask lab down`"
        );
    }
    setup::require_root("to make network namespaces")?;
    setup::ensure(project, &setup::Args::default())?;
    iperf::check_installed()?;
    let image = demo_image::ensure(project)?;
    println!("demo: bringing the lab up");
    let outcome = lab
        .up(Owner::Demo)
        .and_then(|()| match lab.topology() {
            Topology::Bridge => Ok(()),
            Topology::Routed => lab.lead_client_to(plan.via),
        })
        .and_then(|()| act(lab, &image, moves, verify));
    let failed = match &outcome {
        Ok(report) => !report.defects(moves as usize, verify).is_empty(),
        Err(_) => true,
    };
    if failed {
        keep_logs(project, lab);
    }
    if plan.keep {
        println!("demo: the lab stays up; `cargo xtask lab down` removes it");
    } else if let Err(error) = lab.down() {
        // What was measured is worth more than the tidiness; but it is a defect.
        return outcome.and(Err(error));
    }
    outcome
}

fn act(lab: &Lab, image: &Path, moves: u32, verify: bool) -> Result<Report> {
    println!(
        "demo: node a imports {} and runs pod {POD}",
        image.file_name().unwrap_or_default().display()
    );
    cmd::output(lab.on(Node::A).args(["image", "import"]).arg(image))?;
    let begun = Instant::now();
    cmd::output(lab.on(Node::A).arg("run").arg(lab.demo_pod()))?;
    await_pod(lab)?;
    println!(
        "demo: the pod answers over IPv4 and IPv6, {:.1} s after `run`",
        begun.elapsed().as_secs_f64()
    );

    let output = lab.dir().join("iperf3.json");
    let iperf = iperf::Iperf::start_patiently(
        &lab.client(),
        POD_IPV4,
        IPERF_RATE,
        &output,
        Duration::from_secs(30),
    )?;
    let probe = Probe::start(&lab.client(), address(ECHO_IPV4)?, PROBE_RATE)?;
    let mut state = lab.state()?;
    state.add_helper(iperf.id().clone());
    state.save(lab.dir())?;
    println!("demo: UDP probe at {PROBE_RATE} packets/s, iperf3 over TCP at {IPERF_RATE} Mbit/s");
    calm(&probe, &iperf)?;
    let mut reports = Vec::new();
    let mut at = Node::A;
    let mut busy_until = Duration::ZERO;
    for number in 1..=moves {
        println!("move {number}: {} -> {}", at.name(), at.other().name());
        let report = migrate::migrate(lab, POD, at, verify, &mut |line| println!("    {line}"))?;
        busy_until = iperf.age();
        tell(&report);
        let moved = report.outcome == Outcome::Completed;
        reports.push(report);
        if !moved {
            break;
        }
        at = at.other();
        calm(&probe, &iperf)?;
    }
    let iperf3 = iperf.stop(busy_until)?;
    let record = probe.stop()?;
    if record.summary().lost > 0 {
        tell_drops(lab, at);
    }
    if let Some((count, reason)) = &record.refused {
        println!("demo: the client's kernel refused {count} probe packets: {reason}");
    }
    for (number, at_us) in record.unanswered() {
        let nearest = reports
            .iter()
            .map(|report| at_us as f64 / 1e3 - report.frozen_at_unix_us as f64 / 1e3)
            .min_by(|a, b| a.abs().total_cmp(&b.abs()));
        println!(
            "demo: no answer to packet {number}, sent {:+.1} ms from the nearest freeze",
            nearest.unwrap_or(0.0)
        );
    }
    let migrations = reports
        .iter()
        .map(|report| Migration::new(report, record.blackout_ms(report.frozen_at_unix_us)))
        .collect();
    Ok(Report {
        migrations,
        probe: record.summary(),
        iperf3,
    })
}

/// Where a packet may have been dropped that the gates have booked as delivered: the sockets at either end, and the guest's device.
fn tell_drops(lab: &Lab, at: Node) {
    let client = netns::within(&lab.client(), || Ok(std::fs::read_to_string(SOCKETS)?));
    let guest = |file| {
        let mut cat = lab.on(at);
        cmd::output(cat.args(["exec", POD, "--container", "echo", "--", "cat", file]))
    };
    for (whose, counters) in [("guest", guest(SOCKETS)), ("client", client)] {
        match counters.as_deref().map(udp_errors) {
            Ok(Some(errors)) => println!("demo: the {whose}'s UDP sockets tell of {errors}"),
            Ok(None) | Err(_) => println!("demo: the {whose} does not tell its UDP drops"),
        }
    }
    let devices = guest(DEVICES).unwrap_or_else(|error| format!("{error:#}"));
    println!("demo: the guest's devices:\n{devices}");
    match cmd::output(lab.on(at).args(["net", "show", POD])) {
        Ok(text) => println!("demo: its packets, by node {}:\n{text}", at.name()),
        Err(error) => println!(
            "demo: node {} does not tell of its packets: {error:#}",
            at.name()
        ),
    }
}

/// The errors of the UDP line in /proc/net/snmp: all columns but those of datagrams that came and went.
fn udp_errors(snmp: &str) -> Option<String> {
    let mut lines = snmp.lines().filter_map(|line| line.strip_prefix("Udp: "));
    let (names, values) = (lines.next()?, lines.next()?);
    let errors = names.split_whitespace().zip(values.split_whitespace());
    let errors = errors.filter(|(name, _)| !name.ends_with("Datagrams"));
    let errors: Vec<String> = errors
        .map(|(name, value)| format!("{name} {value}"))
        .collect();
    (!errors.is_empty()).then(|| errors.join(", "))
}

fn tell(report: &MigrationReport) {
    let steps: Vec<String> = report
        .phases
        .iter()
        .map(|(name, us)| format!("{name} {:.1}", *us as f64 / 1e3))
        .collect();
    if !steps.is_empty() {
        println!(
            "    downtime {:.1} ms: {}",
            report.downtime_ms,
            steps.join(", ")
        );
    }
}

/// The echo answers in both families.
fn await_pod(lab: &Lab) -> Result<()> {
    let client = lab.client();
    let echo4 = probe::answers(&client, address(ECHO_IPV4)?, BOOTS_WITHIN)?;
    let whole = echo4 && probe::answers(&client, address(ECHO_IPV6)?, Duration::from_secs(15))?;
    if !whole {
        let logs = cmd::output(lab.on(Node::A).args(["logs", POD]))
            .unwrap_or_else(|error| format!("{error:#}"));
        bail!(
            "the pod does not answer at {} within {BOOTS_WITHIN:?}; its output:\n{logs}",
            if echo4 { ECHO_IPV6 } else { ECHO_IPV4 }
        );
    }
    Ok(())
}

/// Lets traffic flow for a while, and makes sure that it does.
fn calm(probe: &Probe, iperf: &iperf::Iperf) -> Result<()> {
    let before = probe.answered();
    let over = Instant::now() + CALM;
    process::poll_until(CALM, || Instant::now() >= over || !iperf.is_running());
    if probe.answered() == before {
        println!("demo: the probe has had no answer for {CALM:?}");
    }
    if !iperf.is_running() {
        println!("demo: iperf3 ended by itself");
    }
    Ok(())
}

fn address(text: &str) -> Result<SocketAddr> {
    text.parse()
        .with_context(|| format!("{text} is not an address"))
}

/// Copies the services' logs out of a lab that is about to be removed.
pub(crate) fn keep_logs(project: &Project, lab: &Lab) {
    let dir = project.target.join("demo-logs");
    let _ = std::fs::remove_dir_all(&dir);
    for node in lab.topology().nodes() {
        let node = *node;
        if copy_logs(&lab.node_dir(node), &dir.join(node.name())).is_err() {
            println!("demo: not all logs of node {} could be kept", node.name());
        }
    }
    println!("logs are in {}", project.short(&dir));
}

/// Every small file but keys: the log of the service, the console and log of each VMM, the journal.
fn copy_logs(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)?.flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() && name != "images" && name != "chunks" && name != "bpf" {
            copy_logs(&path, &to.join(&name))?;
        } else if kind.is_file() && name != "key.pem" && entry.metadata()?.len() <= LOG_LIMIT {
            std::fs::copy(&path, to.join(&name))?;
        }
    }
    Ok(())
}

/// The demo's pod, in the shape of a Kubernetes one.
pub fn pod_yaml() -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata:
  name: {POD}
  annotations:
    migrator/ipv4: {POD_IPV4}/24
    migrator/ipv6: fd77::10/64
spec:
  containers:
    - name: iperf3
      image: {image}
      command: [/usr/bin/iperf3, --server]
      resources:
        limits: {{ memory: 96Mi, cpu: 1000m }}
    - name: echo
      image: {image}
      command: [/usr/local/bin/udp-echo]
      resources:
        limits: {{ memory: 32Mi, cpu: 1000m }}
",
        image = demo_image::REFERENCE
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_told_by_their_columns() {
        let snmp = "Ip: Forwarding\nIp: 1\nUdp: InDatagrams NoPorts RcvbufErrors OutDatagrams\nUdp: 9 8 7 6\n";
        assert_eq!(
            udp_errors(snmp).as_deref(),
            Some("NoPorts 8, RcvbufErrors 7")
        );
        assert_eq!(udp_errors("Udp: InDatagrams\nUdp: 1\n"), None);
        assert_eq!(udp_errors(""), None);
    }
}
