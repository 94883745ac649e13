//! `cargo xtask lab`: nodes, a client and a switch, each in a network namespace of its own.
//!
//! ```text
//!   mig-client                mig-switch                 mig-a
//!   eth0 ------------------- p-client  p-a ------------- eth0 - br0 - TAPs of pods
//!   10.77.0.1, fd77::1             sw0                          10.78.0.1
//!                                      p-b ------------- eth0 - br0 - TAPs of pods    (mig-b)
//!                                                               10.78.0.2
//! ```
//!
//! One flat layer 2: pods live in 10.77.0.0/24 and fd77::/64, the nodes speak with each other in 10.78.0.0/24.
//! With the routed topology, pods have the same addresses, and no layer 2 is theirs. The client sends to them by a node that runs none:
//!
//! ```text
//!   mig-client                mig-switch                 mig-a
//!   eth0 ------------------- p-client  p-a ------------- eth0 - routes - TAPs of pods
//!   10.78.0.100, fd78::100         sw0                   10.78.0.1, fd78::1
//!   10.77.0.0/24 via 10.78.0.3         p-b ------------- eth0 - routes - TAPs of pods    (mig-b)
//!   fd77::/64 via fd78::3                                10.78.0.2, fd78::2
//!                                      p-c ------------- eth0 - routes                   (mig-c)
//!                                                        10.78.0.3, fd78::3
//! ```
//!
//! Everything that the lab makes is named in its folder (`target/lab`), so `down` finds it after any crash.

mod certs;
mod cleanup;
mod network;
mod node;
mod state;
mod topology;
mod verbs;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::project::Project;
use crate::{cmd, process, qemu10, run, setup};

pub use node::http_get;
pub use state::{Owner, State};
pub use topology::Topology;
pub use verbs::{Args, main};

/// A node of the lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Node {
    /// The first one.
    A,
    /// The second one.
    B,
    /// The third one, which runs no pods: only the routed topology has it.
    C,
}

impl Node {
    /// The two that pods move between.
    pub const ALL: [Node; 2] = [Node::A, Node::B];

    /// All that any topology has.
    pub const EVERY: [Node; 3] = [Node::A, Node::B, Node::C];

    /// Its name, as in its configuration and its certificate.
    pub fn name(self) -> &'static str {
        match self {
            Node::A => "a",
            Node::B => "b",
            Node::C => "c",
        }
    }

    /// Where a pod moves from here: the other one of the two that pods move between.
    pub fn other(self) -> Node {
        match self {
            Node::A => Node::B,
            Node::B | Node::C => Node::A,
        }
    }

    /// Its address in the nodes' own network.
    pub fn address(self) -> &'static str {
        match self {
            Node::A => "10.78.0.1",
            Node::B => "10.78.0.2",
            Node::C => "10.78.0.3",
        }
    }

    /// The same of IPv6; only the routed topology has it.
    pub fn address6(self) -> &'static str {
        match self {
            Node::A => "fd78::1",
            Node::B => "fd78::2",
            Node::C => "fd78::3",
        }
    }

    /// Where it listens for other nodes.
    pub fn wire(self) -> String {
        format!("{}:7077", self.address())
    }
}

/// The lab of one source tree. Making this value touches nothing.
#[derive(Clone, Debug)]
pub struct Lab {
    project: Project,
    dir: PathBuf,
    prefix: String,
    /// Goes before `MIGRATOR_QEMU`.
    qemu: Option<String>,
    topology: Topology,
}

impl Lab {
    /// The lab in `target/lab`, or in `MIGRATOR_LAB_DIR`; namespaces start with `mig-`, or with `MIGRATOR_LAB_PREFIX`.
    ///
    /// # Errors
    /// The folder's path is too long for the Unix sockets in it.
    pub fn new(project: &Project) -> Result<Lab> {
        let dir = match std::env::var_os("MIGRATOR_LAB_DIR") {
            Some(dir) => std::path::absolute(dir)?,
            None => project.target.join("lab"),
        };
        // 108 bytes is sun_path (linux/un.h); a node keeps up to 50 of them for `a/pods/NAME/migration.sock`.
        if dir.as_os_str().len() > 57 {
            bail!(
                "the path {} is too long for Unix sockets below it: set MIGRATOR_LAB_DIR to a folder with a short path",
                dir.display()
            );
        }
        let prefix = std::env::var("MIGRATOR_LAB_PREFIX").unwrap_or_else(|_| "mig-".to_owned());
        Ok(Lab {
            project: project.clone(),
            dir,
            prefix,
            qemu: None,
            topology: Topology::Bridge,
        })
    }

    /// The same lab, to be brought up in another topology.
    #[must_use]
    pub fn with_topology(self, topology: Topology) -> Lab {
        Lab { topology, ..self }
    }

    /// How its pods are on the network, once it is up.
    pub fn topology(&self) -> Topology {
        self.topology
    }

    /// The same lab on a QEMU that `version` names as `MIGRATOR_QEMU` does: `10`, or a program.
    #[must_use]
    pub fn with_qemu(self, version: &str) -> Lab {
        Lab {
            qemu: Some(version.to_owned()),
            ..self
        }
    }

