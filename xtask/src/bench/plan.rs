//! What the forms that compare have in common: their arguments, and the course of their rows.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};

use super::figures::{Record, Run};
use super::table;

/// Arguments of such a form.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Args {
    /// One small case of each row
    #[arg(long)]
    pub(super) quick: bool,
    /// Only cases whose name contains these words, such as `copy`, `move-512` or `park-inject`
    #[arg(long, value_name = "FILTER")]
    pub(super) case: Option<String>,
    /// Runs of each side
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) runs: u32,
    /// Only print the names of the cases
    #[arg(long)]
    pub(super) list: bool,
    /// Write the records to this file, as a list
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
}

/// What is wanted.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) quick: bool,
    pub(super) filter: Option<String>,
    pub(super) runs: u32,
}

impl Plan {
    /// What the arguments ask for.
    pub(super) fn new(args: &Args) -> Plan {
        Plan {
            quick: args.quick,
            filter: args.case.clone(),
            runs: args.runs,
        }
    }

    /// Words of a case's name are matched from their beginning: `copy` is not a part of `precopy`.
    pub(super) fn wants(&self, case: &str) -> bool {
        self.filter
            .as_deref()
            .is_none_or(|filter| format!("-{case}").contains(&format!("-{filter}")))
    }
}

/// What the rows have given so far.
pub(super) struct Results<'a> {
    args: &'a Args,
    began: Instant,
    records: Vec<Record>,
    failures: Vec<String>,
}

impl<'a> Results<'a> {
    /// None yet.
    pub(super) fn new(args: &'a Args) -> Results<'a> {
        Results {
            args,
            began: Instant::now(),
            records: Vec::new(),
            failures: Vec::new(),
        }
    }

    /// Runs one row. What it measured before it broke is kept, and written: a run of hours that is interrupted has left
    /// something.
    ///
    /// # Errors
    /// The records cannot be written.
    pub(super) fn row(
        &mut self,
        name: &str,
        cases: &[String],
        run: impl FnOnce(&mut Vec<Record>) -> Result<()>,
    ) -> Result<()> {
        println!("bench: {name}: {}", cases.join(", "));
        let begun = Instant::now();
        if let Err(error) = run(&mut self.records) {
            println!("bench: {name} FAILED: {error:#}");
            self.failures.push(format!("{name}: {error:#}"));
        }
        println!("bench: {name} took {:.0} s", begun.elapsed().as_secs_f64());
        let Some(path) = &self.args.json else {
            return Ok(());
        };
        std::fs::write(path, serde_json::to_string_pretty(&self.records)? + "\n")
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Prints the table, and what could not be measured.
    pub(super) fn conclude(self) -> ExitCode {
        println!("\n{}", table::render(&self.records));
        println!(
            "{} runs of each side, in turn; {:.0} s",
            self.args.runs,
            self.began.elapsed().as_secs_f64()
        );
        for failure in &self.failures {
            println!("NOT MEASURED: {failure}");
        }
        if self.failures.is_empty() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

/// Shows a run's figures as they come.
pub(super) fn told(side: &str, run: Result<Run>) -> Result<Run> {
    match &run {
        Ok(figures) => {
            let figures: Vec<String> = figures
                .iter()
                .map(|(metric, figure)| format!("{metric} {figure:.1}"))
                .collect();
            println!("bench:   {side}: {}", figures.join(", "));
        }
        Err(error) => println!("bench:   {side}: FAILED: {error:#}"),
    }
    run
}
