//! `cargo xtask test soak`: a pod that checks its own memory moves to and fro, and nothing may ever be wrong with it.
//!
//! After each move: the report, the number of VMMs, every TCP connection, every probe packet, and what the guest says
//! of its memory and of itself. The first fault ends the run. docs/testing.md says what is found, and how.

pub mod blocks;
pub mod client;
mod drive;
pub mod flows;
pub mod stream;
pub mod summary;

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde::Serialize;

pub use self::drive::soak;
pub use self::summary::Summary;

use crate::lab::{Lab, Node, Owner, Topology};
use crate::project::Project;
use crate::{cmd, demo_image, run, setup};

/// How memory moves, as `migrator migrate --mode` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// All of it before the guest does.
    Precopy,
    /// Some rounds of it, and the rest on demand.
    Hybrid,
    /// On demand.
    Postcopy,
    /// As the service chooses.
    Auto,
}

impl Mode {
    /// All of them.
    pub const ALL: [Mode; 4] = [Mode::Precopy, Mode::Hybrid, Mode::Postcopy, Mode::Auto];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Precopy => "precopy",
            Self::Hybrid => "hybrid",
            Self::Postcopy => "postcopy",
            Self::Auto => "auto",
        }
    }
}

/// What to do, and with what load.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// How many times the pod moves
    #[arg(long, default_value_t = Options::default().moves, value_parser = clap::value_parser!(u32).range(1..))]
    pub moves: u32,
    /// Begin no move after so many minutes
    #[arg(long)]
    pub minutes: Option<u32>,
    /// The modes to use, one after the other
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Options::default().modes)]
    pub modes: Vec<Mode>,
    /// Guest RAM in MiB
    #[arg(long, default_value_t = Options::default().memory, value_parser = clap::value_parser!(u32).range(192..))]
    pub memory: u32,
    /// MiB that the guest fills and checks; all but 160 if not given
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub checked: Option<u32>,
    /// Megabytes a second that the guest rewrites
    #[arg(long, default_value_t = Options::default().rewrite, value_parser = clap::value_parser!(u32).range(1..))]
    pub rewrite: u32,
    /// Virtual CPUs
    #[arg(long, default_value_t = Options::default().vcpus, value_parser = clap::value_parser!(u32).range(1..))]
    pub vcpus: u32,
    /// TCP connections that are held open
    #[arg(long, default_value_t = Options::default().connections)]
    pub connections: u32,
    /// UDP packets a second
    #[arg(long, default_value_t = Options::default().packets, value_parser = clap::value_parser!(u32).range(1..))]
    pub packets: u32,
    /// Have all of the memory compared after each so many moves, and after the last
    #[arg(long, default_value_t = Options::default().full_every, value_parser = clap::value_parser!(u32).range(1..))]
    pub full_every: u32,
    /// `-- OPTIONS` are given to each `migrator migrate`
    #[arg(last = true, value_name = "OPTIONS", allow_hyphen_values = true)]
    pub migrate: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            moves: 40,
            minutes: None,
            modes: Mode::ALL.to_vec(),
            memory: 256,
            checked: None,
            rewrite: 20,
            vcpus: 2,
            connections: 4,
            packets: 500,
            // No multiple of the number of modes: each of them comes before a whole check some time.
            full_every: 5,
            migrate: Vec::new(),
        }
    }
}

impl Options {
    /// The mode of a move, numbered from 1.
    fn mode(&self, number: u32) -> Mode {
        let index = number as usize - 1;
        self.modes[index % self.modes.len()]
    }

    /// What `migrator migrate` is told for it.
    fn words(&self, mode: Mode) -> Vec<&str> {
        let mut words: Vec<&str> = self.migrate.iter().map(String::as_str).collect();
        // A service that knows no other mode knows no option for it either.
        if self.modes.iter().any(|mode| *mode != Mode::Precopy) {
            words.extend(["--mode", mode.name()]);
        }
        // Else some rounds would do, and nothing would be left to come on demand.
        if mode == Mode::Hybrid && !words.contains(&"--max-downtime") {
            words.extend(["--max-downtime", "1"]);
        }
        words
    }

