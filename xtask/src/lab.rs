//! `cargo xtask lab`: two nodes, a client and a switch, each in a network namespace of its own.
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
//! Everything that the lab makes is named in its folder (`target/lab`), so `down` finds it after any crash.

mod certs;
mod cleanup;
mod network;
mod node;
mod state;

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Subcommand, ValueEnum};

use crate::project::Project;
use crate::{cmd, demo_image, netns, process, qemu10, run, setup};

pub use node::http_get;
pub use state::{Owner, State};

/// Arguments of the verb.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Makes the lab, or starts what died of it
    Up,
    /// Removes every trace of it, also after a crash
    Down,
    /// What of it is there
    Status,
    /// Starts a node's service that is not running
    Start {
        /// The node
        node: Node,
    },
    /// Kills a node's service (SIGKILL); its VMs run on
    Kill {
        /// The node
        node: Node,
    },
    /// `exec a|b -- ARGS` runs `migrator ARGS` against that node; `exec client -- CMD` runs a command in the client's namespace
    Exec {
        /// Where
        place: Place,
        /// What
        #[arg(last = true, required = true)]
        args: Vec<String>,
    },
}

/// A node of the lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Node {
    /// The first one.
    A,
    /// The second one.
    B,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Place {
    A,
    B,
    Client,
}

impl Node {
    /// Both.
    pub const ALL: [Node; 2] = [Node::A, Node::B];

    /// Its name, as in its configuration and its certificate.
    pub fn name(self) -> &'static str {
        match self {
            Node::A => "a",
            Node::B => "b",
        }
    }

    /// The other one.
    pub fn other(self) -> Node {
        match self {
            Node::A => Node::B,
            Node::B => Node::A,
        }
    }

    /// Its address in the nodes' own network.
    pub fn address(self) -> &'static str {
        match self {
            Node::A => "10.78.0.1",
            Node::B => "10.78.0.2",
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
        })
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

    /// Name of the namespace of `a`, `b`, `client` or `switch`.
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
        setup::ensure(&self.project, &setup::Args::default())?;
        if std::env::var("MIGRATOR_QEMU").is_ok_and(|version| version == "10") {
            qemu10::ensure(&self.project)?;
        }
        build(&self.project)?;
        self.down()?;
        std::fs::create_dir_all(self.dir.join("bin"))
            .with_context(|| format!("cannot create {}", self.dir.display()))?;
        let mut state = State::new(owner);
        state.save(&self.dir)?;
        std::fs::copy(self.project.migrator(), self.migrator())
            .with_context(|| format!("cannot copy {}", self.project.migrator().display()))?;
        network::up(self, &mut state)?;
        certs::write(self)?;
        for node in Node::ALL {
            node::write_config(self, &self.project, node)?;
        }
        std::fs::write(self.demo_pod(), run::pod_yaml())
            .with_context(|| format!("cannot write {}", self.demo_pod().display()))?;
        for node in Node::ALL {
            self.spawn_node(node)?;
        }
        for node in Node::ALL {
            self.wait_healthy(node)?;
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

/// The verb.
///
/// # Errors
/// As the methods of [`Lab`].
pub fn main(project: &Project, args: Args) -> Result<ExitCode> {
    let lab = Lab::new(project)?;
    match args.verb {
        Verb::Up => up(&lab)?,
        Verb::Down => {
            setup::require_root("to remove network namespaces")?;
            lab.down()?;
        }
        Verb::Status => return status(&lab),
        Verb::Start { node } => lab.start_node(node)?,
        Verb::Kill { node } => lab.kill_node(node)?,
        Verb::Exec { place, args } => return exec(&lab, place, &args),
    }
    Ok(ExitCode::SUCCESS)
}

fn up(lab: &Lab) -> Result<()> {
    let is_whole = Node::ALL.iter().all(|node| {
        netns::exists(&lab.netns(node.name())) && lab.node_dir(*node).join("config.yaml").is_file()
    });
    if is_whole
        && lab
            .state()
            .is_ok_and(|state| state.owner == Some(Owner::User))
    {
        for node in Node::ALL {
            if !lab.is_running(node) {
                println!("lab: node {} was not running; starting it", node.name());
                lab.start_node(node)?;
            }
        }
        println!("lab: it is up\n");
    } else {
        lab.up(Owner::User)?;
        println!("lab: up\n");
    }
    let image = demo_image::ensure(&lab.project)?;
    println!(
        "    cargo xtask lab exec a -- image import {image}
    cargo xtask lab exec a -- run {pod}
    cargo xtask lab exec a -- ps                      migrator's verbs, on node a or b
    cargo xtask lab exec a -- migrate demo --to b --watch
    cargo xtask lab exec client -- iperf3 -c 10.77.0.10   a command in the client's namespace, {client}
    cargo xtask lab kill a; cargo xtask lab start a   the service dies and comes back; pods run on
    curl --unix-socket {socket} http://node/v1/health
    cargo xtask lab status; cargo xtask lab down

Pods live in 10.77.0.0/24 and fd77::/64, where the client is 10.77.0.1 and fd77::1. Node a's log: {log}",
        image = lab.project.short(&image),
        pod = lab.project.short(&lab.demo_pod()),
        client = lab.client(),
        socket = lab.project.short(&lab.api_socket(Node::A)),
        log = lab.project.short(&lab.log(Node::A)),
    );
    Ok(())
}

fn status(lab: &Lab) -> Result<ExitCode> {
    let state = lab.state()?;
    let mut whole = true;
    for place in network::PLACES {
        let name = lab.netns(place);
        let there = netns::exists(&name);
        whole &= there;
        println!(
            "namespace {name:<12} {}",
            if there { "there" } else { "missing" }
        );
    }
    for node in Node::ALL {
        let (text, healthy) = match state.service(node) {
            Some(service) if service.alive() => {
                match http_get(&lab.api_socket(node), "/v1/health", Duration::from_secs(2)) {
                    Ok(_) => (format!("running, pid {}", service.pid), true),
                    Err(error) => (
                        format!(
                            "pid {} runs, its API does not answer: {error:#}",
                            service.pid
                        ),
                        false,
                    ),
                }
            }
            Some(_) => (
                "dead: `cargo xtask lab start` brings it back".to_owned(),
                false,
            ),
            None => ("not there".to_owned(), false),
        };
        whole &= healthy;
        println!("node      {:<12} {text}", node.name());
        for vm in cleanup::vms(&lab.node_dir(node)) {
            println!(
                "  VM      pid {:<8} {}",
                vm.pid,
                if vm.alive() { "running" } else { "gone" }
            );
        }
    }
    Ok(if whole {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn exec(lab: &Lab, place: Place, args: &[String]) -> Result<ExitCode> {
    let _ = std::io::stdout().flush();
    let node = match place {
        Place::A => Node::A,
        Place::B => Node::B,
        Place::Client => {
            let mut child = netns::spawn(&lab.client(), &mut cmd::command(&args[0], &args[1..]))?;
            let status = child.wait()?;
            return Ok(ExitCode::from(
                status
                    .code()
                    .and_then(|code| u8::try_from(code).ok())
                    .unwrap_or(1),
            ));
        }
    };
    // Replaces this process: the exit code and the terminal are migrator's own.
    let error = lab.on(node).args(args).exec();
    Err(error).with_context(|| format!("cannot start {}: is the lab up?", lab.migrator().display()))
}
