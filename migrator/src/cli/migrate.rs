//! `migrator migrate POD --to NODE`.

use std::num::NonZeroU64;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use vm_runtime::units::Bytes;

use super::failure::{Exit, Failure};
use super::status::progress;
use super::{Context, Output, output};
use crate::api::client::{Client, ClientError, encode};
use crate::api::types::{MigrateOptions, MigrateRequest, MigrationStarted};
use crate::memory::compress::Compress;
use crate::migration::mode::{ImagesMode, Mode, OnStall};
use crate::migration::status::{ConntrackReport, MigrationReport, MigrationStatus, Outcome};
use crate::network::OnOverflow;
use crate::wire::preamble::MAX_DATA_CONNECTIONS;

/// How long a service that went away in the middle may take to come back.
const SERVICE_BACK: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub(super) struct MigrateArgs {
    /// The pod
    pod: String,
    /// The destination node
    #[arg(long, value_name = "NODE")]
    to: String,
    /// Print the course to stderr while it happens
    #[arg(long)]
    watch: bool,
    /// Compare every page by hash before the destination may run the guest
    #[arg(long)]
    verify: bool,
    /// Freeze the guest only when the predicted downtime is at most MS milliseconds
    #[arg(long, value_name = "MS")]
    max_downtime: Option<u32>,
    /// When the memory crosses: before the guest moves (precopy), afterwards (postcopy), one pass before and the rest afterwards
    /// (hybrid), or before as long as that gets on and the rest afterwards (auto)
    #[arg(long, value_enum)]
    mode: Option<Mode>,
    /// With --mode precopy, when rounds do not get on: wait, slow the guest's CPUs in steps, or fail
    #[arg(long, value_enum)]
    on_stall: Option<OnStall>,
    /// Write the report to FILE, as JSON
    #[arg(long, value_name = "FILE", conflicts_with = "detach")]
    report: Option<std::path::PathBuf>,
    /// Data connections
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=i64::from(MAX_DATA_CONNECTIONS)))]
    connections: Option<u8>,
    /// Send at most MB megabytes of memory a second while the guest runs
    #[arg(long, value_name = "MB")]
    bandwidth: Option<std::num::NonZeroU32>,
    /// Compress pages: not, with LZ4, with zstd, or with what link and processor make best (auto)
    #[arg(long, value_enum)]
    compress: Option<Compress>,
    /// When more packets come for the pod than may be kept while it moves: end the migration, and deliver them here; or drop the newest,
    /// and count them
    #[arg(long, value_enum)]
    on_overflow: Option<OnOverflow>,
    /// Images that the destination lacks: let them follow the guest, from any node that has them (demand), or send all before it moves
    /// (complete)
    #[arg(long, value_enum)]
    images: Option<ImagesMode>,
    /// Print the migration's id and return at once
    #[arg(long, conflicts_with = "watch")]
    detach: bool,
}

/// Bytes in a megabyte.
const MEGABYTE: NonZeroU64 = NonZeroU64::new(1_000_000).unwrap();

impl MigrateArgs {
    pub(super) async fn run(self, context: &Context) -> Result<ExitCode, Failure> {
        let request = MigrateRequest {
            to: self.to,
            options: MigrateOptions {
                verify: self.verify,
                max_downtime_ms: self.max_downtime,
                mode: self.mode,
                on_stall: self.on_stall,
                connections: self.connections,
                bandwidth: self
                    .bandwidth
                    .map(|mb| NonZeroU64::from(mb).saturating_mul(MEGABYTE)),
                compress: self.compress,
                on_overflow: self.on_overflow,
                images: self.images,
            },
        };
        let path = format!("/v1/pods/{}/migrate", encode(&self.pod));
        let started: MigrationStarted = context.client.post(&path, &request).await?;
        if self.detach {
            match context.output {
                Output::Json => output::json(&started)?,
                Output::Text => output::line(&started.id)?,
            }
            return Ok(ExitCode::SUCCESS);
        }
        let report = tokio::select! {
            report = wait(&context.client, &started.id, self.watch) => report?,
            _ = tokio::signal::ctrl_c() => {
                return Err(Failure::new(Exit::Failed, "not waiting any longer; the migration goes on").hint(format!(
                    "`migrator status {0}` shows it, `migrator cancel {0}` stops it", started.id
                )));
            }
        };
        if let Some(path) = &self.report {
            write_report(path, &report)?;
        }
        match context.output {
            Output::Json => output::json(&report)?,
            Output::Text => output::bytes(summary(&report).as_bytes())?,
        }
        match report.outcome {
            Outcome::Completed => Ok(ExitCode::SUCCESS),
            Outcome::Refused(reason) => {
                Err(Failure::new(Exit::Refused, format!("not moved: {reason}")))
            }
            Outcome::Failed(reason) => {
                Err(Failure::new(Exit::Failed, format!("not moved: {reason}")))
            }
        }
    }
}

fn write_report(path: &std::path::Path, report: &MigrationReport) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(report)
        .map_err(|error| Failure::new(Exit::Failed, format!("cannot write the report: {error}")))?;
    std::fs::write(path, text + "\n").map_err(|error| {
        let what = format!("cannot write the report to {}: {error}", path.display());
        Failure::new(Exit::Failed, what)
    })
}

