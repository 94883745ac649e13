//! What a user calls an image of a registry: `[HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]`.

use std::fmt;
use std::str::FromStr;

use crate::image::Digest;
use crate::image::name;

/// The registry of references that name none.
pub const DOCKER_HUB: &str = "docker.io";

/// Longest repository name, in bytes (distribution-spec, "Pulling manifests").
const MAX_REPOSITORY: usize = 255;

/// An image in a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Text that names no image of a registry.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is no image of a registry: {why}; such as registry.example.com:5000/team/app:1.2"
)]
pub struct BadReference {
    text: String,
    why: &'static str,
}

impl Reference {
    /// The registry: a host, with its port where it has one.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The repository in the registry.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The digest that the manifest must have, if the reference pins it.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// What the registry is asked for: the digest, else the tag, else `latest`.
    pub fn wanted(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".to_owned(),
        }
    }

    /// The tag to push to; `None` if the reference pins a digest.
    pub fn tag(&self) -> Option<&str> {
        match self.digest {
            Some(_) => None,
            None => Some(self.tag.as_deref().unwrap_or("latest")),
        }
    }

    /// The name under which the node's store keeps the image.
    ///
    /// # Errors
    /// The store's names are shorter than a registry's may be.
    pub fn store_name(&self) -> Result<String, name::BadName> {
        name::normalize(&self.to_string())
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for Reference {
    type Err = BadReference;

    fn from_str(text: &str) -> Result<Self, BadReference> {
        let bad = |why| BadReference {
            text: text.chars().take(120).collect(),
            why,
        };
        let (rest, digest) = match text.split_once('@') {
            None => (text, None),
            Some((rest, digest)) => {
                let digest = digest.parse();
                (
                    rest,
                    Some(digest.map_err(|_| bad("its digest must be sha256: and 64 hex digits"))?),
                )
            }
        };
        let (registry, path) = match rest.split_once('/') {
            Some((first, path)) if is_host(first) => (first, path),
            _ => (DOCKER_HUB, rest),
        };
        let registry = match registry {
            "index.docker.io" | "registry-1.docker.io" => DOCKER_HUB.to_owned(),
            registry => registry.to_ascii_lowercase(),
        };
        if !host_is_fine(&registry) {
            return Err(bad("its registry must be HOST or HOST:PORT"));
        }
        let (path, tag) = match path.rsplit_once(':') {
            Some((path, tag)) => (path, Some(tag.to_owned())),
            None => (path, None),
        };
        if tag.as_deref().is_some_and(|tag| !tag_is_fine(tag)) {
            return Err(bad(
                "its tag must be letters, digits and . _ - , 128 at most",
            ));
        }
        let repository = if registry == DOCKER_HUB && !path.contains('/') {
            format!("library/{path}")
        } else {
            path.to_owned()
        };
        if repository.len() > MAX_REPOSITORY || !repository.split('/').all(component_is_fine) {
            return Err(bad(
                "its repository must be lower-case letters and digits, with single . _ - / between them",
            ));
        }
        Ok(Self {
            registry,
            repository,
            tag,
            digest,
        })
    }
}

/// Whether the part before the first slash is a registry, and not a part of the repository. Docker's rule.
fn is_host(first: &str) -> bool {
    first == "localhost"
        || first.contains(['.', ':'])
        || first.chars().any(|c| c.is_ascii_uppercase())
}

fn host_is_fine(registry: &str) -> bool {
    let (host, port) = match registry.split_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (registry, None),
    };
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    host.len() <= 253
        && host.split('.').all(label)
        && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port != 0))
}

fn tag_is_fine(tag: &str) -> bool {
    tag.len() <= 128
        && tag.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && tag
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b".-_".contains(&b))
}

/// One part of a repository: alphanumeric, with separators `.`, `_`, `__` or dashes inside.
fn component_is_fine(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else {
        return false;
    };
    plain(*first)
        && plain(*last)
        && bytes.iter().all(|b| plain(*b) || b".-_".contains(b))
        && !["..", "._", "_.", ".-", "-.", "_-", "-_", "___"]
            .iter()
            .any(|bad| text.contains(bad))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn parse(text: &str) -> Reference {
        text.parse().unwrap()
    }

    #[test]
    fn what_is_left_out_is_what_docker_adds() {
        for (text, full, name) in [
            ("redis", "docker.io/library/redis", "redis:latest"),
            ("redis:7", "docker.io/library/redis:7", "redis:7"),
            (
                "bitnami/redis",
                "docker.io/bitnami/redis",
                "bitnami/redis:latest",
            ),
            (
                "index.docker.io/library/redis",
                "docker.io/library/redis",
                "redis:latest",
            ),
            ("localhost/a", "localhost/a", "localhost/a:latest"),
            (
                "REG.example:5000/team/app:V1",
                "reg.example:5000/team/app:V1",
                "reg.example:5000/team/app:V1",
            ),
        ] {
            let reference = parse(text);
            assert_eq!(reference.to_string(), full);
            assert_eq!(parse(full), reference);
            assert_eq!(reference.store_name().unwrap(), name);
        }
    }

    #[test]
    fn a_digest_pins_and_is_part_of_the_name() {
        let reference = parse(&format!("quay.io/a/b:1@sha256:{HEX}"));
        assert_eq!(reference.wanted(), format!("sha256:{HEX}"));
        assert_eq!(reference.tag(), None);
        let name = reference.store_name().unwrap();
        assert_eq!(name, format!("quay.io/a/b:sha256-{HEX}"));
        assert_eq!(name::normalize(&name).unwrap(), name);
        assert_eq!(parse("a/b").wanted(), "latest");
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        for text in [
            "",
            "/",
            "a//b",
            "a/../b",
            "a..b/c",
            "Team App",
            "a:",
            "a:b:c",
            "a@sha256:12",
            "a@md5:12",
            "reg.example:99999/a",
            "reg.example:0/a",
            "-x.example/a",
            "[::1]:5000/a",
            "http://reg.example/a",
            "a\n",
            "é/a",
            "reg.example/A",
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text:?}");
        }
        let long = "a".repeat(300);
        assert!(format!("reg.example/{long}").parse::<Reference>().is_err());
        assert!(
            format!("a:{}", "t".repeat(129))
                .parse::<Reference>()
                .is_err()
        );
    }
}
