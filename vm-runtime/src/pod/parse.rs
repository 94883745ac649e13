//! From the file's YAML to a [`PodSpec`].

use std::collections::BTreeMap;
use std::str::FromStr;

use serde_yaml_ng::Value;

use guest_agent::protocol::settings::ContainerSettings;

use super::limits::{bytes, limits};
use super::probes::{Ports, pre_stop, probe};
use super::security::{self, PodSecurity};
use super::storage::{by_kind, volume_mounts, volumes};
use super::yaml::{Fields, Node, invalid};
use super::{ContainerSpec, PodError, PodNet, PodSpec};
use super::{surroundings, validate};
use crate::units::{Bytes, MacAddress};

/// Longest file, in bytes.
const MAX_FILE: usize = 1 << 20;

/// What a container counts for that has no memory limit.
const DEFAULT_LIMIT: Bytes = Bytes::mib(128);

/// What the guest needs for itself: kernel, agent, page tables, and the writable layer's first pages.
const GUEST_OVERHEAD: Bytes = Bytes::mib(128);

/// The storage class of disks that are on one node.
const LOCAL_CLASS: &str = "local";

/// Annotations of ours.
const PREFIX: &str = "migrator/";

pub(super) fn pod(text: &str) -> Result<PodSpec, PodError> {
    if text.len() > MAX_FILE {
        return Err(PodError::TooLong);
    }
    let value: Value = serde_yaml_ng::from_str(text).map_err(PodError::Yaml)?;
    let mut fields = Node::root(&value).fields()?;
    constant(&mut fields, "apiVersion", "v1")?;
    constant(&mut fields, "kind", "Pod")?;
    let mut metadata = fields.require("metadata", "give it a `name`")?.fields()?;
    let mut spec = fields.require("spec", "list its `containers`")?.fields()?;
    fields.finish()?;

    let name = metadata
        .require("name", "a pod is known by it")?
        .text()?
        .to_owned();
    let labels = labels(&mut metadata)?;
    let mut annotations = Annotations::read(&mut metadata)?;
    metadata.finish()?;

    let restart = surroundings::restart(&mut spec)?;
    let mut settings = surroundings::settings(&mut spec)?;
    let security = security::pod(spec.get("securityContext"))?;
    settings.fs_group = security.fs_group;
    let (volumes, in_memory) = volumes(spec.get("volumes"))?;
    settings.memory_volumes = in_memory;
    let containers = spec.require("containers", "list at least one")?.list()?;
    spec.finish()?;
    let mut containers = containers
        .iter()
        .map(|node| container(node, &security))
        .collect::<Result<Vec<_>, _>>()?;
    for container in &mut containers {
        container.settings.restart = restart;
        let (mounts, in_memory) = by_kind(&container.volume_mounts, &settings.memory_volumes);
        (container.volume_mounts, container.settings.memory_mounts) = (mounts, in_memory);
    }

    let net = net(&name, &mut annotations)?;
    let memory = match annotations.take("vm-memory") {
        Some((path, text)) => bytes(&path, &text)?,
        None => needed_memory(&containers)?,
    };
    let hugepages = annotations.parse("hugepages", "true or false")?;
    let template = annotations.parse("template", "true or false")?;
    let storage_class = annotations.take("storage-class").map(|(_, text)| text);
    annotations.finish()?;
    let milli: u64 = containers
        .iter()
        .filter_map(|c| c.cpu_limit_milli)
        .map(u64::from)
        .sum();
    let vcpus = u32::try_from(milli.div_ceil(1000).max(1)).unwrap_or(u32::MAX);
    let pod = PodSpec {
        name,
        labels,
        net,
        memory: Bytes::mib(memory.0.div_ceil(1 << 20)),
        hugepages: hugepages.unwrap_or(false),
        vcpus,
        volumes,
        containers,
        cold_start: template == Some(false),
        storage_class: storage_class.filter(|class| class != LOCAL_CLASS),
        settings,
    };
    validate::pod(&pod)?;
    Ok(pod)
}