    /// What the environment says of the nodes' configuration, unless this value says otherwise.
    fn setting(&self, name: &str) -> Option<String> {
        match &self.qemu {
            Some(version) if name == "MIGRATOR_QEMU" => Some(version.clone()),
            Some(_) | None => std::env::var(name).ok(),
        }
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A node's folder: configuration, certificate, state, log.
    pub fn node_dir(&self, node: Node) -> PathBuf {
        self.dir.join(node.name())
    }

    /// A node's API socket.
    pub fn api_socket(&self, node: Node) -> PathBuf {
        self.node_dir(node).join("api.sock")
    }

    /// A node's log.
    pub fn log(&self, node: Node) -> PathBuf {
        self.node_dir(node).join("node.out")
    }

    /// Name of the namespace of a node, `client` or `switch`.
    pub fn netns(&self, place: &str) -> String {
        format!("{}{place}", self.prefix)
    }

    /// Name of the client's namespace.
    pub fn client(&self) -> String {
        self.netns("client")
    }

    /// The demo's pod, ready for `migrator run`.
    pub fn demo_pod(&self) -> PathBuf {
        self.dir.join("demo-pod.yaml")
    }

    /// The lab's own copy of the program, so that a later build does not change what runs.
    pub fn migrator(&self) -> PathBuf {
        self.dir.join("bin/migrator")
    }

    /// `migrator --api-socket SOCKET`, ready for a verb.
    pub fn on(&self, node: Node) -> Command {
        let mut command = Command::new(self.migrator());
        command.arg("--api-socket").arg(self.api_socket(node));
        command
    }

    /// What `up` recorded; empty if there is no lab.
    ///
    /// # Errors
    /// The record cannot be read.
    pub fn state(&self) -> Result<State> {
        State::load(&self.dir)
    }

    /// Whether the service of `node` runs.
    pub fn is_running(&self, node: Node) -> bool {
        self.state()
            .is_ok_and(|state| state.service(node).is_some_and(process::ProcessId::alive))
    }

    /// Makes the lab: anything left of an earlier one is removed first.
    ///
    /// # Errors
    /// This is not root, something is missing, or a node does not come up.
    pub fn up(&self, owner: Owner) -> Result<()> {
        setup::require_root("to make network namespaces")?;
        // Half a second of looks: a program of tests brings up many labs.
        static READY: OnceLock<()> = OnceLock::new();
        if READY.get().is_none() {
            setup::ensure(&self.project, &setup::Args::default())?;
            if self.setting("MIGRATOR_QEMU").as_deref() == Some("10") {
                qemu10::ensure(&self.project)?;
            }
            build(&self.project)?;
            // Another thread may have been first.
            let _ = READY.set(());
        }
        self.down()?;
        std::fs::create_dir_all(self.dir.join("bin"))
            .with_context(|| format!("cannot create {}", self.dir.display()))?;
        let mut state = State::new(owner, self.topology);
        state.save(&self.dir)?;
        std::fs::copy(self.project.migrator(), self.migrator())
            .with_context(|| format!("cannot copy {}", self.project.migrator().display()))?;
        network::up(self, &mut state)?;
        certs::write(self)?;
        let nodes = self.topology.nodes();
        for node in nodes {
            node::write_config(self, &self.project, *node)?;
        }
        std::fs::write(self.demo_pod(), run::pod_yaml())
            .with_context(|| format!("cannot write {}", self.demo_pod().display()))?;
        for node in nodes {
            self.spawn_node(*node)?;
        }
        for node in nodes {
            self.wait_healthy(*node)?;
        }
        Ok(())
    }

    /// Starts the service of `node` and waits until its API answers.
    ///
    /// # Errors
    /// It runs already, or it does not come up.
    pub fn start_node(&self, node: Node) -> Result<()> {
        if self.is_running(node) {
            bail!("node {} runs already", node.name());
        }
        self.spawn_node(node)?;
        self.wait_healthy(node)
    }

    /// Kills the service of `node`; its VMs run on.
    ///
    /// # Errors
    /// It cannot be killed.
    pub fn kill_node(&self, node: Node) -> Result<()> {
        match self.state()?.service(node) {
            Some(service) => service.end(Duration::ZERO),
            None => bail!(
                "there is no node {}: `cargo xtask lab up` makes the lab",
                node.name()
            ),
        }
    }

    fn spawn_node(&self, node: Node) -> Result<()> {
        let started = node::spawn(self, node)?;
        let mut state = self.state()?;
        state.set_service(node, started);
        state.save(&self.dir)
    }

    fn wait_healthy(&self, node: Node) -> Result<()> {
        let state = self.state()?;
        let service = state.service(node).context("the node was never started")?;
        node::wait_healthy(self, node, service)
    }

    /// From here on the client sends to pods by this node. For the routed topology.
    ///
    /// # Errors
    /// There is no such lab, or its routes cannot be changed.
    pub fn lead_client_to(&self, node: Node) -> Result<()> {
        if self.state()?.topology != Topology::Routed {
            bail!(
                "the client is on the pods' own network: only `cargo xtask lab up --topology routed` makes a lab whose client sends by a node"
            );
        }
        network::lead_client_to(self, node, None)
    }

    /// The client knows beforehand how long packets to pods may be. Else the first one that it sends in fragments over IPv6 is lost: no router on
    /// the way cuts it, and the sender is told.
    ///
    /// # Errors
    /// As [`Lab::lead_client_to`].
    pub fn tell_client_mtu(&self) -> Result<()> {
        network::lead_client_to(self, Node::C, Some(network::ROUTED_MTU))
    }

    /// Removes every trace of the lab; harmless when there is none.
    ///
    /// # Errors
    /// Something could not be removed; everything else was.
    pub fn down(&self) -> Result<()> {
        cleanup::down(self)
    }
}

/// Builds the `migrator` program, unless `MIGRATOR_BIN` names one.
///
/// # Errors
/// It does not build.
pub fn build(project: &Project) -> Result<()> {
    if project.has_given_migrator() {
        return Ok(());
    }
    let mut build = cmd::cargo(project, ["build", "-p", "migrator", "--bin", "migrator"]);
    if project.migrator().exists() {
        build.arg("--quiet");
    } else {
        println!("building migrator; the first time takes minutes");
    }
    cmd::run(&mut build)
}
