//! What the pod as a whole says of its surroundings: names, name servers, hosts, when it is started again.

use std::net::IpAddr;

use guest_agent::protocol::settings::{HostAlias, PodSettings, Resolver, Restart};

use super::validate::{label, text};
use super::yaml::{Fields, Node, invalid};
use super::{PodError, PodSpec};

/// What glibc and Kubernetes take: servers, domains.
const MAX_SERVERS: usize = 3;
const MAX_SEARCHES: usize = 32;

/// Longest name in DNS.
const MAX_NAME: usize = 253;

/// An hour: `stop` waits no longer.
const LONGEST_GRACE_S: u32 = 3600;

/// Kubernetes' default is to start containers again.
pub(super) fn restart(spec: &mut Fields<'_>) -> Result<Restart, PodError> {
    let Some(node) = spec.get("restartPolicy") else {
        return Ok(Restart::Always);
    };
    match node.text()? {
        "Always" => Ok(Restart::Always),
        "OnFailure" => Ok(Restart::OnFailure),
        "Never" => Ok(Restart::Never),
        other => invalid(
            &node.path,
            format!("`{other}` is none of Always, OnFailure and Never"),
        ),
    }
}

pub(super) fn settings(spec: &mut Fields<'_>) -> Result<PodSettings, PodError> {
    let hostname = match spec.get("hostname") {
        Some(node) => Some(node.text()?.to_owned()),
        None => None,
    };
    let grace_s = match spec.get("terminationGracePeriodSeconds") {
        Some(node) => Some(node.number(0, LONGEST_GRACE_S)?),
        None => None,
    };
    let mut hosts = Vec::new();
    for node in list(spec.get("hostAliases"))? {
        let mut fields = node.fields()?;
        let ip = address(&fields.require("ip", "an alias is of an address")?)?;
        let names = fields
            .require("hostnames", "list at least one name")?
            .texts()?;
        fields.finish()?;
        hosts.push(HostAlias { ip, names });
    }
    Ok(PodSettings {
        hostname,
        hosts,
        resolver: resolver(spec)?,
        grace_s,
        ..PodSettings::default()
    })
}

fn resolver(spec: &mut Fields<'_>) -> Result<Option<Resolver>, PodError> {
    if let Some(node) = spec.get("dnsPolicy")
        && !matches!(node.text()?, "Default" | "None")
    {
        return Err(PodError::Unsupported {
            path: node.path,
            hint: "there is no DNS of a cluster: write `None` and `dnsConfig`, or `Default`"
                .to_owned(),
        });
    }
    let Some(node) = spec.get("dnsConfig") else {
        return Ok(None);
    };
    let mut fields = node.fields()?;
    let servers = list(fields.get("nameservers"))?;
    let servers = servers.iter().map(address).collect::<Result<_, _>>()?;
    let searches = fields
        .get("searches")
        .map_or(Ok(Vec::new()), |n| n.texts())?;
    let mut options = Vec::new();
    for node in list(fields.get("options"))? {
        let mut fields = node.fields()?;
        let name = fields
            .require("name", "an option has one")?
            .text()?
            .to_owned();
        options.push(match fields.get("value") {
            Some(value) => format!("{name}:{}", value.text()?),
            None => name,
        });
        fields.finish()?;
    }
    fields.finish()?;
    Ok(Some(Resolver {
        servers,
        searches,
        options,
    }))
}

fn list<'a>(node: Option<Node<'a>>) -> Result<Vec<Node<'a>>, PodError> {
    node.map_or(Ok(Vec::new()), |node| node.list())
}

fn address(node: &Node<'_>) -> Result<IpAddr, PodError> {
    match node.text()?.parse() {
        Ok(address) => Ok(address),
        Err(_) => invalid(&node.path, "is not an IPv4 or IPv6 address"),
    }
}

/// A word of a file whose words are parted by blanks.
fn word(path: &str, word: &str) -> Result<(), PodError> {
    text(path, word, MAX_NAME)?;
    match word.is_empty() || word.contains(char::is_whitespace) || word.starts_with('#') {
        true => invalid(path, "must be one word"),
        false => Ok(()),
    }
}

/// What holds for every pod, wherever it came from.
pub(super) fn check(pod: &PodSpec) -> Result<(), PodError> {
    let settings = &pod.settings;
    if let Some(name) = &settings.hostname {
        label("spec.hostname", name)?;
    }
    for (index, alias) in settings.hosts.iter().enumerate() {
        let path = format!("spec.hostAliases[{index}].hostnames");
        if alias.names.is_empty() {
            return invalid(&path, "list at least one name");
        }
        for name in &alias.names {
            word(&path, name)?;
        }
    }
    if let Some(resolver) = &settings.resolver {
        let path = "spec.dnsConfig";
        if resolver.servers.len() > MAX_SERVERS {
            return invalid(&format!("{path}.nameservers"), "three at the most");
        }
        if resolver.searches.len() > MAX_SEARCHES {
            return invalid(&format!("{path}.searches"), "32 at the most");
        }
        for text in resolver.searches.iter().chain(&resolver.options) {
            word(path, text)?;
        }
    }
    for volume in &settings.memory_volumes {
        label("spec.volumes[].name", &volume.name)?;
    }
    Ok(())
}
