//! `migrator net show [POD]` and `migrator net trace POD`.

mod text;

use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::failure::{Exit, Failure};
use super::{Context, Output, output};
use crate::api::client::encode;
use crate::api::net_types::{NodeNet, PodNet, TraceEnd, TraceLine};

#[derive(Debug, Args)]
pub(super) struct NetArgs {
    #[command(subcommand)]
    verb: NetVerb,
}

#[derive(Debug, Subcommand)]
enum NetVerb {
    /// Show what becomes of a pod's frames: its gate, counters, queues and hooks; without a pod, the node's network
    Show(ShowArgs),
    /// Print each frame of a pod as the gate and the guard decide on it, one a line
    Trace(TraceArgs),
}

#[derive(Debug, Args)]
struct ShowArgs {
    /// The pod; the node's network if absent
    pod: Option<String>,
}

#[derive(Debug, Args)]
struct TraceArgs {
    /// The pod
    pod: String,
    /// End after N frames
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// End after N seconds
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: Option<u64>,
}

impl NetArgs {
    pub(super) async fn run(self, context: &Context) -> Result<ExitCode, Failure> {
        match self.verb {
            NetVerb::Show(ShowArgs { pod: Some(pod) }) => {
                let net: PodNet = context.client.get(&path(&pod)).await?;
                match context.output {
                    Output::Json => output::json(&net)?,
                    Output::Text => output::bytes(text::pod(&net).as_bytes())?,
                }
                Ok(ExitCode::SUCCESS)
            }
            NetVerb::Show(ShowArgs { pod: None }) => {
                let net: NodeNet = context.client.get("/v1/net").await?;
                match context.output {
                    Output::Json => output::json(&net)?,
                    Output::Text => output::bytes(text::node(&net).as_bytes())?,
                }
                Ok(ExitCode::SUCCESS)
            }
            NetVerb::Trace(args) => args.run(context).await,
        }
    }
}

fn path(pod: &str) -> String {
    format!("/v1/net/{}", encode(pod))
}

impl TraceArgs {
    async fn run(self, context: &Context) -> Result<ExitCode, Failure> {
        let mut path = path(&self.pod) + "/trace?";
        if let Some(count) = self.count {
            path.push_str(&format!("count={count}&"));
        }
        if let Some(seconds) = self.seconds {
            path.push_str(&format!("seconds={seconds}"));
        }
        let mut lines = context
            .client
            .stream(path.trim_end_matches(['?', '&']))
            .await?;
        loop {
            let line = tokio::select! {
                line = lines.next_json::<TraceLine>() => line?,
                _ = tokio::signal::ctrl_c() => return Ok(ExitCode::SUCCESS),
            };
            // A service that is killed says no last word.
            let Some(line) = line else {
                return Err(Failure::new(Exit::Unreachable, "the service went away"));
            };
            if context.output == Output::Json {
                output::json(&line)?;
            }
            match (&line, context.output) {
                (TraceLine::Frame(frame), Output::Text) => output::line(&text::frame(frame))?,
                (TraceLine::Missed { frames }, Output::Text) => {
                    output::line(&format!("({frames} frames missed: too many to tell)"))?;
                }
                (TraceLine::Started { pod, node }, Output::Text) => {
                    eprintln!("tracing {pod} on {node}; Ctrl-C ends it");
                }
                (TraceLine::Ended { .. }, _) | (_, Output::Json) => {}
            }
            if let TraceLine::Ended { reason, .. } = line {
                return ended(&self.pod, reason);
            }
        }
    }
}

fn ended(pod: &str, reason: TraceEnd) -> Result<ExitCode, Failure> {
    match reason {
        TraceEnd::Count | TraceEnd::Time => Ok(ExitCode::SUCCESS),
        TraceEnd::PodGone => {
            eprintln!("{pod} has left this node");
            Ok(ExitCode::SUCCESS)
        }
        TraceEnd::Shutdown => Err(Failure::new(Exit::Unreachable, "the service ends")),
    }
}
