//! `cargo xtask test apps`: servers as Debian has them, under load all the time, in a pod that moves to and fro.
//!
//! No client may see an error, and afterwards each server must have what its clients were told. docs/testing.md says what is compared.

mod drive;
pub mod image;
mod load;
mod memcached;
mod nginx;
mod place;
mod postgres;
mod redis;

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::ValueEnum;

pub use drive::run;

use crate::lab::{Lab, Node, Owner};
use crate::project::Project;
use crate::{cmd, run as demo, setup};

/// A server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum App {
    /// PostgreSQL under pgbench, on a named volume
    Postgres,
    /// redis under redis-benchmark
    Redis,
    /// nginx under wrk
    Nginx,
    /// memcached under a client of this crate
    Memcached,
}

impl App {
    /// All of them.
    pub const ALL: [App; 4] = [App::Postgres, App::Redis, App::Nginx, App::Memcached];

    /// Its name, which is its container's.
    pub fn name(self) -> &'static str {
        match self {
            Self::Postgres => postgres::CONTAINER,
            Self::Redis => redis::CONTAINER,
            Self::Nginx => nginx::CONTAINER,
            Self::Memcached => memcached::CONTAINER,
        }
    }

    fn port(self) -> u16 {
        match self {
            Self::Postgres => 5432,
            Self::Redis => redis::PORT,
            Self::Nginx => nginx::PORT,
            Self::Memcached => memcached::PORT,
        }
    }
}

/// Arguments of `test apps`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// How many times each pod moves
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    moves: u32,
    /// The servers, each in a pod of its own
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = App::ALL)]
    apps: Vec<App>,
    /// All of them in one pod
    #[arg(long)]
    together: bool,
    /// `-- OPTIONS` are given to each `migrator migrate`
    #[arg(last = true, value_name = "OPTIONS", allow_hyphen_values = true)]
    migrate: Vec<String>,
}

/// The verb.
///
/// # Errors
/// A client saw an error, a server does not have what it said to have, or a pod does not come up or move.
pub fn main(project: &Project, args: &Args) -> Result<ExitCode> {
    let lab = Lab::new(project)?;
    if lab.state()?.owner == Some(Owner::User) && Node::ALL.iter().any(|node| lab.is_running(*node))
    {
        bail!("a lab is up: take it down first with `cargo xtask lab down`");
    }
    setup::require_root("to make network namespaces")?;
    setup::ensure(
        project,
        &setup::Args {
            tests: true,
            ..setup::Args::default()
        },
    )?;
    let image = image::ensure(project)?;
    println!("apps: bringing the lab up");
    let outcome = lab.up(Owner::Demo).and_then(|()| {
        let mut import = lab.on(Node::A);
        import.args(["image", "import"]).arg(&image);
        cmd::output(import.args(["--name", image::REFERENCE]))?;
        let say = &mut |line: &str| println!("{line}");
        let pods: Vec<&[App]> = match args.together {
            true => vec![&args.apps[..]],
            false => args.apps.chunks(1).collect(),
        };
        for apps in pods {
            run(project, &lab, apps, args.moves, &args.migrate, say)?;
        }
        Ok(())
    });
    if outcome.is_err() {
        demo::keep_logs(project, &lab);
    }
    lab.down()?;
    outcome?;
    println!("apps: no client saw an error, and nothing is lost");
    Ok(ExitCode::SUCCESS)
}
