//! Where images come from.

use std::collections::BTreeMap;
use std::path::PathBuf;

use reqwest::Url;
use serde::Deserialize;

use crate::registry::Reference;

/// What the node knows of registries.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Registries {
    /// Registries by name (`docker.io`, `registry.example:5000`), and the URLs that are asked first for their images.
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// Credentials, as `docker login` and `skopeo login --authfile` write them. Read at each pull.
    pub auth_file: Option<PathBuf>,
    /// PEM certificates that are trusted beside the machine's own. Read at each pull.
    pub ca: Option<PathBuf>,
    /// Registries that are spoken to without TLS.
    pub plain_http: Vec<String>,
    /// Keep the layers of images, so that they can be pushed and saved.
    pub keep_layers: bool,
    /// Pull only the description of images whose chunks a registry has, also for `run` of a pod whose image is not here.
    pub lazy: bool,
}

impl Registries {
    pub(super) fn files_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        self.auth_file.iter_mut().chain(self.ca.iter_mut())
    }

    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        let is_registry = |name: &str| {
            format!("{name}/a")
                .parse::<Reference>()
                .is_ok_and(|reference| reference.registry() == name)
        };
        for name in self.mirrors.keys() {
            if !is_registry(name) {
                return Err((
                    "registries.mirrors",
                    format!(
                        "names `{name}`, which is no registry: write HOST or HOST:PORT, such as docker.io"
                    ),
                ));
            }
        }
        for url in self.mirrors.values().flatten() {
            if let Err(why) = base(url) {
                return Err(("registries.mirrors", format!("has `{url}`: {why}")));
            }
        }
        for name in &self.plain_http {
            if !is_registry(name) {
                return Err((
                    "registries.plain_http",
                    format!(
                        "has `{name}`, which is no registry: write HOST or HOST:PORT, such as localhost:5000"
                    ),
                ));
            }
        }
        Ok(())
    }

    /// The mirrors of a registry, in the order in which they are asked.
    pub fn mirrors_of(&self, registry: &str) -> impl Iterator<Item = Url> {
        let urls = self.mirrors.get(registry);
        // `check` took only those that parse.
        urls.into_iter().flatten().filter_map(|url| base(url).ok())
    }
}

/// The base of a mirror's URLs.
fn base(text: &str) -> Result<Url, &'static str> {
    let url = Url::parse(text).map_err(|_| "write a URL, such as https://mirror.example")?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err("write a URL, such as https://mirror.example");
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("credentials belong into registries.auth_file, not into the URL");
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err("a mirror's URL has no query");
    }
    Ok(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(yaml: &str) -> Result<Registries, String> {
        let registries: Registries = serde_yaml_ng::from_str(yaml).map_err(|e| e.to_string())?;
        registries
            .check()
            .map_err(|(key, why)| format!("{key} {why}"))?;
        Ok(registries)
    }

    #[test]
    fn mirrors_are_asked_in_their_order() {
        let registries =
            parse(r#"mirrors: { docker.io: ["https://a.example", "http://b.example/hub"] }"#);
        let urls: Vec<_> = registries.unwrap().mirrors_of("docker.io").collect();
        let urls: Vec<&str> = urls.iter().map(Url::as_str).collect();
        assert_eq!(urls, ["https://a.example/", "http://b.example/hub"]);
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_name() {
        for (yaml, word) in [
            ("mirror: {}", "mirror"),
            ("mirrors: { 'a/b': [] }", "registries.mirrors"),
            ("mirrors: { docker.io: [mirror.example] }", "https://"),
            ("mirrors: { docker.io: ['ftp://a.example'] }", "https://"),
            (
                "mirrors: { docker.io: ['https://u:p@a.example'] }",
                "auth_file",
            ),
            (
                "plain_http: ['http://localhost:5000']",
                "registries.plain_http",
            ),
        ] {
            let error = parse(yaml).unwrap_err();
            assert!(error.contains(word), "{yaml}: {error}");
        }
    }
}
