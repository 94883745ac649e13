//! PostgreSQL under pgbench: no transaction fails, and each one that a client was told of is there.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::load::{Load, Program};
use super::place::Place;
use crate::cmd;
use crate::process::poll_until;

/// The container, and its volume.
pub(super) const CONTAINER: &str = "postgres";
/// See [`CONTAINER`].
pub(super) const VOLUME: &str = "pgdata";

/// Connections that pgbench keeps open.
const CLIENTS: &str = "6";

/// Filling two branches takes seconds under emulation.
const FILLS_WITHIN: Duration = Duration::from_secs(180);

/// What transactions that are under way may take.
const ENDS_WITHIN: Duration = Duration::from_secs(60);

/// Makes the cluster if there is none, and becomes the server.
const SERVER: &str = "set -e
export PATH=$PATH:/usr/lib/postgresql/15/bin
as='setpriv --reuid=postgres --regid=postgres --init-groups'
if [ ! -d /data/pg ]; then
  install -d -o postgres -g postgres -m 700 /data/pg
  $as initdb -D /data/pg -U postgres --auth=trust --data-checksums --locale=C.UTF-8
  echo 'host all all all trust' >> /data/pg/pg_hba.conf
fi
exec $as postgres -D /data/pg -c listen_addresses=* -c unix_socket_directories=/tmp -c shared_buffers=32MB -c checkpoint_timeout=30s";

/// After the server's clean end: every page's checksum.
const CHECKER: &str = "setpriv --reuid=postgres --regid=postgres --init-groups /usr/lib/postgresql/15/bin/pg_checksums --check -D /data/pg && echo all are right";

/// The container as part of a pod.
pub(super) fn container(image: &str) -> String {
    yaml(image, SERVER)
}

/// The same that looks at each page and ends.
pub(super) fn checker(image: &str) -> String {
    yaml(image, CHECKER)
}

fn yaml(image: &str, script: &str) -> String {
    let script = serde_json::json!(script);
    format!(
        "    - name: {CONTAINER}
      image: {image}
      command: [/bin/sh, -c, {script}]
      volumeMounts:
        - {{ name: {VOLUME}, mountPath: /data }}
"
    )
}

/// The volume as part of a pod.
pub(super) fn volume() -> String {
    format!("    - name: {VOLUME}\n      persistentVolumeClaim: {{ claimName: {VOLUME} }}\n")
}

/// pgbench against the pod.
pub(super) struct Postgres<'a> {
    place: &'a Place<'a>,
    pgbench: Mutex<Program>,
}

impl<'a> Postgres<'a> {
    /// Fills the tables, and starts the load.
    ///
    /// # Errors
    /// The server does not take it.
    pub(super) fn start(place: &'a Place<'a>, pgbench: &Path) -> Result<Self> {
        let program = pgbench.to_str().context("a path that is not UTF-8")?;
        // It takes connections before it takes questions.
        let mut ready = ask(place, "select 1");
        poll_until(FILLS_WITHIN, || {
            ready = ask(place, "select 1");
            ready.is_ok()
        });
        ready.context("PostgreSQL does not come up")?;
        let server = ["-h", place.address, "-U", "postgres", "postgres"];
        let mut fill = cmd::command(program, ["-i", "-q", "-s", "2"]);
        Program::start(place.namespace, fill.args(server))?.ends_well(FILLS_WITHIN)?;
        // An hour is longer than any run; it is ended by the signal of the timer that it sets itself.
        let mut load = cmd::command(program, ["-n", "-c", CLIENTS, "-T", "36000", "-P", "1"]);
        let pgbench = Program::start(place.namespace, load.args(server))?;
        Ok(Self {
            place,
            pgbench: Mutex::new(pgbench),
        })
    }

