//! One node: its configuration, its service, its health.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::network::{POD_NETWORKS, ROUTED_MTU};
use super::{Lab, Node, Topology};
use crate::netns;
use crate::process::{ProcessId, poll_until};
use crate::project::Project;
use crate::qemu10::{self, Unpacked};

/// A service starts in a second; `accel: auto` may first boot a probe VM under emulation.
const COMES_UP_WITHIN: Duration = Duration::from_secs(60);

/// Writes `config.yaml`. `MIGRATOR_QEMU` names another QEMU than the one in PATH, or is `10` for the unpacked one;
/// `MIGRATOR_ACCEL` names the accelerator, `MIGRATOR_XDP` what is said of the fast way (`on`: the lab's cables are veths).
pub(super) fn write_config(lab: &Lab, project: &Project, node: Node) -> Result<()> {
    let dir = lab.node_dir(node);
    let path = dir.join("config.yaml");
    std::fs::write(
        &path,
        config(lab, project, node, &|name| lab.setting(name))?,
    )
    .with_context(|| format!("cannot write {}", path.display()))
}

fn config(
    lab: &Lab,
    project: &Project,
    node: Node,
    setting: &dyn Fn(&str) -> Option<String>,
) -> Result<String> {
    let dir = lab.node_dir(node);
    let quoted = |path: &Path| serde_json::to_string(path.to_str().unwrap_or_default());
    let others = lab
        .topology()
        .nodes()
        .iter()
        .filter(|other| **other != node);
    let peers: BTreeMap<&str, String> = others.map(|other| (other.name(), other.wire())).collect();
    let (ground, mtu) = match lab.topology() {
        // The nodes' own network takes 1600 bytes.
        Topology::Bridge => ("bridge: br0".to_owned(), 1500),
        // Here it takes 1500, and so less is left to pods.
        Topology::Routed => {
            let pods = serde_json::to_string(&POD_NETWORKS)?;
            (
                format!("topology: {{ kind: routed, pods: {pods} }}"),
                ROUTED_MTU,
            )
        }
    };
    let mut text = format!(
        "name: {name}
state_dir: {state}
{ground}
uplink: eth0
listen: {wire}
advertise: {wire}
peers: {peers}
tunnel: {{ kind: vxlan, vni: 7077, mtu: {mtu} }}
templates: manual
tls:
  ca: ca.pem
  cert: cert.pem
  key: key.pem
api_socket: {api}
guest:
  kernel: {kernel}
  initramfs: {initramfs}
qemu:
  accel: {accel}
",
        name = node.name(),
        state = quoted(&dir.join("state"))?,
        wire = serde_json::to_string(&node.wire())?,
        peers = serde_json::to_string(&peers)?,
        api = quoted(&lab.api_socket(node))?,
        kernel = quoted(&project.kernel())?,
        initramfs = quoted(&project.initramfs())?,
        accel = setting("MIGRATOR_ACCEL").unwrap_or_else(|| "auto".to_owned()),
    );
    if let Some(choice) = setting("MIGRATOR_XDP") {
        // A key of the top level, so before all others.
        text.insert_str(0, &format!("xdp: {choice}\n"));
    }
    if let Some(qemu) = qemu(project, setting) {
        let Unpacked {
            binary,
            lib_dir,
            data_dirs,
        } = qemu;
        writeln!(text, "  binary: {}", quoted(&binary)?)?;
        if !data_dirs.is_empty() {
            writeln!(text, "  lib_dir: {}", quoted(&lib_dir)?)?;
            writeln!(text, "  data_dirs: {}", serde_json::to_string(&data_dirs)?)?;
        }
    }
    Ok(text)
}

/// Another QEMU than the one in PATH.
fn qemu(project: &Project, setting: &dyn Fn(&str) -> Option<String>) -> Option<Unpacked> {
    match setting("MIGRATOR_QEMU")?.as_str() {
        "10" => Some(qemu10::unpacked(project)),
        binary => Some(Unpacked {
            binary: binary.into(),
            lib_dir: PathBuf::new(),
            data_dirs: Vec::new(),
        }),
    }
}