    fn checked(&self) -> u32 {
        self.checked.unwrap_or(self.memory.saturating_sub(160))
    }

    fn limit(&self) -> Option<Duration> {
        self.minutes.map(|m| Duration::from_secs(u64::from(m) * 60))
    }
}

/// Arguments of `test soak`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    options: Options,
    #[command(flatten)]
    flows: flows::Options,
    /// How pods are on the network
    #[arg(long, value_enum, default_value_t = Topology::Bridge)]
    topology: Topology,
    /// Write what was found to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Leave the lab and the pod up
    #[arg(long)]
    keep: bool,
}

/// The verb.
///
/// # Errors
/// The pod could not be brought up. A run that found faults ends with code 1.
pub fn main(project: &Project, args: &Args) -> Result<ExitCode> {
    let lab = Lab::new(project)?.with_topology(args.topology);
    if lab.state()?.owner == Some(Owner::User) && Node::ALL.iter().any(|node| lab.is_running(*node))
    {
        bail!("a lab is up: take it down first with `cargo xtask lab down`");
    }
    setup::require_root("to make network namespaces")?;
    setup::ensure(project, &setup::Args::default())?;
    let image = demo_image::ensure(project)?;
    println!("soak: bringing the lab up");
    let outcome = lab.up(Owner::Demo).and_then(|()| {
        let say = &mut |line: &str| println!("{line}");
        let import = |node| cmd::output(lab.on(node).args(["image", "import"]).arg(&image));
        import(Node::A)?;
        if args.topology == Topology::Routed {
            lab.tell_client_mtu()?;
        }
        if args.flows.is_wanted() {
            import(Node::B)?;
            let summary = flows::run(project, &lab, &args.flows, args.options.packets, say)?;
            Found::new(&summary, &summary.faults, summary.text())
        } else {
            let summary = soak(&lab, &args.options, say)?;
            Found::new(&summary, &summary.faults, summary.text())
        }
    });
    let passed = outcome.as_ref().is_ok_and(|found| found.passed);
    if !passed {
        run::keep_logs(project, &lab);
    }
    if args.keep {
        println!("soak: the lab stays up; `cargo xtask lab down` removes it");
    } else if let Err(error) = lab.down() {
        return outcome.and(Err(error));
    }
    let found = outcome?;
    if let Some(path) = &args.json {
        std::fs::write(path, found.json)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    print!("\n{}", found.text);
    Ok(if passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// What either soak test has found.
struct Found {
    passed: bool,
    json: String,
    text: String,
}

impl Found {
    fn new<F>(summary: &impl Serialize, faults: &[F], text: String) -> Result<Self> {
        Ok(Self {
            passed: faults.is_empty(),
            json: serde_json::to_string_pretty(summary)? + "\n",
            text,
        })
    }
}

#[cfg(test)]
mod option_tests {
    use super::*;

    #[test]
    fn modes_come_in_turn_and_only_precopy_needs_no_option() {
        let options = Options::default();
        let modes: Vec<_> = (1..=5).map(|number| options.mode(number)).collect();
        assert_eq!(modes[..4], Mode::ALL);
        assert_eq!(modes[4], Mode::ALL[0]);
        assert_eq!(options.words(Mode::Auto), ["--mode", "auto"]);
        let alone = Options {
            modes: vec![Mode::Precopy],
            migrate: vec!["--verify".to_owned()],
            ..Options::default()
        };
        assert_eq!(alone.words(alone.mode(9)), ["--verify"]);
    }

    #[test]
    fn hybrid_leaves_pages_for_later_unless_told_otherwise() {
        let mut options = Options::default();
        let words = ["--mode", "hybrid", "--max-downtime", "1"];
        assert_eq!(options.words(Mode::Hybrid), words);
        options.migrate = vec!["--max-downtime".to_owned(), "50".to_owned()];
        let words = ["--max-downtime", "50", "--mode", "hybrid"];
        assert_eq!(options.words(Mode::Hybrid), words);
    }
}
