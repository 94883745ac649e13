//! Licences and banned crates of everything that is linked in, by deny.toml.
//!
//! cargo-deny would do more, and takes minutes to install; what a change can break here is that a dependency's licence is
//! not on the list, or that a banned crate came in.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::cmd;
use crate::project::Project;

#[derive(Deserialize)]
struct Deny {
    licenses: Licenses,
    bans: Bans,
}

#[derive(Deserialize)]
struct Licenses {
    allow: BTreeSet<String>,
}

#[derive(Deserialize)]
struct Bans {
    #[serde(default)]
    deny: Vec<Banned>,
}

#[derive(Deserialize)]
struct Banned {
    name: String,
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
}

/// Checks every package of the lock file that this platform uses.
///
/// # Errors
/// A licence is not allowed, or a crate is banned: all of them are named.
pub fn check(project: &Project) -> Result<()> {
    let text =
        std::fs::read_to_string(project.root.join("deny.toml")).context("cannot read deny.toml")?;
    let deny: Deny = toml::from_str(&text).context("deny.toml is not valid")?;
    let platform = [
        "metadata",
        "--format-version",
        "1",
        "--locked",
        "--filter-platform",
        "x86_64-unknown-linux-gnu",
    ];
    let metadata: Metadata =
        serde_json::from_str(&cmd::output(&mut cmd::cargo(project, platform))?)?;
    let faults: Vec<String> = metadata
        .packages
        .iter()
        .filter_map(|package| fault(package, &deny))
        .collect();
    anyhow::ensure!(faults.is_empty(), "{}", faults.join("\n"));
    Ok(())
}

fn fault(package: &Package, deny: &Deny) -> Option<String> {
    let name = format!("{} {}", package.name, package.version);
    if deny
        .bans
        .deny
        .iter()
        .any(|banned| banned.name == package.name)
    {
        return Some(format!("{name} is banned by deny.toml"));
    }
    match &package.license {
        None => Some(format!("{name} states no licence")),
        Some(expression) => match allows(expression, &deny.licenses.allow) {
            Some(true) => None,
            Some(false) => Some(format!(
                "{name} is {expression}, which deny.toml does not allow"
            )),
            None => Some(format!(
                "{name}: cannot read the licence expression {expression}"
            )),
        },
    }
}

/// Whether an SPDX expression (SPDX 2.3, annex D) can be met with the allowed licences; none if it is malformed.
/// A slash is how old crates wrote OR.
fn allows(expression: &str, allowed: &BTreeSet<String>) -> Option<bool> {
    let spaced = expression
        .replace('/', " OR ")
        .replace('(', " ( ")
        .replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut rest = words.as_slice();
    let met = either(&mut rest, allowed)?;
    rest.is_empty().then_some(met)
}

fn either(words: &mut &[&str], allowed: &BTreeSet<String>) -> Option<bool> {
    let mut met = both(words, allowed)?;
    while let ["OR", rest @ ..] = words {
        *words = rest;
        met |= both(words, allowed)?;
    }
    Some(met)
}

fn both(words: &mut &[&str], allowed: &BTreeSet<String>) -> Option<bool> {
    let mut met = one(words, allowed)?;
    while let ["AND", rest @ ..] = words {
        *words = rest;
        met &= one(words, allowed)?;
    }
    Some(met)
}

fn one(words: &mut &[&str], allowed: &BTreeSet<String>) -> Option<bool> {
    match *words {
        ["(", rest @ ..] => {
            *words = rest;
            let met = either(words, allowed)?;
            let [")", rest @ ..] = *words else {
                return None;
            };
            *words = rest;
            Some(met)
        }
        [name, "WITH", exception, rest @ ..] => {
            *words = rest;
            Some(allowed.contains(&format!("{name} WITH {exception}")))
        }
        ["AND" | "OR" | "WITH" | ")", ..] | [] => None,
        [name, rest @ ..] => {
            *words = rest;
            Some(allowed.contains(*name))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_met_as_spdx_says() {
        let allowed = ["MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception"]
            .map(str::to_owned)
            .into();
        for (expression, met) in [
            ("MIT", Some(true)),
            ("GPL-3.0", Some(false)),
            ("GPL-3.0 OR MIT", Some(true)),
            ("MIT/GPL-2.0", Some(true)),
            ("MIT AND GPL-2.0", Some(false)),
            ("(MIT OR GPL-2.0) AND Apache-2.0", Some(true)),
            ("GPL-2.0 OR MIT AND GPL-3.0", Some(false)),
            ("Apache-2.0 WITH LLVM-exception", Some(true)),
            ("GPL-2.0 WITH Classpath-exception-2.0", Some(false)),
            ("(MIT", None),
            ("MIT MIT", None),
            ("", None),
        ] {
            assert_eq!(allows(expression, &allowed), met, "{expression}");
        }
    }
}
