//! The files in /etc that say where a container is: as in Kubernetes, the image has no say in them.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, Result};
use guest_agent::protocol::message::Configuration;

/// Writes them below the current root.
pub(crate) fn write(pod: &Configuration) -> Result<()> {
    fs::create_dir_all("/etc").context("making /etc")?;
    put("/etc/hostname", &format!("{}\n", pod.hostname))?;
    put("/etc/hosts", &hosts(pod))?;
    let resolver = resolver(pod);
    // Where nobody has said which name servers there are, the image's own are as good as any.
    if !resolver.is_empty() || !Path::new("/etc/resolv.conf").exists() {
        put("/etc/resolv.conf", &resolver)?;
    }
    Ok(())
}

fn put(path: &str, text: &str) -> Result<()> {
    // A symlink may lead to a folder that is made later, by systemd for one.
    if fs::symlink_metadata(path).is_ok_and(|m| m.is_symlink()) {
        fs::remove_file(path).with_context(|| format!("replacing {path}"))?;
    }
    fs::write(path, text).with_context(|| format!("writing {path}"))
}

fn hosts(pod: &Configuration) -> String {
    let mut text =
        String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    let interfaces = pod.interfaces.iter();
    let addresses = interfaces.flat_map(|i| i.addresses.iter().map(|(address, _)| address));
    for address in addresses {
        text += &format!("{address}\t{}\n", pod.hostname);
    }
    for alias in &pod.settings.hosts {
        text += &format!("{}\t{}\n", alias.ip, alias.names.join(" "));
    }
    text
}

fn resolver(pod: &Configuration) -> String {
    let server = |address: &IpAddr| format!("nameserver {address}\n");
    let Some(resolver) = &pod.settings.resolver else {
        return pod.dns.iter().map(server).collect();
    };
    let mut text: String = resolver.servers.iter().map(server).collect();
    for (word, list) in [
        ("search", &resolver.searches),
        ("options", &resolver.options),
    ] {
        if !list.is_empty() {
            text += &format!("{word} {}\n", list.join(" "));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_agent::protocol::message::Interface;
    use guest_agent::protocol::settings::{HostAlias, Resolver};

    fn pod() -> Configuration {
        let addresses = ["10.77.0.10", "fd77::10"].map(|a| (a.parse().expect("an address"), 24));
        Configuration {
            hostname: "web".into(),
            interfaces: vec![Interface {
                mac: [0; 6],
                addresses: addresses.to_vec(),
                gateways: Vec::new(),
                neighbours: Vec::new(),
                mtu: None,
            }],
            dns: vec!["10.0.0.1".parse().expect("an address")],
            ..Configuration::default()
        }
    }

    #[test]
    fn hosts_names_the_pod_at_each_of_its_addresses_and_what_it_is_told() {
        let mut pod = pod();
        pod.settings.hosts.push(HostAlias {
            ip: "10.1.1.1".parse().expect("an address"),
            names: vec!["db".into(), "db.local".into()],
        });
        let text = hosts(&pod);
        let end = "10.77.0.10\tweb\nfd77::10\tweb\n10.1.1.1\tdb db.local\n";
        assert!(text.ends_with(end), "{text}");
    }

    #[test]
    fn what_the_pod_says_of_name_servers_replaces_what_the_node_says() {
        let mut pod = pod();
        assert_eq!(resolver(&pod), "nameserver 10.0.0.1\n");
        pod.settings.resolver = Some(Resolver {
            servers: vec!["fd77::53".parse().expect("an address")],
            searches: vec!["a.local".into(), "b".into()],
            options: vec!["ndots:5".into()],
        });
        let text = "nameserver fd77::53\nsearch a.local b\noptions ndots:5\n";
        assert_eq!(resolver(&pod), text);
    }
}
