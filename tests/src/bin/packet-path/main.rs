//! What happens to frames on a pod's port, measured: an idle gate, a hold with its rollback, a flip, the uplink's two ways,
//! sending on what is late. `cargo xtask bench network`
//! runs it once for each case.
//!
//! ```text
//!   outside                            the node
//!   out0 ------------------ eth0 - br0 - mt1   a pod's port, with its programs
//!                                      - mt2   another one's, without them
//!   out1 ------------------ raw0               no bridge: for a plain packet socket
//! ```
//!
//! It prints a line of JSON for each run of each side: `{"side": "ours", "figures": {METRIC: NUMBER}}`, or with `error` instead of the
//! figures; and `{"note": TEXT}` for what a reader of the figures should know.

mod flip;
mod flood;
mod forward;
mod frames;
mod gate_idle;
mod ground;
mod guest;
mod live;
mod park_inject;
mod plain;
mod schedule;
mod sender;
mod xdp_uplink;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, ValueEnum};

use forward::Peer;
use frames::Kind;
use plain::Sockets;

/// For everything that is waited for.
const DEADLINE: Duration = Duration::from_secs(20);

#[derive(Debug, Parser)]
struct Args {
    what: What,
    /// Of which frames; those of a flip are always the smallest
    #[arg(long, value_enum, default_value_t = Kind::Small)]
    frames: Kind,
    /// What the peer of a hold is made of
    #[arg(long, value_enum, default_value_t = Sockets::Packet)]
    sockets: Sockets,
    /// Frames that a hold is offered in a second
    #[arg(long, default_value_t = 300_000, value_parser = clap::value_parser!(u64).range(1..))]
    rate: u64,
    /// Runs of each side
    #[arg(long, default_value_t = 5)]
    runs: u32,
    /// Shorter runs
    #[arg(long)]
    quick: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum What {
    /// As fast as the sender can through an open gate, and past none
    GateIdle,
    /// 300,000 frames a second into a hold of 30 ms, and back out
    ParkInject,
    /// From the store that closes the gate to the first parked frame
    Flip,
    /// From the uplink to the TAP, by XDP and by the bridge
    XdpUplink,
    /// A departed pod's frames sent on, and frames that a bridge sends into a tunnel of the kernel's
    ForwardVxlan,
    /// The same, and frames that our gate sends into the kernel's tunnel
    ForwardGate,
    /// The same, and frames that the kernel routes
    ForwardRoute,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let outcome = match args.what {
        What::GateIdle => gate_idle::measure(args.frames, args.runs, args.quick),
        What::ParkInject => park_inject::measure(args.frames, args.sockets, args.rate, args.runs),
        What::Flip => flip::measure(args.runs, args.quick),
        What::XdpUplink => xdp_uplink::measure(args.runs),
        What::ForwardVxlan => forward::measure(Peer::Vxlan, args.runs),
        What::ForwardGate => forward::measure(Peer::Gate, args.runs),
        What::ForwardRoute => forward::measure(Peer::Route, args.runs),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("packet-path: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Prints what a run of one side gave.
fn tell(side: &str, run: Result<Vec<(&'static str, f64)>>) {
    let line = match run {
        Ok(figures) => {
            let figures: serde_json::Map<String, serde_json::Value> = figures
                .into_iter()
                .map(|(metric, figure)| (metric.to_owned(), figure.into()))
                .collect();
            serde_json::json!({ "side": side, "figures": figures })
        }
        Err(error) => serde_json::json!({ "side": side, "error": format!("{error:#}") }),
    };
    println!("{line}");
}

/// Prints what one should know of the figures.
fn note(text: &str) {
    println!("{}", serde_json::json!({ "note": text }));
}

/// The middle one; 0 of none.
fn median(figures: &[f64]) -> f64 {
    xtask::silence::spread(figures).map_or(0.0, |spread| spread.median)
}
