//! The command line: one file a verb, all of them clients of the API but `node` and, where no
//! service runs, `doctor`.

mod doctor;
mod exec;
mod failure;
mod image;
mod inspect;
mod logs;
mod migrate;
mod net;
mod node;
mod output;
mod ps;
mod run;
mod start;
mod status;
mod stop;
mod template;
mod tty;
mod upgrade;
mod volume;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::api::client::Client;
use failure::{Exit, Failure};

/// The service's socket, where neither `--api-socket` nor the environment names one.
pub const DEFAULT_API_SOCKET: &str = "/var/lib/migrator/api.sock";

/// The environment variable that names the service's socket.
pub const API_ENV: &str = "MIGRATOR_API";

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    failed
  2    wrong usage
  3    no such pod, container, image, migration or node
  4    refused: in use, taken, or not possible in the present state
  5    no service answers
  125  exec only: the command could not be run or followed; else exec exits with the command's code

The service's socket is --api-socket, else $MIGRATOR_API, else /var/lib/migrator/api.sock.";

/// Live migration of containerised VMs without a lost packet.
#[derive(Debug, Parser)]
#[command(name = "migrator", version, about, after_help = EXIT_CODES, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Args)]
struct Global {
    /// The service's API socket
    #[arg(long, global = true, value_name = "PATH")]
    api_socket: Option<PathBuf>,
    /// What to print
    #[arg(long, global = true, value_enum, default_value_t = Output::Text)]
    output: Output,
}

/// What verbs print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people
    Text,
    /// For programs: one JSON value, or one a line where there is a course of them
    Json,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run the node's service in the foreground
    Node(node::NodeArgs),
    /// Run a pod from a YAML file
    Run(run::RunArgs),
    /// List the node's pods
    Ps(ps::PsArgs),
    /// Show everything about a pod
    Inspect(inspect::InspectArgs),
    /// Print what a pod's containers printed
    Logs(logs::LogsArgs),
    /// Run a command in a container
    Exec(exec::ExecArgs),
    /// Start a failed pod again, with its disks
    Start(start::StartArgs),
    /// Stop a pod and remove it
    Stop(stop::StopArgs),
    /// Move a pod to another node
    Migrate(migrate::MigrateArgs),
    /// Replace the QEMU under a running pod
    Upgrade(upgrade::UpgradeArgs),
    /// Show migrations: all, or one in full
    Status(status::StatusArgs),
    /// Cancel a migration: the pod goes on where it runs
    Cancel(status::CancelArgs),
    /// Show a pod's network, and watch its frames
    Net(net::NetArgs),
    /// Import, list and remove images
    Image(image::ImageArgs),
    /// Make, list and remove volumes that outlive pods
    Volume(volume::VolumeArgs),
    /// List, make and remove the saved guests that pods start from
    Template(template::TemplateArgs),
    /// Check what the kernel and the machine must have
    Doctor(doctor::DoctorArgs),
}

/// What every client verb gets.
struct Context {
    client: Client,
    output: Output,
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors, and go to stdout; clap knows.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let socket = cli
        .global
        .api_socket
        .or_else(|| std::env::var_os(API_ENV).map(PathBuf::from))
        .unwrap_or_else(|| PathBuf::from(DEFAULT_API_SOCKET));
    let context = Context {
        client: Client::new(&socket),
        output: cli.global.output,
    };
    let mut builder = match &cli.verb {
        Verb::Node(_) => tokio::runtime::Builder::new_multi_thread(),
        Verb::Run(_)
        | Verb::Ps(_)
        | Verb::Inspect(_)
        | Verb::Logs(_)
        | Verb::Exec(_)
        | Verb::Start(_)
        | Verb::Stop(_)
        | Verb::Migrate(_)
        | Verb::Upgrade(_)
        | Verb::Status(_)
        | Verb::Cancel(_)
        | Verb::Net(_)
        | Verb::Image(_)
        | Verb::Volume(_)
        | Verb::Template(_)
        | Verb::Doctor(_) => tokio::runtime::Builder::new_current_thread(),
    };
    let runtime = match builder.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            return Failure::new(Exit::Failed, format!("cannot start a runtime: {error}")).report();
        }
    };
    let result = runtime.block_on(dispatch(cli.verb, &context));
    // A read of the terminal that nobody needs any more must not hold up the end.
    runtime.shutdown_background();
    match result {
        Ok(code) => code,
        Err(failure) => failure.report(),
    }
}

async fn dispatch(verb: Verb, context: &Context) -> Result<ExitCode, Failure> {
    match verb {
        Verb::Node(args) => args.run().await,
        Verb::Run(args) => args.run(context).await,
        Verb::Ps(args) => args.run(context).await,
        Verb::Inspect(args) => args.run(context).await,
        Verb::Logs(args) => args.run(context).await,
        Verb::Exec(args) => args.run(context).await,
        Verb::Start(args) => args.run(context).await,
        Verb::Stop(args) => args.run(context).await,
        Verb::Migrate(args) => args.run(context).await,
        Verb::Upgrade(args) => args.run(context).await,
        Verb::Status(args) => args.run(context).await,
        Verb::Cancel(args) => args.run(context).await,
        Verb::Net(args) => args.run(context).await,
        Verb::Image(args) => args.run(context).await,
        Verb::Volume(args) => args.run(context).await,
        Verb::Template(args) => args.run(context).await,
        Verb::Doctor(args) => args.run(context).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn exec_takes_the_command_behind_two_dashes_as_it_is() {
        let cli = Cli::try_parse_from([
            "migrator", "exec", "-t", "-i", "web", "-c", "main", "--", "ls", "-l", "--output",
        ])
        .unwrap();
        let Verb::Exec(args) = cli.verb else {
            panic!("not exec");
        };
        assert_eq!(args.command, ["ls", "-l", "--output"]);
        assert!(args.tty && args.interactive);
    }

    #[test]
    fn global_options_stand_before_and_behind_the_verb() {
        for line in [
            &["migrator", "--output", "json", "ps"][..],
            &["migrator", "ps", "--output", "json"],
        ] {
            let cli = Cli::try_parse_from(line).unwrap();
            assert_eq!(cli.global.output, Output::Json);
        }
    }
}
