//! Migrations of the test's pod, as the command line and the API show them.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use migrator::migration::status::{MigrationReport, MigrationStatus, Outcome, Phase};
use xtask::lab::Node;
use xtask::process::poll_until;

use super::{POD, SOON, TestLab};

/// What a migration may take on a busy machine.
const MOVES_WITHIN: Duration = Duration::from_secs(60);

impl TestLab {
    /// Moves the pod away from a node, with every page compared; the report of a success.
    ///
    /// # Errors
    /// It was not moved, or the report has a defect.
    pub fn moves(&self, from: Node) -> Result<MigrationReport> {
        self.moves_with(from, &[])
    }

    /// As [`TestLab::moves`], with options of `migrate`.
    ///
    /// # Errors
    /// As [`TestLab::moves`].
    pub fn moves_with(&self, from: Node, options: &[&str]) -> Result<MigrationReport> {
        let to = from.other().name();
        let words = ["--output", "json", "migrate", POD, "--to", to, "--verify"];
        let words = [&words, options].concat();
        let report: MigrationReport = serde_json::from_str(&self.succeeds(from, &words)?)?;
        let what = || format!("{report:?}");
        ensure!(report.outcome == Outcome::Completed, what());
        ensure!(report.memory.pages_verified > 0, what());
        ensure!(report.memory.mismatched == 0, what());
        ensure!(report.packets.lost == 0 && report.packets.held == 0, what());
        ensure!(report.packets.unaccounted == 0, what());
        self.runs_on(from.other())?;
        Ok(report)
    }

    /// Starts to move the pod away from a node, without waiting; the migration's id.
    ///
    /// # Errors
    /// It does not begin.
    pub fn begins(&self, from: Node, options: &[&str]) -> Result<String> {
        let words = ["migrate", POD, "--to", from.other().name(), "--detach"];
        let id = self.succeeds(from, &[&words, options].concat())?;
        Ok(id.trim().to_owned())
    }

    /// Starts to move the pod from a to b, so slowly that pre-copy takes many seconds, and waits until its pages
    /// are on the way; the migration's id.
    ///
    /// # Errors
    /// It does not come to that.
    pub fn is_in_precopy(&self) -> Result<String> {
        let id = self.begins(Node::A, &["--bandwidth", "2", "--compress", "none"])?;
        self.comes_to(Node::A, &id, "the first pages", |status| {
            status.phase == Phase::Precopy && status.bytes_sent > 0
        })?;
        Ok(id)
    }

    /// What the source says of a migration.
    ///
    /// # Errors
    /// It does not answer, or does not know it.
    pub fn status(&self, source: Node, id: &str) -> Result<MigrationStatus> {
        self.get(source, &format!("/v1/migrations/{id}"))
    }

    /// Waits until the source says of a migration what `wanted` wants.
    ///
    /// # Errors
    /// It does not come to that, or ends before.
    pub fn comes_to(
        &self,
        source: Node,
        id: &str,
        what: &str,
        wanted: impl Fn(&MigrationStatus) -> bool,
    ) -> Result<MigrationStatus> {
        let mut last = self.status(source, id);
        let over = |last: &Result<MigrationStatus>| {
            last.as_ref()
                .is_ok_and(|status| status.report.is_some() || wanted(status))
        };
        poll_until(MOVES_WITHIN, || {
            last = self.status(source, id);
            over(&last)
        });
        let last = last?;
        if !wanted(&last) {
            bail!("migration {id} does not come to {what}: {last:?}");
        }
        Ok(last)
    }

    /// Waits until a migration has failed; its reason, and its report.
    ///
    /// # Errors
    /// It does not fail.
    pub fn fails(&self, id: &str) -> Result<(String, MigrationReport)> {
        let status = self.comes_to(Node::A, id, "its end", |status| status.report.is_some())?;
        let report = status.report.clone().context("no report")?;
        match &report.outcome {
            Outcome::Completed => bail!("it completed: {report:?}"),
            Outcome::Refused(reason) | Outcome::Failed(reason) => {
                ensure!(status.phase == Phase::Done, "{status:?}");
                ensure!(!reason.is_empty(), "it failed without a reason");
                Ok((reason.clone(), report.clone()))
            }
        }
    }

    /// Waits until this node has nothing of the pod, and nothing of a migration.
    ///
    /// # Errors
    /// Something is left behind.
    pub fn nothing_is_left_on(&self, node: Node) -> Result<()> {
        let mut left = Vec::new();
        poll_until(SOON, || {
            left = self
                .leftovers(node)
                .unwrap_or_else(|error| vec![format!("{error:#}")]);
            left.is_empty()
        });
        ensure!(
            left.is_empty(),
            "left behind on node {}: {}",
            node.name(),
            left.join(", ")
        );
        Ok(())
    }
}