fn constant(fields: &mut Fields<'_>, key: &'static str, wanted: &str) -> Result<(), PodError> {
    match fields.get(key) {
        Some(node) if node.text()? != wanted => invalid(&node.path, format!("must be `{wanted}`")),
        _ => Ok(()),
    }
}

fn labels(metadata: &mut Fields<'_>) -> Result<BTreeMap<String, String>, PodError> {
    let Some(node) = metadata.get("labels") else {
        return Ok(BTreeMap::new());
    };
    let labels = node.text_map()?.into_iter();
    labels
        .map(|(key, value)| Ok((key.to_owned(), value.text()?.to_owned())))
        .collect()
}

/// The annotations of ours, by name without the prefix.
struct Annotations {
    path: String,
    left: BTreeMap<String, (String, String)>,
    known: Vec<&'static str>,
}

impl Annotations {
    fn read(metadata: &mut Fields<'_>) -> Result<Self, PodError> {
        let path = metadata.path("annotations");
        let mut left = BTreeMap::new();
        if let Some(node) = metadata.get("annotations") {
            for (key, value) in node.text_map()? {
                let text = value.text()?.to_owned();
                if let Some(name) = key.strip_prefix(PREFIX) {
                    left.insert(name.to_owned(), (value.path, text));
                }
            }
        }
        Ok(Self {
            path,
            left,
            known: Vec::new(),
        })
    }

    /// Path and value.
    fn take(&mut self, name: &'static str) -> Option<(String, String)> {
        self.known.push(name);
        self.left.remove(name)
    }

    fn parse<T: FromStr>(
        &mut self,
        name: &'static str,
        wanted: &str,
    ) -> Result<Option<T>, PodError> {
        let Some((path, text)) = self.take(name) else {
            return Ok(None);
        };
        match text.parse() {
            Ok(value) => Ok(Some(value)),
            Err(_) => invalid(&path, format!("`{text}` is not {wanted}")),
        }
    }

    /// An address with the length of its prefix.
    fn network<T: FromStr>(
        &mut self,
        name: &'static str,
        example: &str,
    ) -> Result<Option<(T, u8)>, PodError> {
        let Some((path, text)) = self.take(name) else {
            return Ok(None);
        };
        let parsed = text.split_once('/').and_then(|(address, prefix)| {
            // No sign, no leading zeroes.
            let prefix: u8 = prefix
                .parse()
                .ok()
                .filter(|p: &u8| p.to_string() == prefix)?;
            Some((address.parse().ok()?, prefix))
        });
        match parsed {
            Some(network) => Ok(Some(network)),
            None => invalid(
                &path,
                format!("`{text}` is not an address with a prefix, such as {example}"),
            ),
        }
    }

    fn finish(self) -> Result<(), PodError> {
        let Some((name, (path, _))) = self.left.into_iter().next() else {
            return Ok(());
        };
        Err(PodError::Unsupported {
            path,
            hint: format!(
                "`{PREFIX}{name}` is not an annotation of migrator; those are {}",
                self.known.join(", ")
            ),
        })
    }
}

fn net(pod: &str, annotations: &mut Annotations) -> Result<PodNet, PodError> {
    let ipv4 = annotations.network("ipv4", "10.77.0.10/24")?;
    let ipv6 = annotations.network("ipv6", "fd77::10/64")?;
    let net = PodNet {
        mac: annotations
            .parse("mac", "a unicast MAC address, such as 52:54:00:12:34:56")?
            .unwrap_or_else(|| derived_mac(pod)),
        ipv4,
        ipv6,
        gateway4: annotations.parse("gateway4", "an IPv4 address")?,
        gateway6: annotations.parse("gateway6", "an IPv6 address")?,
    };
    if net.ipv4.is_none() && net.ipv6.is_none() {
        return Err(PodError::Missing {
            path: format!("{}[\"{PREFIX}ipv4\"]", annotations.path),
            hint:
                "a pod needs an address: set this one, such as \"10.77.0.10/24\", or migrator/ipv6"
                    .to_owned(),
        });
    }
    Ok(net)
}

