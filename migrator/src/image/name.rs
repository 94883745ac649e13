//! Names of images: what a user writes, in one form.

use super::digest::Digest;

/// Longest name accepted, in bytes: a DNS name (255), a repository (255) and a tag (128) fit.
const MAX_NAME: usize = 640;

/// Text that cannot be the name of an image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not an image name: use lower-case letters, digits and . _ - / with an optional :tag, such as redis:7"
)]
pub struct BadName(String);

/// Brings a name into the form that the store keeps: `docker.io/` and `library/` dropped, and the tag
/// `latest` added where there is none. Names come from peers and archives too: anything but the characters of
/// a reference (distribution-spec: letters, digits, `.`, `_`, `-`, `/`, a port and a tag) is refused.
///
/// A name that pins a digest (`app@sha256:..`) is kept with the digest as its tag (`app:sha256-..`): that is the name
/// of what was pulled by that digest.
pub fn normalize(name: &str) -> Result<String, BadName> {
    let bad = || BadName(name.chars().take(120).collect());
    let (name, pinned) = match name.split_once('@') {
        None => (name, None),
        Some((name, digest)) => {
            let digest: Digest = digest.parse().map_err(|_| bad())?;
            (name, Some(format!("sha256-{}", digest.hex())))
        }
    };
    let short = name.strip_prefix("docker.io/").unwrap_or(name);
    let short = short.strip_prefix("library/").unwrap_or(short);
    if short.is_empty() || short.len() > MAX_NAME {
        return Err(bad());
    }
    let (path, last) = match short.rsplit_once('/') {
        Some((path, last)) => (Some(path), last),
        None => (None, short),
    };
    let (last, tag) = last.split_once(':').unwrap_or((last, "latest"));
    let tag = pinned.as_deref().unwrap_or(tag);
    let component = |text: &str| {
        text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || ".-_".contains(c))
    };
    let host_or_component = |text: &str| match text.split_once(':') {
        Some((host, port)) => component(host) && port.parse::<u16>().is_ok(),
        None => component(text),
    };
    let tag_is_fine = tag.len() <= 128
        && tag.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && tag
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || ".-_".contains(c));
    let path_is_fine = path.is_none_or(|path| {
        let mut parts = path.split('/');
        parts.next().is_some_and(host_or_component) && parts.all(component)
    });
    if !(component(last) && tag_is_fine && path_is_fine) {
        return Err(bad());
    }
    Ok(match path {
        Some(path) => format!("{path}/{last}:{tag}"),
        None => format!("{last}:{tag}"),
    })
}

/// Checks a name that should be in the store's form already.
pub(super) fn check(name: &str) -> Result<(), BadName> {
    if normalize(name)? == name {
        return Ok(());
    }
    Err(BadName(name.to_owned()))
}

/// Makes a name out of a file's name, for an archive that carries none: `My Image.tar.gz` becomes
/// `my-image`.
pub(super) fn from_file_stem(file_name: &str) -> String {
    let mut stem = file_name;
    for end in [".gz", ".tgz", ".tar"] {
        stem = stem.strip_suffix(end).unwrap_or(stem);
    }
    let mut name: String = stem
        .chars()
        .map(|c| c.to_ascii_lowercase())
        .map(|c| {
            if c.is_ascii_alphanumeric() || "._-".contains(c) {
                c
            } else {
                '-'
            }
        })
        .take(128)
        .collect();
    let start = name.find(|c: char| c.is_ascii_alphanumeric());
    name.drain(..start.unwrap_or(name.len()));
    if name.is_empty() {
        name.push_str("image");
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_image_has_one_spelling() {
        for (written, kept) in [
            ("redis", "redis:latest"),
            ("redis:7", "redis:7"),
            ("docker.io/library/redis:7", "redis:7"),
            ("docker.io/bitnami/redis", "bitnami/redis:latest"),
            (
                "registry.lab:5000/team/app:V1",
                "registry.lab:5000/team/app:V1",
            ),
        ] {
            assert_eq!(normalize(written).unwrap(), kept);
            assert_eq!(normalize(kept).unwrap(), kept);
        }
    }

    #[test]
    fn a_pinned_digest_is_the_tag() {
        let hex = "0".repeat(64);
        let kept = format!("quay.io/a:sha256-{hex}");
        for written in ["quay.io/a", "quay.io/a:1"] {
            let written = format!("{written}@sha256:{hex}");
            assert_eq!(normalize(&written).unwrap(), kept);
        }
        assert_eq!(normalize(&kept).unwrap(), kept);
        assert!(normalize("a@sha256:0").is_err());
        assert!(normalize(&format!("a@sha256:{hex}@sha256:{hex}")).is_err());
    }

    #[test]
    fn names_that_could_hurt_are_refused() {
        for name in [
            "",
            ":",
            "/",
            "a/",
            "/a",
            "..",
            "a/../b",
            "a b",
            "a\n",
            "A",
            "a:",
            "a:b:c",
            "a\0",
            "x:99999/y",
            "é",
        ] {
            assert!(normalize(name).is_err(), "{name:?}");
        }
        assert!(normalize(&"a".repeat(1000)).is_err());
    }

    #[test]
    fn file_names_become_names() {
        for (file, name) in [
            ("redis.tar", "redis"),
            ("My Image.tar.gz", "my-image"),
            ("...", "image"),
            ("x.tgz", "x"),
        ] {
            assert_eq!(from_file_stem(file), name);
            assert!(normalize(&from_file_stem(file)).is_ok());
        }
    }
}
