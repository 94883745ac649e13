//! `cargo xtask check`: formatting, lints, licences, documentation, and the house rules that a program can see.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::project::Project;
use crate::{cmd, licences, setup};

/// Lines of a source file beyond which it is named, without failing.
const SOFT_LIMIT: usize = 400;

/// Arguments of the verb.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {}

/// The verb.
///
/// # Errors
/// The packages that building needs are missing and cannot be installed.
pub fn main(project: &Project, _args: &Args) -> Result<ExitCode> {
    setup::ensure(project, &setup::Args::default())?;
    Ok(if all(project) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Runs every check, also after one failed; whether all passed.
pub fn all(project: &Project) -> bool {
    type Check = fn(&Project) -> Result<()>;
    let checks: [(&str, Check); 5] = [
        ("formatting", formatting),
        ("house rules", house_rules),
        ("licences", licences::check),
        ("lints", lints),
        ("documentation", documentation),
    ];
    let mut passed = true;
    for (name, check) in checks {
        let begun = Instant::now();
        match check(project) {
            Ok(()) => println!(
                "check: {name:<14} ok ({:.1} s)",
                begun.elapsed().as_secs_f64()
            ),
            Err(error) => {
                println!("check: {name:<14} FAILED: {error:#}");
                passed = false;
            }
        }
    }
    passed
}

fn formatting(project: &Project) -> Result<()> {
    cmd::run(&mut cmd::cargo(project, ["fmt", "--all", "--", "--check"]))
        .context("`cargo fmt --all` mends it")
}

fn lints(project: &Project) -> Result<()> {
    // The test of Ceph has a verb of its own, and is in no other's targets.
    let ceph = ["--package", "migrator-tests", "--test", "ceph"];
    for targets in [&["--workspace", "--all-targets"][..], &ceph] {
        let mut clippy = cmd::cargo(project, ["clippy", "--quiet"]);
        cmd::run(clippy.args(targets).args(["--", "--deny", "warnings"]))?;
    }
    Ok(())
}

fn documentation(project: &Project) -> Result<()> {
    let mut doc = cmd::cargo(
        project,
        [
            "doc",
            "--quiet",
            "--workspace",
            // Nobody reads it, and all of migrator would be checked once more for it.
            "--exclude=migrator-tests",
            "--no-deps",
            "--document-private-items",
        ],
    );
    cmd::run(doc.env(
        "RUSTDOCFLAGS",
        "--deny warnings --allow rustdoc::private_intra_doc_links",
    ))
}

/// Nothing in the tree may name the machine that it was written on. Split, so that this file does not.
const FORBIDDEN: [&str; 3] = [
    concat!("/wo", "rk/"),
    concat!("/tmp", "/w/"),
    concat!("/ho", "me/"),
];

fn house_rules(project: &Project) -> Result<()> {
    let mut faults = Vec::new();
    for path in sources(project)? {
        let Ok(text) = std::fs::read_to_string(project.root.join(&path)) else {
            continue;
        };
        for (number, line) in text.lines().enumerate() {
            if let Some(word) = FORBIDDEN.iter().find(|word| line.contains(**word)) {
                faults.push(format!(
                    "{path}:{}: names a machine's path: {word}",
                    number + 1
                ));
            }
        }
        let lines = text.lines().count();
        if lines > SOFT_LIMIT && path.ends_with(".rs") {
            println!(
                "check: {path} has {lines} lines; more than {SOFT_LIMIT} read better as two files"
            );
        }
    }
    if !faults.is_empty() {
        bail!("{}", faults.join("\n"));
    }
    Ok(())
}

/// The files of the source tree, from its root: what git tracks, or without git everything but the build folder.
fn sources(project: &Project) -> Result<Vec<String>> {
    if let Ok(listing) = cmd::output(
        cmd::command(
            "git",
            ["ls-files", "--cached", "--others", "--exclude-standard"],
        )
        .current_dir(&project.root),
    ) {
        return Ok(listing.lines().map(str::to_owned).collect());
    }
    let mut found = Vec::new();
    walk(&project.root, &project.root, &mut found)?;
    Ok(found)
}

fn walk(root: &Path, dir: &Path, found: &mut Vec<String>) -> Result<()> {
    for entry in std::fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let entry = entry?;
        let path = entry.path();
        let kind = entry.file_type()?;
        if kind.is_dir() {
            // A build folder says so itself (bford.info/cachedir).
            if entry.file_name() != ".git" && !path.join("CACHEDIR.TAG").exists() {
                walk(root, &path, found)?;
            }
        } else if kind.is_file()
            && let Some(path) = path.strip_prefix(root).ok().and_then(Path::to_str)
        {
            found.push(path.to_owned());
        }
    }
    Ok(())
}