/// Starts the service; it outlives this process.
pub(super) fn spawn(lab: &Lab, node: Node) -> Result<ProcessId> {
    let dir = lab.node_dir(node);
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(lab.log(node))
        .with_context(|| format!("cannot write {}", lab.log(node).display()))?;
    let mut command = Command::new(lab.migrator());
    command
        .arg("node")
        .arg("--config")
        .arg(dir.join("config.yaml"))
        .current_dir(&dir);
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    // The log is a file: no colours.
    command.env("NO_COLOR", "1");
    // Its own process group: a Ctrl-C at this terminal is not meant for it.
    command.process_group(0);
    let child = netns::spawn(&lab.netns(node.name()), &mut command)?;
    ProcessId::of(&format!("node {}", node.name()), child.id().cast_signed())
        .with_context(|| log_tail(lab, node))
}

pub(super) fn wait_healthy(lab: &Lab, node: Node, service: &ProcessId) -> Result<()> {
    let socket = lab.api_socket(node);
    let mut last = None;
    let answered = poll_until(COMES_UP_WITHIN, || {
        match http_get(&socket, "/v1/health", Duration::from_secs(2)) {
            Ok(_) => {
                last = None;
                true
            }
            Err(error) => {
                last = Some(error);
                !service.alive()
            }
        }
    });
    match last {
        None => Ok(()),
        Some(error) if answered => bail!(
            "node {} ended while it came up ({error:#})\n{}",
            node.name(),
            log_tail(lab, node)
        ),
        Some(error) => bail!(
            "the API of node {} does not answer: {error:#}\n{}",
            node.name(),
            log_tail(lab, node)
        ),
    }
}

/// The end of a node's log, for an error message.
fn log_tail(lab: &Lab, node: Node) -> String {
    let path = lab.log(node);
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let tail = lines[lines.len().saturating_sub(20)..].join("\n    ");
    format!("the end of {}:\n    {tail}", path.display())
}

/// One GET over a Unix socket; the body of an answer with status 200.
///
/// # Errors
/// Nobody listens, no answer comes within `limit`, or it is not 200.
pub fn http_get(socket: &Path, path: &str, limit: Duration) -> Result<String> {
    let deadline = Instant::now() + limit;
    let mut stream = UnixStream::connect(socket)
        .with_context(|| format!("cannot connect to {}", socket.display()))?;
    stream.set_write_timeout(Some(limit))?;
    // One write: formatting into the socket would send it in pieces.
    let request = format!("GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || answer.len() > 1 << 20 {
            bail!("no whole answer from {} within {limit:?}", socket.display());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut chunk)? {
            0 => break,
            length => answer.extend_from_slice(&chunk[..length]),
        }
    }
    let text = String::from_utf8_lossy(&answer);
    let (head, body) = text
        .split_once("\r\n\r\n")
        .context("the answer is not HTTP")?;
    if !head.starts_with("HTTP/1.1 200") {
        bail!(
            "{path} answers {}: {body}",
            head.lines().next().unwrap_or_default()
        );
    }
    Ok(body.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_names_both_nodes_and_an_unpacked_qemu() {
        let root = tempfile::tempdir().unwrap();
        let project = Project {
            root: root.path().to_owned(),
            target: root.path().join("t"),
        };
        let lab = Lab {
            project: project.clone(),
            dir: "/l".into(),
            prefix: "x-".into(),
            qemu: None,
            topology: Topology::Bridge,
        };
        let text = config(&lab, &project, Node::B, &|name| {
            (name == "MIGRATOR_QEMU").then(|| "/q/qemu".to_owned())
        })
        .unwrap();
        for line in [
            "name: b",
            "peers: {\"a\":\"10.78.0.1:7077\"}",
            "bridge: br0",
            "listen: \"10.78.0.2:7077\"",
            "state_dir: \"/l/b/state\"",
            "  binary: \"/q/qemu\"",
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "{line} is missing in\n{text}"
            );
        }
        assert!(!text.contains("lib_dir"));
        let text = config(&lab, &project, Node::A, &|name| {
            (name == "MIGRATOR_QEMU").then(|| "10".to_owned())
        })
        .unwrap();
        assert!(
            text.contains("/t/qemu10/root/usr/lib/x86_64-linux-gnu\"\n  data_dirs: [\""),
            "{text}"
        );
        let routed = lab.with_topology(Topology::Routed);
        let text = config(&routed, &project, Node::A, &|_| None).unwrap();
        for line in [
            "topology: { kind: routed, pods: [\"10.77.0.0/24\",\"fd77::/64\"] }",
            "peers: {\"b\":\"10.78.0.2:7077\",\"c\":\"10.78.0.3:7077\"}",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
        assert!(!text.contains("bridge:"), "{text}");
    }
}
