//! Debian packages that are unpacked instead of installed: the guest's kernel, and what the demo image holds.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cmd;

/// The concrete package that a metapackage depends on first, such as the kernel behind `linux-image-cloud-amd64`.
///
/// # Errors
/// apt does not know the package, or it has no dependency that starts with `prefix`.
pub fn dependency(package: &str, prefix: &str) -> Result<String> {
    let mut depends = cmd::command("apt-cache", ["depends", "--important", package]);
    let listing = with_lists(|| cmd::output(&mut depends))?;
    parse_dependency(&listing, prefix)
        .with_context(|| format!("{package} depends on nothing that starts with {prefix}; is its repository enabled in apt?"))
}

fn parse_dependency(listing: &str, prefix: &str) -> Option<String> {
    listing
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends:"))
        .map(str::trim)
        .find(|name| name.starts_with(prefix))
        .map(str::to_owned)
}

/// Downloads `package` into `dir` and returns the file; one that is there already is not fetched again.
///
/// # Errors
/// apt cannot download it.
pub fn download(package: &str, dir: &Path) -> Result<PathBuf> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    if let Some(found) = find(package, dir)? {
        return Ok(found);
    }
    // As root apt downloads as user _apt, which may not write here; it warns and goes on as root. Say so ourselves.
    let mut download = cmd::command(
        "apt-get",
        ["-o", "APT::Sandbox::User=root", "-qq", "download", package],
    );
    download.current_dir(dir);
    with_lists(|| cmd::output(&mut download))?;
    find(package, dir)?.with_context(|| {
        format!(
            "apt-get download {package} left no file in {}",
            dir.display()
        )
    })
}

/// Tries once more with fresh package lists: a clean machine has none, an old one names files that are gone.
fn with_lists(mut ask: impl FnMut() -> Result<String>) -> Result<String> {
    ask().or_else(|_| {
        // Its failure may concern a source that does not matter here: what counts is whether asking works now.
        let _ = cmd::output(&mut cmd::command("apt-get", ["update", "-qq"]));
        ask()
    })
}

fn find(package: &str, dir: &Path) -> Result<Option<PathBuf>> {
    let start = format!("{package}_");
    for entry in std::fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let path = entry?.path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        if name.starts_with(&start) && name.ends_with(".deb") {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// Unpacks a package into `dir`.
///
/// # Errors
/// dpkg refuses it.
pub fn unpack(package: &Path, dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    cmd::output(cmd::command("dpkg", ["-x"]).arg(package).arg(dir)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_behind_the_metapackage_is_found() {
        let listing = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n";
        assert_eq!(
            parse_dependency(listing, "linux-image-").as_deref(),
            Some("linux-image-6.1.0-56-cloud-amd64")
        );
        assert_eq!(parse_dependency(listing, "linux-headers-"), None);
    }
}