    fn program(&self) -> MutexGuard<'_, Program> {
        self.pgbench.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn ask(place: &Place<'_>, question: &str) -> Result<String> {
    let psql = [
        "psql", "-h", "/tmp", "-U", "postgres", "-At", "-c", question,
    ];
    let answer = place.exec(CONTAINER, &psql)?;
    Ok(answer.trim().to_owned())
}

/// Seconds in which there were transactions, of pgbench's lines of progress.
fn busy_seconds(progress: &str) -> u64 {
    let tps = |line: &str| -> Option<f64> {
        let (_, rest) = line.split_once(" s, ")?;
        rest.split_once(" tps")?.0.parse().ok()
    };
    let lines = progress.lines().filter(|l| l.starts_with("progress: "));
    lines.filter(|l| tps(l).is_some_and(|t| t > 0.0)).count() as u64
}

/// A number of pgbench's summary.
fn figure(summary: &str, name: &str) -> Result<u64> {
    let line = summary.lines().find_map(|l| l.strip_prefix(name));
    let line = line.with_context(|| format!("pgbench does not tell its {name}: {summary}"))?;
    let digits = line.trim_start_matches(':').trim();
    let end = digits.find(|c: char| !c.is_ascii_digit());
    Ok(digits[..end.unwrap_or(digits.len())].parse()?)
}

impl Load for Postgres<'_> {
    fn done(&self) -> u64 {
        busy_seconds(&self.program().stderr())
    }

    fn fault(&self) -> Option<String> {
        self.program().ended()
    }

    fn end(self: Box<Self>) -> Result<String> {
        self.program().signal(Signal::SIGALRM)?;
        let Postgres { place, pgbench } = *self;
        let pgbench = pgbench.into_inner().unwrap_or_else(PoisonError::into_inner);
        let said = pgbench.ends_well(ENDS_WITHIN)?;
        let processed = figure(&said, "number of transactions actually processed")?;
        let failed = figure(&said, "number of failed transactions")?;
        ensure!(failed == 0 && processed > 0, "{said}");
        for word in ["ERROR", "FATAL", "aborted", "terminated"] {
            ensure!(!said.contains(word), "{said}");
        }
        let counted = ask(place, "select count(*) from pgbench_history")?;
        ensure!(
            counted == processed.to_string(),
            "pgbench was told of {processed} transactions, the server has {counted}"
        );
        let sums = ask(
            place,
            "select (select sum(abalance) from pgbench_accounts), (select sum(bbalance) from pgbench_branches), \
             (select sum(tbalance) from pgbench_tellers), (select sum(delta) from pgbench_history)",
        )?;
        let sums: Vec<&str> = sums.split('|').collect();
        ensure!(
            sums.len() == 4 && sums.iter().all(|sum| *sum == sums[0] && !sum.is_empty()),
            "the sums of accounts, branches, tellers and history differ: {sums:?}"
        );
        // Every index against its table, and every table's pages.
        let amcheck = [
            "/usr/lib/postgresql/15/bin/pg_amcheck",
            "-h",
            "/tmp",
            "-U",
            "postgres",
            "--install-missing",
            "--heapallindexed",
            "postgres",
        ];
        place.exec(CONTAINER, &amcheck)?;
        Ok(format!("{processed} transactions, balance {}", sums[0]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_pgbench_prints_is_read() {
        let progress = "pgbench (15.18)\nprogress: 1.0 s, 210.0 tps, lat 4.1 ms stddev 1.0, 0 failed\n\
                        progress: 2.0 s, 0.0 tps, lat 0.0 ms stddev 0.0, 0 failed\n";
        assert_eq!(busy_seconds(progress), 1);
        let summary = "number of transactions actually processed: 4711\nnumber of failed transactions: 0 (0.000%)\n";
        assert_eq!(
            figure(summary, "number of transactions actually processed").unwrap(),
            4711
        );
        assert_eq!(figure(summary, "number of failed transactions").unwrap(), 0);
        assert!(figure(summary, "latency average").is_err());
    }
}
