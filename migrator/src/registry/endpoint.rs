//! Which hosts are asked for a registry's images: its mirrors in their order, then the registry itself.

use reqwest::Url;

use super::reference::{DOCKER_HUB, Reference};
use crate::config;

/// The host of docker.io's API.
const DOCKER_HUB_API: &str = "registry-1.docker.io";

/// A host that serves the registry API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Endpoint {
    /// What is before `v2/`, with a slash at its end.
    base: Url,
    /// What credentials are looked up by: host, and port if it is not the scheme's.
    pub(super) name: String,
}

impl Endpoint {
    fn new(mut base: Url, name: String) -> Self {
        if !base.path().ends_with('/') {
            base.set_path(&format!("{}/", base.path()));
        }
        Self { base, name }
    }

    /// The URL of something below `v2/`; `None` if it is not one of this host.
    pub(super) fn url(&self, path: &str) -> Option<Url> {
        let url = self.base.join(&format!("v2/{path}")).ok()?;
        self.owns(&url).then_some(url)
    }

    /// Whether a URL is of this host, by the same scheme and port: only there credentials are sent.
    pub(super) fn owns(&self, url: &Url) -> bool {
        url.origin() == self.base.origin()
    }

    /// Whether it is spoken to with TLS.
    pub(super) fn has_tls(&self) -> bool {
        self.base.scheme() == "https"
    }
}

/// The hosts to ask, first to last.
pub(super) fn endpoints(
    config: &config::Registries,
    reference: &Reference,
    plain_http: bool,
) -> Vec<Endpoint> {
    let mirrors = config.mirrors_of(reference.registry()).filter_map(|url| {
        let name = match (url.host_str()?, url.port()) {
            (host, Some(port)) => format!("{host}:{port}"),
            (host, None) => host.to_owned(),
        };
        Some(Endpoint::new(url, name))
    });
    mirrors.chain(own(config, reference, plain_http)).collect()
}

/// The registry itself.
pub(super) fn own(
    config: &config::Registries,
    reference: &Reference,
    plain_http: bool,
) -> Option<Endpoint> {
    let name = reference.registry();
    let scheme = match plain_http || config.plain_http.iter().any(|plain| plain == name) {
        true => "http",
        false => "https",
    };
    let host = match name {
        DOCKER_HUB => DOCKER_HUB_API,
        name => name,
    };
    // A reference's registry is a host with or without a port: always a URL.
    let base = Url::parse(&format!("{scheme}://{host}/")).ok()?;
    Some(Endpoint::new(base, name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(yaml: &str) -> config::Registries {
        serde_yaml_ng::from_str(yaml).unwrap()
    }

    fn urls(config: &config::Registries, reference: &str, plain: bool) -> Vec<String> {
        let reference = reference.parse().unwrap();
        endpoints(config, &reference, plain)
            .iter()
            .map(|e| e.url("a/manifests/1").unwrap().to_string())
            .collect()
    }

    #[test]
    fn mirrors_come_before_the_registry() {
        let config = config(
            r#"{ mirrors: { docker.io: ["http://m.example:80/hub", "https://n.example:8443"] }, plain_http: ["localhost:5000"] }"#,
        );
        assert_eq!(
            urls(&config, "redis", false),
            [
                "http://m.example/hub/v2/a/manifests/1",
                "https://n.example:8443/v2/a/manifests/1",
                "https://registry-1.docker.io/v2/a/manifests/1",
            ]
        );
        let local = ["http://localhost:5000/v2/a/manifests/1"];
        assert_eq!(urls(&config, "localhost:5000/a", false), local);
        assert_eq!(
            urls(&config, "reg.example/a", false),
            ["https://reg.example/v2/a/manifests/1"]
        );
        assert_eq!(
            urls(&config, "reg.example/a", true),
            ["http://reg.example/v2/a/manifests/1"]
        );
    }

    #[test]
    fn credentials_stay_with_the_host_that_they_are_for() {
        let reference = "reg.example/a".parse().unwrap();
        let endpoint = own(&config("{}"), &reference, false).unwrap();
        let owns = |url: &str| endpoint.owns(&Url::parse(url).unwrap());
        assert!(owns("https://reg.example/v2/x") && owns("https://reg.example:443/"));
        for other in [
            "http://reg.example/",
            "https://reg.example:444/",
            "https://reg.example.evil.example/",
        ] {
            assert!(!owns(other), "{other}");
        }
        assert!(endpoint.has_tls());
    }
}