/// The MAC of a pod that names none: QEMU's prefix and 24 bits of the name's hash, the same on every node.
fn derived_mac(pod: &str) -> MacAddress {
    let hash = twox_hash::XxHash3_64::oneshot(pod.as_bytes());
    let [a, b, c, ..] = hash.to_le_bytes();
    MacAddress([0x52, 0x54, 0x00, a, b, c])
}

fn container(node: &Node<'_>, pod: &PodSecurity) -> Result<ContainerSpec, PodError> {
    let mut fields = node.fields()?;
    let mut settings = ContainerSettings::default();
    let user = security::container(fields.get("securityContext"), pod, &mut settings)?;
    let ports = Ports::read(fields.get("ports"))?;
    settings.startup = probe(fields.get("startupProbe"), &ports)?;
    settings.liveness = probe(fields.get("livenessProbe"), &ports)?;
    settings.readiness = probe(fields.get("readinessProbe"), &ports)?;
    settings.pre_stop = pre_stop(fields.get("lifecycle"))?;
    let mut truth = |key| fields.get(key).map_or(Ok(false), |node| node.truth());
    (settings.tty, settings.stdin) = (truth("tty")?, truth("stdin")?);
    let texts = |node: Option<Node<'_>>| match node {
        // Kubernetes takes an empty list for none.
        Some(node) => node.texts().map(|list| (!list.is_empty()).then_some(list)),
        None => Ok(None),
    };
    let container = ContainerSpec {
        name: fields
            .require("name", "containers are told apart by it")?
            .text()?
            .to_owned(),
        image: fields
            .require("image", "name one of `migrator image ls`")?
            .text()?
            .to_owned(),
        command: texts(fields.get("command"))?,
        args: texts(fields.get("args"))?,
        env: env(fields.get("env"))?,
        working_dir: match fields.get("workingDir") {
            Some(node) => Some(node.text()?.to_owned()),
            None => None,
        },
        memory_limit: None,
        cpu_limit_milli: None,
        disk_limit: None,
        volume_mounts: volume_mounts(fields.get("volumeMounts"))?,
        user,
        settings,
    };
    let limits = limits(fields.get("resources"))?;
    fields.finish()?;
    Ok(ContainerSpec {
        memory_limit: limits.memory,
        cpu_limit_milli: limits.cpu_milli,
        disk_limit: limits.disk,
        ..container
    })
}

fn env(node: Option<Node<'_>>) -> Result<Vec<(String, String)>, PodError> {
    let Some(node) = node else {
        return Ok(Vec::new());
    };
    let variable = |node: &Node<'_>| {
        let mut fields = node.fields()?;
        let name = fields
            .require("name", "a variable has one")?
            .text()?
            .to_owned();
        if let Some(node) = fields.get("valueFrom") {
            return Err(PodError::Unsupported {
                path: node.path,
                hint: "there are no config maps and secrets to take it from: write its `value`"
                    .to_owned(),
            });
        }
        let value = match fields.get("value") {
            Some(value) => value.text()?.to_owned(),
            None => String::new(),
        };
        fields.finish()?;
        Ok((name, value))
    };
    node.list()?.iter().map(variable).collect()
}

fn needed_memory(containers: &[ContainerSpec]) -> Result<Bytes, PodError> {
    let limits = containers
        .iter()
        .map(|c| c.memory_limit.unwrap_or(DEFAULT_LIMIT).0);
    let sum = limits
        .chain([GUEST_OVERHEAD.0])
        .try_fold(0_u64, u64::checked_add);
    match sum {
        Some(sum) => Ok(Bytes(sum)),
        None => invalid("spec.containers", "the memory limits add up to too much"),
    }
}
