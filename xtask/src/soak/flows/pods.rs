//! The pods of the switchover soak, and the sender outside.

use std::process::{Child, Stdio};

use anyhow::{Context, Result};

use super::peers::Peer;
use crate::lab::{Lab, Node, Topology};
use crate::project::Project;
use crate::{cmd, demo_image, netns};

/// The pod that moves.
pub(super) const POD: &str = "mover";
/// Guest RAM in MiB: little to copy.
const MEMORY: u32 = 160;

/// Addresses of a place: the last part, the same in IPv4 and IPv6.
const MOVER: u8 = 30;
/// By sender; the first one is outside, and of its own network where pods are routed.
const SENDERS: [u8; 3] = [1, 31, 32];

/// The address that the pod that moves has in IPv4.
pub(super) fn mover_ipv4() -> String {
    format!("10.77.0.{MOVER}")
}

/// The two addresses of a place.
fn addresses(lab: &Lab, number: u8) -> [String; 2] {
    match number == SENDERS[0] {
        true => lab.topology().client().map(str::to_owned),
        false => [format!("10.77.0.{number}"), format!("fd77::{number}")],
    }
}

fn peer(lab: &Lab, number: u8) -> Result<Peer> {
    let [address, _] = addresses(lab, number);
    Ok(Peer {
        netns: lab.client(),
        address: address.parse()?,
    })
}

/// The receiver.
pub(super) fn receiver(lab: &Lab) -> Result<Peer> {
    peer(lab, MOVER)
}

/// The senders, by number.
pub(super) fn senders(lab: &Lab) -> Result<Vec<Peer>> {
    SENDERS.iter().map(|number| peer(lab, *number)).collect()
}

/// What the program `flows` is told.
fn words(lab: &Lab, own: u8, sender: Option<usize>, rate: u32) -> Vec<String> {
    let [own4, own6] = addresses(lab, own);
    let mut words = vec!["--own4".to_owned(), own4, "--own6".to_owned(), own6];
    if lab.topology() == Topology::Routed {
        words.push("--unicast".to_owned());
    }
    if let Some(sender) = sender {
        words.extend([
            "--to4".to_owned(),
            format!("10.77.0.{MOVER}"),
            "--to6".to_owned(),
            format!("fd77::{MOVER}"),
            "--sender".to_owned(),
            sender.to_string(),
            "--rate".to_owned(),
            rate.to_string(),
        ]);
    }
    words
}

/// Starts all pods: the one that moves on node a, and one that stays on each node.
pub(super) fn start(lab: &Lab, rate: u32) -> Result<()> {
    let pods = [
        (Node::A, POD, MOVER, None),
        (Node::A, "stays-a", SENDERS[1], Some(1)),
        (Node::B, "stays-b", SENDERS[2], Some(2)),
    ];
    std::thread::scope(|scope| {
        let starting: Vec<_> = pods
            .iter()
            .map(|(node, name, number, sender)| {
                scope.spawn(move || {
                    let path = lab.dir().join(format!("{name}.yaml"));
                    std::fs::write(
                        &path,
                        yaml(name, *number, &words(lab, *number, *sender, rate)),
                    )
                    .with_context(|| format!("cannot write {}", path.display()))?;
                    cmd::output(lab.on(*node).arg("run").arg(&path))
                })
            })
            .collect();
        for start in starting {
            start
                .join()
                .map_err(|_| anyhow::anyhow!("a thread that started a pod panicked"))??;
        }
        Ok(())
    })
}

/// The sender outside: a process of this machine in the client's namespace, which ends with this value.
pub(super) struct Outside(Child);

impl Outside {
    pub(super) fn start(project: &Project, lab: &Lab, rate: u32) -> Result<Self> {
        let mut command = std::process::Command::new(demo_image::program(project, "flows"));
        command
            .args(words(lab, SENDERS[0], Some(0), rate))
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        netns::spawn(&lab.client(), &mut command).map(Self)
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        // It may have ended by itself, and then its orders went unanswered.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn yaml(name: &str, number: u8, words: &[String]) -> String {
    let mut text = format!(
        "apiVersion: v1
kind: Pod
metadata:
  name: {name}
  annotations:
    migrator/ipv4: 10.77.0.{number}/24
    migrator/ipv6: fd77::{number}/64
    migrator/vm-memory: {MEMORY}Mi
spec:
  containers:
    - name: flows
      image: {image}
      command: [/usr/local/bin/flows]
      args: [{words}]
      resources:
        limits: {{ memory: 32Mi, cpu: 500m }}
",
        image = demo_image::REFERENCE,
        words = words
            .iter()
            .map(|word| format!("\"{word}\""))
            .collect::<Vec<_>>()
            .join(", "),
    );
    if name == POD {
        text += &format!(
            "    - name: echo
      image: {image}
      command: [/usr/local/bin/udp-echo]
      resources:
        limits: {{ memory: 16Mi, cpu: 500m }}
",
            image = demo_image::REFERENCE
        );
    }
    text
}