/// Follows a migration to its end, also across a restart of the service.
pub(super) async fn wait(
    client: &Client,
    id: &str,
    watch: bool,
) -> Result<MigrationReport, Failure> {
    let path = format!("/v1/migrations/{}?watch=1", encode(id));
    let mut gone: Option<Instant> = None;
    let mut last = String::new();
    loop {
        let failure = match follow(client, &path, watch, &mut last, &mut gone).await {
            Ok(Some(report)) => return Ok(report),
            // The service closed the stream: it is being stopped.
            Ok(None) => None,
            Err(error @ (ClientError::Unreachable { .. } | ClientError::Broken(_))) => Some(error),
            Err(error) => return Err(error.into()),
        };
        let since = *gone.get_or_insert_with(|| {
            eprintln!("the service went away; waiting for it to come back");
            Instant::now()
        });
        if since.elapsed() > SERVICE_BACK {
            return Err(match failure {
                Some(error) => error.into(),
                None => Failure::new(
                    Exit::Unreachable,
                    "the service does not follow the migration",
                ),
            });
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn follow(
    client: &Client,
    path: &str,
    watch: bool,
    last: &mut String,
    gone: &mut Option<Instant>,
) -> Result<Option<MigrationReport>, ClientError> {
    let mut pieces = client.stream(path).await?;
    while let Some(status) = pieces.next_json::<MigrationStatus>().await? {
        *gone = None;
        if watch {
            let line = progress(&status);
            if line != *last {
                eprintln!("{line}");
                *last = line;
            }
        }
        if let Some(report) = status.report {
            return Ok(Some(report));
        }
    }
    Ok(None)
}

/// A report for people.
pub(super) fn summary(report: &MigrationReport) -> String {
    let MigrationReport {
        pod,
        from,
        to,
        memory,
        packets,
        ..
    } = report;
    let mut out = match &report.outcome {
        Outcome::Completed => format!(
            "{pod} moved from {from} to {to} in {:.0} ms, downtime {:.1} ms\n",
            report.total_ms, report.downtime_ms
        ),
        Outcome::Refused(reason) => format!("{pod} stays on {from}: refused by {reason}\n"),
        Outcome::Failed(reason) => {
            format!("{pod} stays on {from}: the migration to {to} failed: {reason}\n")
        }
    };
    out.push_str(&format!(
        "memory   {} of RAM, {} sent in {} rounds",
        Bytes(memory.bytes_ram),
        Bytes(memory.bytes_sent),
        memory.rounds
    ));
    match memory.compress {
        Compress::None => {}
        codec @ (Compress::Lz4 | Compress::Zstd | Compress::Auto) => {
            out.push_str(&format!(" (by {codec}, from {})", Bytes(memory.bytes_raw)))
        }
    }
    if memory.pages_verified > 0 {
        out.push_str(&format!(
            ", {} pages verified, {} mismatched",
            memory.pages_verified, memory.mismatched
        ));
    }
    if let Some(faults) = &memory.faults {
        out.push_str(&format!(
            "\npages    {} came after the resume, in {:.0} ms; {} waits, p50 {} us, p99 {} us, p99.9 {} us, longest {} us",
            faults.missing,
            faults.took_us as f64 / 1e3,
            faults.count,
            faults.p50_us,
            faults.p99_us,
            faults.p999_us,
            faults.max_us,
        ));
    }
    if let Some(disk) = &report.disk {
        out.push_str(&format!(
            "\ndisks    {} of {}, {} sent in {} rounds ({} on the wire), {} of it in the freeze",
            disk.disks,
            Bytes(disk.bytes_size),
            Bytes(disk.bytes),
            disk.rounds,
            Bytes(disk.bytes_sent),
            Bytes(disk.frozen_bytes),
        ));
    }
    out.push_str(&format!(
        "\npackets  {} seen, {} delivered, {} held, {} forwarded ({} by tunnel), {} refused, {} lost\n",
        packets.seen,
        packets.delivered,
        packets.held,
        packets.forwarded,
        packets.tunnelled,
        packets.refused,
        packets.lost
    ));
    let flows = report.conntrack;
    if flows != ConntrackReport::default() {
        out.push_str(&format!("flows    {} moved", flows.moved));
        for (count, what) in [
            (flows.failed, "refused by the destination's kernel"),
            (flows.untracked, "not tracked there"),
            (
                flows.bound.saturating_sub(flows.bound_unserved),
                "go on through the node that translates their addresses",
            ),
            (
                flows.bound_unserved,
                "break, bound to the source by address translation (its log says why)",
            ),
        ] {
            if count > 0 {
                out.push_str(&format!(", {count} {what}"));
            }
        }
        out.push('\n');
    }
    if packets.lost > 0 {
        let other = packets.lost - (packets.lost_overflow + packets.lost_park).min(packets.lost);
        out.push_str(&format!(
            "LOST     {} beyond what may be kept (--on-overflow drop), {} at a full queue, {other} otherwise\n",
            packets.lost_overflow, packets.lost_park
        ));
    }
    if packets.unaccounted != 0 {
        out.push_str(&format!(
            "BOOKS    do not balance: {} packets are booked nowhere, or twice\n",
            packets.unaccounted.unsigned_abs()
        ));
    }
    if !report.phases.is_empty() {
        let steps: Vec<String> = report
            .phases
            .iter()
            .map(|(name, us)| format!("{name} {:.1} ms", *us as f64 / 1000.0))
            .collect();
        out.push_str(&format!("steps    {}\n", steps.join(", ")));
    }
    out
}
