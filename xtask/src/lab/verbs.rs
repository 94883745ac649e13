//! The verb's own verbs.

use std::os::unix::process::CommandExt;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Subcommand, ValueEnum};

use super::{Lab, Node, Owner, Topology, cleanup, http_get, network};
use crate::project::Project;
use crate::{cmd, demo_image, netns, setup};

/// Arguments of the verb.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Makes the lab, or starts what died of it
    Up {
        /// How pods are on the network
        #[arg(long, value_enum, default_value_t = Topology::Bridge)]
        topology: Topology,
    },
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
    /// The client sends to pods by this node from now on; for the routed topology, where it begins with c
    Via {
        /// The node
        node: Node,
    },
    /// `exec a|b|c -- ARGS` runs `migrator ARGS` against that node; `exec client -- CMD` runs a command in the client's namespace
    Exec {
        /// Where
        place: Place,
        /// What
        #[arg(last = true, required = true)]
        args: Vec<String>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Place {
    A,
    B,
    C,
    Client,
}

/// The verb.
///
/// # Errors
/// As the methods of [`Lab`].
pub fn main(project: &Project, args: Args) -> Result<ExitCode> {
    let lab = Lab::new(project)?;
    match args.verb {
        Verb::Up { topology } => up(&lab.with_topology(topology))?,
        Verb::Down => {
            setup::require_root("to remove network namespaces")?;
            lab.down()?;
        }
        Verb::Status => return status(&lab),
        Verb::Start { node } => lab.start_node(node)?,
        Verb::Kill { node } => lab.kill_node(node)?,
        Verb::Via { node } => lab.lead_client_to(node)?,
        Verb::Exec { place, args } => return exec(&lab, place, &args),
    }
    Ok(ExitCode::SUCCESS)
}

fn up(lab: &Lab) -> Result<()> {
    let topology = lab.topology();
    let is_whole = topology.nodes().iter().all(|node| {
        netns::exists(&lab.netns(node.name())) && lab.node_dir(*node).join("config.yaml").is_file()
    });
    if is_whole
        && lab
            .state()
            .is_ok_and(|state| state.owner == Some(Owner::User) && state.topology == topology)
    {
        for node in topology.nodes() {
            if !lab.is_running(*node) {
                println!("lab: node {} was not running; starting it", node.name());
                lab.start_node(*node)?;
            }
        }
        println!("lab: it is up\n");
    } else {
        lab.up(Owner::User)?;
        println!("lab: up\n");
    }
    let image = demo_image::ensure(&lab.project)?;
    let [v4, v6] = topology.client();
    println!(
        "    cargo xtask lab exec a -- image import {image}
    cargo xtask lab exec a -- run {pod}
    cargo xtask lab exec a -- ps                      migrator's verbs, on node a or b
    cargo xtask lab exec a -- migrate demo --to b --watch
    cargo xtask lab exec client -- iperf3 -c 10.77.0.10   a command in the client's namespace, {client}
    cargo xtask lab kill a; cargo xtask lab start a   the service dies and comes back; pods run on
    curl --unix-socket {socket} http://node/v1/health
    cargo xtask lab status; cargo xtask lab down

Pods live in 10.77.0.0/24 and fd77::/64, the client is {v4} and {v6}. Node a's log: {log}",
        image = lab.project.short(&image),
        pod = lab.project.short(&lab.demo_pod()),
        client = lab.client(),
        socket = lab.project.short(&lab.api_socket(Node::A)),
        log = lab.project.short(&lab.log(Node::A)),
    );
    if topology == Topology::Routed {
        println!(
            "The client sends to pods by node c, which runs none; `cargo xtask lab via a` changes that."
        );
    }
    Ok(())
}

fn status(lab: &Lab) -> Result<ExitCode> {
    let state = lab.state()?;
    let mut whole = true;
    for place in network::places(state.topology) {
        let name = lab.netns(place);
        let there = netns::exists(&name);
        whole &= there;
        println!(
            "namespace {name:<12} {}",
            if there { "there" } else { "missing" }
        );
    }
    for node in state.topology.nodes() {
        let node = *node;
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
    let node = match place {
        Place::A => Node::A,
        Place::B => Node::B,
        Place::C => Node::C,
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
